from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from palf_dist.config import RunConfig
from palf_dist.errors import ConfigError, DataError
from palf_dist.evaluation.methods import check_methods
from palf_dist.inner_models import InputShape
from palf_dist.randomness import random_generator
from palf_dist.tasks.corruptions import class_transitions, instance_transitions
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import build_group, check_tasks, evaluation_specs, sample_specs
from palf_dist.tasks.inputs import read_features
from palf_dist.tasks.splits import SPLITS, draw_rows
from palf_dist.types import TaskGroup, TaskSpec
from tests.tasks.cases import REFERENCE, image_dataset, run_config, task_spec, text_dataset, toy_dataset

SMALL, LARGE = toy_dataset("small", rows=160, classes=2), toy_dataset("large", rows=3000, classes=5, seed=3)
PICTURES, COLOURS, TEXTS = image_dataset(), image_dataset("colours", channels=3), text_dataset()
ALL = {dataset.name: dataset for dataset in (SMALL, LARGE, PICTURES, COLOURS, TEXTS)}
KINDS = [
    {"kind": "mlp", "hidden": [8]},
    {"kind": "conv", "channels": [4], "image_size": 4},
    {"kind": "transformer", "width": 8, "feedforward": 8, "vocabulary": 64, "length": 8},
]


def config(*datasets: EncodedDataset, **tasks: Any) -> RunConfig:
    return run_config(datasets, tasks={"architectures": KINDS, **tasks})


def build(run: RunConfig, specs: Sequence[TaskSpec]) -> TaskGroup:
    return build_group(run, ALL, specs, REFERENCE)


def test_groups_share_architecture_and_optimiser_and_draw_everything_else() -> None:
    run = config(*ALL.values(), optimisers=["sgd", "adam"], group_size=8)
    groups = [sample_specs(run, ALL, (0, "train", step), 0) for step in range(60)]
    assert {len(group) for group in groups} == {8}
    assert all(len({(spec.architecture, spec.optimiser) for spec in group}) == 1 for group in groups)
    seen: dict[int, set[str]] = {}
    for group in groups:
        seen.setdefault(group[0].architecture, set()).update(spec.dataset for spec in group)
    assert seen == {0: {"small", "large", "pictures", "colours"}, 1: {"pictures", "colours"}, 2: {"texts"}}
    assert {group[0].optimiser for group in groups} == {"sgd", "adam"}
    assert len({spec.keys for group in groups for spec in group}) == 60 * 8


def test_specs_follow_the_distributions_of_the_configuration() -> None:
    run = config(LARGE, group_size=2000, train_size=[50, 800])
    specs = sample_specs(run, ALL, (1,), 0)
    noise = np.array([spec.noise_rate for spec in specs])
    assert abs((noise == 0).mean() - 0.25) < 0.05
    assert noise[noise > 0].min() >= 0.05 and noise.max() <= 0.6 and abs(noise[noise > 0].mean() - 0.325) < 0.02
    ratio = np.array([spec.imbalance for spec in specs])
    assert abs((ratio == 1).mean() - 0.5) < 0.05
    assert ratio[ratio > 1].min() >= 3 and ratio.max() <= 10
    assert abs(np.log(ratio[ratio > 1]).mean() - np.log([3, 10]).mean()) < 0.05
    uniform = np.array([spec.target_prior == "uniform" for spec in specs])
    assert not uniform[ratio == 1].any() and abs(uniform[ratio > 1].mean() - 0.5) < 0.07
    size = np.array([spec.train_size for spec in specs])
    assert size.min() >= 50 and size.max() <= 800
    assert abs(np.log(size).mean() - np.log([50, 800]).mean()) < 0.08


def test_training_sizes_never_exceed_what_the_dataset_gives() -> None:
    run = config(SMALL, train_size=[60, 400], group_size=50)
    assert max(spec.train_size for spec in sample_specs(run, ALL, (0,), 0)) == pytest.approx(70, abs=2)
    with pytest.raises(DataError, match=r"^small: a training size of 100 is larger.*160 rows 70 can"):
        build(config(SMALL, train_size=[100, 100]), sample_specs(config(SMALL, train_size=[100, 100]), ALL, (0,), 0))


def test_no_architecture_reads_the_dataset() -> None:
    run = run_config([TEXTS], (COLOURS,), tasks={"architectures": KINDS[:1]})
    with pytest.raises(DataError, match=r"tasks\.architectures \(mlp\) can read texts \(text\)"):
        sample_specs(run, ALL, (0,), 0)
    run = run_config([COLOURS], (TEXTS,), tasks={"architectures": KINDS[:2]})
    with pytest.raises(DataError, match=r"tasks\.architectures \(mlp, conv\) can read texts \(text\)"):
        evaluation_specs(run, ALL)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["small", "large", "pictures"]), st.sampled_from(["train", "uniform"]))
def test_built_tasks_hold_the_drawn_rows_and_keep_training_labels_apart(key: int, name: str, prior: str) -> None:
    spec = task_spec(keys=(key,), dataset=name, train_size=60, noise_rate=0.4, imbalance=5.0, target_prior=prior)
    run = config(*ALL.values())
    group = build(run, [spec, dataclasses.replace(spec, keys=(key, 1), dataset="large")])
    task = draw_rows(ALL[name], spec, run.tasks)
    for split in SPLITS:
        rows = getattr(group, split)
        count = len(task.rows[split])
        assert rows.mask[0].sum() == count and rows.mask[0, :count].all()
        assert not rows.labels[0, count:].any() and not any(column[0, count:].any() for column in rows.inputs)
        if split in ("test", "meta_validation"):
            np.testing.assert_array_equal(rows.labels[0, :count], task.labels[task.rows[split]])
    count = len(task.rows["train"])
    np.testing.assert_array_equal(group.clean_train_labels[0, :count], task.labels[task.rows["train"]])
    assert (group.train.labels < group.num_classes[:, None]).all()
    assert group.num_classes.tolist() == [len(ALL[name].class_names), 5]


def test_validation_is_as_noisy_as_training_and_the_rest_is_clean() -> None:
    spec = task_spec(dataset="large", train_size=1200, noise_rate=0.5)
    run = config(LARGE)
    group, task = build(run, [spec]), draw_rows(LARGE, spec, run.tasks)
    for split in ("train", "validation"):
        wrong = getattr(group, split).labels[0].numpy() != task.labels[task.rows[split]]
        assert abs(wrong.mean() - 0.4) < 4.5 * np.sqrt(0.24 / len(wrong))
    for split in ("test", "meta_validation"):
        np.testing.assert_array_equal(getattr(group, split).labels[0], task.labels[task.rows[split]])


@pytest.mark.parametrize("kind", ["class_dependent", "instance_dependent"])
@pytest.mark.parametrize("name", ["large", "colours", "texts"])
def test_noise_with_a_model_of_its_own(kind: str, name: str) -> None:
    """Training and validation share one transition matrix or one projection; test rows are clean, keys decide alone."""
    index = {"large": 0, "colours": 1, "texts": 2}[name]
    spec = task_spec(dataset=name, train_size=100, noise_kind=kind, noise_rate=0.4, architecture=index)
    run = config(*ALL.values())
    groups = [build(run, [spec]), build(run, [spec]), build(run, [dataclasses.replace(spec, keys=("other",))])]
    task = draw_rows(ALL[name], spec, run.tasks)
    for split in SPLITS:
        labels = [getattr(group, split).labels[0].numpy() for group in groups]
        np.testing.assert_array_equal(labels[0], labels[1])
        changed = (labels[0] != task.labels[task.rows[split]]).mean()
        assert (0.1 < changed < 0.75) if split in ("train", "validation") else changed == 0, (split, changed)
    assert not np.array_equal(groups[0].train.labels, groups[2].train.labels)
    if name == "colours":  # an mlp reads the pictures otherwise: the task is the same
        other = build(run, [dataclasses.replace(spec, architecture=0)])
        np.testing.assert_array_equal(other.train.labels, groups[0].train.labels)


def test_training_and_validation_have_the_same_class_dependent_noise() -> None:
    spec = task_spec(dataset="large", train_size=1300, noise_kind="class_dependent", noise_rate=0.4)
    run = config(LARGE)
    group, task = build(run, [spec]), draw_rows(LARGE, spec, run.tasks)
    clean = {split: task.labels[task.rows[split]] for split in ("train", "validation")}
    joined = np.concatenate([clean["validation"], clean["train"]])
    matrix = class_transitions(joined, 0.4, 5, random_generator(*spec.keys, "noise"))
    for split, labels in clean.items():
        noisy = getattr(group, split).labels[0].numpy()
        for label in range(5):
            counts = np.bincount(noisy[labels == label], minlength=5)
            assert chisquare(counts, counts.sum() * matrix[label]).pvalue > 1e-5


def test_training_and_validation_have_the_same_instance_dependent_noise() -> None:
    """How likely the given labels are under one set of projections for both: as likely as its own draws."""
    spec = task_spec(dataset="large", train_size=1300, noise_kind="instance_dependent", noise_rate=0.4)
    run = config(LARGE)
    group, task = build(run, [spec]), draw_rows(LARGE, spec, run.tasks)
    clean = np.concatenate([task.labels[task.rows[split]] for split in ("validation", "train")])
    features = read_features(LARGE, np.concatenate([task.rows[split] for split in ("validation", "train")]))
    by_row = instance_transitions(clean, features, 0.4, 5, random_generator(*spec.keys, "noise"))
    parts = np.split(by_row, [len(task.rows["validation"])])
    for split, rows in zip(("validation", "train"), parts, strict=True):
        given = getattr(group, split).labels[0].numpy()
        logs = np.log(np.maximum(rows, 1e-300))
        mean = (rows * logs).sum(1)
        variance = ((rows * logs**2).sum(1) - mean**2).sum()
        assert abs((logs[range(len(given)), given] - mean).sum()) < 4.5 * np.sqrt(variance)


def test_log_prior_ratio_reads_the_noisy_training_labels() -> None:
    spec = task_spec(dataset="large", train_size=300, noise_rate=0.3, imbalance=10.0, target_prior="uniform")
    matched = dataclasses.replace(spec, target_prior="train")
    group = build(config(LARGE, SMALL), [spec, matched, dataclasses.replace(spec, dataset="small", train_size=40)])
    labels = group.train.labels[0][group.train.mask[0] > 0].numpy()
    expected = np.log((np.bincount(labels, minlength=5) + 1) / (len(labels) + 5) * 5)
    np.testing.assert_allclose(group.log_prior_ratio[0], expected, rtol=1e-6)
    assert not group.log_prior_ratio[1].any()
    assert group.log_prior_ratio[2, :2].all() and not group.log_prior_ratio[2, 2:].any()


def test_batches_are_epochs_without_replacement() -> None:
    run = run_config([LARGE], tasks={"architectures": KINDS}, inner={"steps": 30, "batch_size": 16})
    group = build(run, [task_spec(keys=(key,), dataset="large", train_size=size) for key, size in ((0, 90), (1, 70))])
    assert group.batches.shape == (30, 2, 16) and group.batches.dtype == torch.int64
    for g, size in enumerate(group.train_sizes.int().tolist()):
        order = group.batches[:, g].flatten()
        assert order.max() < size
        for start in range(0, len(order) - size + 1, size):
            assert sorted(order[start : start + size].tolist()) == list(range(size))
        assert not torch.equal(order[:size], order[size : 2 * size])


def test_learning_rate_weight_decay_and_initial_parameters() -> None:
    spec = task_spec(dataset="pictures", architecture=1, optimiser="sgd", train_size=40)
    group = build(config(PICTURES), [spec, dataclasses.replace(spec, keys=(9,))])
    torch.testing.assert_close(group.learning_rate, torch.full((2, 1), 0.02))
    torch.testing.assert_close(group.weight_decay, torch.full((2, 1), 0.003))
    generators = [random_generator(0, "test", 0, "init"), random_generator(9, "init")]
    torch.testing.assert_close(group.theta0, group.model.init(generators), rtol=0, atol=0)


@pytest.mark.parametrize("architecture", [0, 1, 2])
def test_a_task_is_the_same_in_any_group_up_to_padding(architecture: int) -> None:
    names = {0: ("small", "large", "colours"), 1: ("pictures", "colours", "colours"), 2: ("texts", "texts", "texts")}
    specs = [
        task_spec(keys=(index,), dataset=name, architecture=architecture, train_size=40 + index, noise_rate=0.3)
        for index, name in enumerate(names[architecture])
    ]
    run = config(*ALL.values())
    alone, together = build(run, specs[:1]), build(run, specs[::-1])
    for split in SPLITS:
        one, many = getattr(alone, split), getattr(together, split)
        for left, right in zip(
            (*one.inputs, one.labels, one.mask), (*many.inputs, many.labels, many.mask), strict=True
        ):
            part, rest = right[-1][tuple(map(slice, left[0].shape))], right[-1].clone()
            torch.testing.assert_close(left[0], part, rtol=0, atol=0)
            rest[tuple(map(slice, left[0].shape))] = 0
            assert not rest.any(), "padding is zero"
    torch.testing.assert_close(alone.batches[:, 0], together.batches[:, -1])
    classes = int(alone.num_classes[0])
    torch.testing.assert_close(alone.log_prior_ratio[0], together.log_prior_ratio[-1, :classes])


@pytest.mark.parametrize(("name", "architecture"), [("large", 0), ("texts", 2)])
@pytest.mark.parametrize("kind", ["uniform", "instance_dependent"])
def test_validation_rows_join_the_training_rows_with_the_labels_they_have(
    name: str, architecture: int, kind: str
) -> None:
    common = {"dataset": name, "architecture": architecture, "noise_rate": 0.4, "noise_kind": kind}
    specs = [
        task_spec(keys=(size,), train_size=size, imbalance=4.0, target_prior="uniform", **common) for size in (60, 44)
    ]
    run = config(*ALL.values())
    apart, together = (build_group(run, ALL, specs, REFERENCE, joined) for joined in (False, True))
    assert not together.validation.mask.any() and torch.equal(together.theta0, apart.theta0)
    for g, counts in enumerate(zip(apart.train_sizes.int(), apart.validation.mask.sum(1).int(), strict=True)):
        size = int(sum(counts))
        both = list(zip((apart.train, apart.validation), counts, strict=True))
        assert together.train.mask[g].tolist() == [1.0] * size + [0.0] * (together.train.mask.shape[1] - size)
        labels = torch.cat([rows.labels[g, :count] for rows, count in both])
        assert torch.equal(together.train.labels[g, :size], labels)
        task = draw_rows(ALL[name], specs[g], run.tasks)
        clean = np.concatenate([task.labels[task.rows[split]] for split in ("train", "validation")])
        assert together.clean_train_labels[g, :size].tolist() == clean.tolist() != labels.tolist()
        inputs = torch.cat([rows.inputs[0][g, :count] for rows, count in both])
        read = together.train.inputs[0][g, :size]
        if name == "texts":  # nothing of them is standardised
            assert torch.equal(read, inputs)
        else:  # the first column is the row's number, standardised by all rows that are trained on
            assert torch.equal(read[:, 0].argsort(), inputs[:, 0].argsort())
            assert abs(read[:, 0].mean()) < 1e-5 < abs(inputs[:, 0].mean())
        frequencies = (labels.bincount(minlength=int(apart.num_classes[g])) + 1) / (size + apart.num_classes[g])
        want = (frequencies * apart.num_classes[g]).log()
        torch.testing.assert_close(together.log_prior_ratio[g, : len(want)], want)
        assert set(together.batches[:, g].flatten().tolist()) == set(range(size)), "all of them are trained on"
    assert torch.equal(together.test.labels, apart.test.labels)


def test_the_held_out_grid_is_complete_and_does_not_depend_on_the_grouping() -> None:
    held_out = (SMALL, TEXTS, PICTURES)
    evaluation = {"noise_rates": [0.0, 0.3], "seeds": 2, "imbalance": 8.0}
    run = run_config([LARGE], held_out, tasks={"architectures": KINDS, "group_size": 5}, evaluation=evaluation)
    groups = evaluation_specs(run, ALL)
    specs = [spec for group in groups for spec in group]
    assert len(specs) == len({spec.keys for spec in specs}) == 3 * 2 * 3 * 2
    assert all(len(group) <= 5 and len({spec.architecture for spec in group}) == 1 for group in groups)
    assert {(spec.dataset, spec.architecture) for spec in specs} == {("small", 0), ("texts", 2), ("pictures", 0)}
    assert {(spec.imbalance, spec.target_prior) for spec in specs} == {(1, "train"), (8, "train"), (8, "uniform")}
    regrouped = run.model_copy(update={"seed": 7, "tasks": run.tasks.model_copy(update={"group_size": 36})})
    assert [spec for group in evaluation_specs(regrouped, ALL) for spec in group] == specs
    assert sum(build(run, group).size for group in groups) == 36


FINGERPRINT = "from tests.tasks.test_family import fingerprint; print(fingerprint())"


def fingerprint() -> str:
    digest = hashlib.sha256()
    run = config(SMALL, LARGE, group_size=4)
    group = build(run, sample_specs(run, ALL, (5, "train", 1), 0))
    rows = [getattr(group, split) for split in SPLITS]
    for tensor in (group.theta0, group.batches, *(part for split in rows for part in (*split.inputs, split.labels))):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def test_another_process_builds_the_same_bytes() -> None:
    done = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint()


def test_what_a_unit_would_refuse_is_refused_before_any_work() -> None:
    held_out = run_config((LARGE,)).data.held_out
    names = [LARGE.name, *(source.name for source in held_out)]
    datasets = {name: LARGE if name == LARGE.name else toy_dataset(name) for name in names}
    run = run_config((LARGE,), tasks={"architectures": KINDS[:1]})
    check_tasks(run, datasets)
    for sizes in ([5000, 5000], [2000, 5000]):
        with pytest.raises(
            DataError, match=f"^large: a training size of {sizes[0]} is larger .* its 3000 rows 13.* lower"
        ):
            check_tasks(run_config((LARGE,), tasks={"architectures": KINDS[:1], "train_size": sizes}), datasets)
    rare = toy_dataset("large", rows=35, classes=5)
    with pytest.raises(DataError, match=r"^large: 0 of its 5 classes have 8 rows or more"):
        # told of the data, not of a module that cannot be built for no class at all
        module = {"kind": "module", "factory": f"{__name__}:two_classes_module"}
        check_tasks(run_config((rare,), tasks={"architectures": [*KINDS[:1], module]}), datasets | {"large": rare})
    with pytest.raises(DataError, match=r"tasks\.architectures\.1: conv can read none of the training datasets: large"):
        check_tasks(run_config((LARGE,), tasks={"architectures": KINDS[:2]}), datasets)


def test_a_family_is_held_out_where_nothing_has_to_be_tuned_for_it() -> None:
    """No training dataset is a text, all that is judged is."""
    given = {"learning_rate": 0.01, "weight_decay": 0.001}
    few = {"train_size": [30, 30]}
    run = run_config((COLOURS,), (TEXTS,), tasks={"architectures": KINDS, **few}, inner=given)
    check_tasks(run, ALL)
    assert {spec.architecture for specs in evaluation_specs(run, ALL) for spec in specs} == {2}
    for name in given:
        half = run_config((COLOURS,), (TEXTS,), tasks={"architectures": KINDS, **few}, inner=given | {name: "tuned"})
        with pytest.raises(DataError, match=r"architectures\.2: transformer can .* give inner\.learning_rate"):
            check_tasks(half, ALL)
    check_methods(run, ALL)
    tuned = run_config(
        (COLOURS,), (TEXTS,), tasks={"architectures": KINDS}, inner=given, evaluation={"methods": ["s5_tuned"]}
    )
    with pytest.raises(ConfigError, match=r"architectures\.2 \(transformer\) .* no baseline can be tuned for it"):
        check_methods(tuned, ALL)


def small_module(shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Linear(shape.numeric, num_classes)


def two_classes_module(shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Linear(shape.numeric, 2)


def raising_module(shape: InputShape, num_classes: int) -> nn.Module:
    raise KeyError("width")


def batch_norm_module(shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(shape.numeric), nn.Linear(shape.numeric, num_classes))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (f"{__name__}:two_classes_module", r"was asked for 5 classes, and its module returns logits \[rows, 2\]"),
        (f"{__name__}:raising_module", r"raised KeyError: 'width' for InputShape\(numeric=12,"),
        (f"{__name__}:batch_norm_module", "BatchNorm's running statistics"),
        (f"{__name__}:no_module", "cannot be imported"),
    ],
)
def test_a_module_that_cannot_be_built_is_refused_before_any_work(factory: str, message: str) -> None:
    def run(factory: str) -> RunConfig:
        architectures = [*KINDS[:1], {"kind": "module", "factory": factory}]
        return run_config((SMALL, LARGE), (PICTURES,), tasks={"architectures": architectures})

    datasets = {dataset.name: dataset for dataset in (SMALL, LARGE, PICTURES)}
    check_tasks(run(f"{__name__}:small_module"), datasets)
    with pytest.raises(ConfigError, match=rf"^tasks\.architectures\.1\.factory: .*{message}"):
        check_tasks(run(factory), datasets)


def test_a_built_in_architecture_that_cannot_be_built_is_refused_before_any_work() -> None:
    conv = {"kind": "conv", "channels": [4, 4, 4, 4], "image_size": 4}
    run = run_config((PICTURES,), (COLOURS,), tasks={"architectures": [conv]})
    with pytest.raises(ConfigError, match=r"^tasks\.architectures\.0: architecture conv: after 2 entries"):
        check_tasks(run, {dataset.name: dataset for dataset in (PICTURES, COLOURS)})
