"""Methods of the held-out comparison that have other rows, other values or a shield: against runs of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palf_dist import preparation, rehearsal, units
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.errors import ConfigError
from palf_dist.evaluation.methods import KAPPA, METHODS, baseline_policy, check_methods
from palf_dist.group_work import final_accuracy, measure
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies import policy_spec
from palf_dist.randomness import random_generator
from palf_dist.rehearsal import Meter, Work, need
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import evaluation_specs
from palf_dist.types import Contribution, Unit
from tests import memory_cases

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"
GIVEN = ("inner.learning_rate=0.03", "inner.weight_decay=0.01")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def datasets() -> dict[str, EncodedDataset]:
    return load_all(load_config(SMOKE).data)


def config_of(*methods: str, overrides: tuple[str, ...] = GIVEN) -> RunConfig:
    settings = [f"evaluation.methods=[{','.join(methods)}]", "inner.steps=30", "evaluation.noise_rates=[0.0, 0.4]"]
    return load_config(SMOKE, [*settings, *overrides])


def contributions(config: RunConfig, datasets: dict[str, EncodedDataset]) -> list[Contribution]:
    """Of a policy that no training has made, which follows its state."""
    work = units.Runner(config, datasets)
    size = len(policy_spec(config.policy).features)
    prepared = preparation.reduce_tune(config, []) | {"feature_mean": [0.0] * size, "feature_std": [1.0] * size}
    phi = random_generator("phi").normal(size=units.initial_policy(config).size).astype(np.float32)
    return [work.run(unit, phi, 0, prepared) for unit in units.evaluate_units(config, datasets)]


def judged(config: RunConfig, datasets: dict[str, EncodedDataset]) -> dict[str, Rows]:
    """The rows of each method without their seconds."""
    found: dict[str, Rows] = {}
    for row in units.rows_of(contributions(config, datasets)):
        found.setdefault(row["method"], []).append({**row, "seconds": None})
    return found


def results(rows: Rows) -> Rows:
    return [{name: value for name, value in row.items() if name != "method"} for row in rows]


def test_the_pair_that_is_kept_is_the_best_of_a_run_of_its_own_each(datasets: dict[str, EncodedDataset]) -> None:
    """Whatever values the configuration gives to the others, and for each task by itself."""
    config = config_of("ce_by_validation")
    grid = config.inner.grids.adam
    alone = [
        judged(config_of("ce", overrides=(f"inner.learning_rate={rate}", f"inner.weight_decay={decay}")), datasets)
        for rate in grid.learning_rate
        for decay in grid.weight_decay
    ]
    got = judged(config, datasets)
    assert got["ce"] == judged(config_of("ce"), datasets)["ce"], "the reference is what it is without"
    kept = got["ce_by_validation"]
    assert len(kept) == len(got["ce"]) == 12 and got.keys() == {"ce", "ce_by_validation"}
    for task, row in enumerate(results(kept)):
        candidates = results([rows["ce"][task] for rows in alone])
        best = max(each["validation_accuracy"] for each in candidates)
        least = min(each["validation_loss"] for each in candidates if each["validation_accuracy"] == best)
        assert row == next(each for each in candidates if each["validation_loss"] == least)
    assert len({(row["learning_rate"], row["weight_decay"]) for row in kept}) > 1, "tasks differ in what suits them"


def test_of_equal_accuracies_the_lower_loss_is_kept_and_of_these_the_first() -> None:
    looks: list[tuple[float | None, float | None]] = [
        (0.5, 0.1),
        (0.7, 0.9),
        (0.7, None),  # diverged
        (0.7, 0.8),
        (0.7, 0.8),
        (None, None),
    ]
    made = [
        Contribution(
            Unit("evaluate", 0, group, f"{number}"),
            0,
            rows=[{"method": "a", "validation_accuracy": a, "validation_loss": b, "run": number}] * 2,
            seconds=2.0,
        )
        for group in range(2)
        for number, (a, b) in enumerate(looks)
    ]
    rows = units.rows_of(reversed(made))
    assert [row["run"] for row in rows] == [3] * 4, "one row for each task of both groups"
    assert {row["seconds"] for row in rows} == {6.0}, "of all that were trained"


def test_on_training_and_validation_rows_together(datasets: dict[str, EncodedDataset]) -> None:
    config = config_of("policy", "policy_trainval", "ce_trainval")
    check_methods(config, datasets)
    found = judged(config, datasets)
    work = units.Runner(config, datasets)
    specs = evaluation_specs(config, datasets)[0]
    reference = preparation.reduce_tune(config, [])["reference"]
    apart, together = work._build(specs, reference), work._build(specs, reference, True)
    assert together.train_sizes.tolist() == (apart.train_sizes + apart.validation.mask.sum(1)).tolist()
    loop = InnerLoop(together, baseline_policy(METHODS["ce"]), config.inner)
    want = final_accuracy(loop, torch.zeros(0))
    assert [row["accuracy"] for row in found["ce_trainval"][: len(specs)]] == want.tolist()
    for name in ("policy", "ce"):
        more = found[f"{name}_trainval"]
        assert {row["validation_accuracy"] for row in more} == {row["validation_loss"] for row in more} == {None}
        assert all(row["validation_accuracy"] is not None for row in found[name])
        assert [row["nll"] for row in more] != [row["nll"] for row in found[name]]
    assert found["policy"] == judged(config_of("policy"), datasets)["policy"]


def test_true_labels_are_what_noise_takes_and_nothing_else(datasets: dict[str, EncodedDataset]) -> None:
    config = config_of("ce_true_labels")
    found = judged(config, datasets)
    assert found["ce"] == judged(config_of("ce"), datasets)["ce"]
    for with_noise, without in zip(results(found["ce"]), results(found["ce_true_labels"]), strict=True):
        assert without["wrong_share"] == 0
        if with_noise["noise_rate"] == 0:
            assert with_noise == without
        else:
            assert with_noise["wrong_share"] > 0.2 and with_noise["nll"] != without["nll"]
    specs = evaluation_specs(config, datasets)[-1]
    group = units.Runner(config, datasets)._build(specs, preparation.reduce_tune(config, [])["reference"])
    assert {spec.noise_rate for spec in specs} == {0.4} and (group.train.labels != group.clean_train_labels).any()
    group.train.labels.copy_(group.clean_train_labels)
    alone = final_accuracy(InnerLoop(group, baseline_policy(METHODS["ce"]), config.inner), torch.zeros(0))
    assert [row["accuracy"] for row in found["ce_true_labels"][-group.size :]] == alone.tolist()


def test_weights_tuned_on_a_task_look_no_worse_there_than_those_that_the_search_begins_with(
    datasets: dict[str, EncodedDataset],
) -> None:
    config = config_of("tuneloss")
    found = judged(config, datasets)
    assert found["ce"] == judged(config_of("ce"), datasets)["ce"] and len(found["tuneloss"]) == len(found["ce"])
    work, reference = units.Runner(config, datasets), preparation.reduce_tune(config, [])["reference"]
    begun: list[tuple[float, float]] = []
    for specs in evaluation_specs(config, datasets):
        loop = InnerLoop(work._build(specs, reference), baseline_policy(METHODS["tuneloss"]), config.inner)
        seen = measure(loop, torch.zeros(0))
        begun += zip(seen["validation_accuracy"].tolist(), -seen["validation_loss"].round(5), strict=True)
    ended = [(row["validation_accuracy"], -round(row["validation_loss"], 5)) for row in found["tuneloss"]]
    assert all(end >= start for end, start in zip(ended, begun, strict=True))
    assert sum(end > start for end, start in zip(ended, begun, strict=True)) > len(begun) / 2


def test_a_shield_at_use_is_that_of_the_configuration(datasets: dict[str, EncodedDataset]) -> None:
    shielded = judged(config_of("policy", overrides=(*GIVEN, f"policy.shield={KAPPA}")), datasets)
    found = judged(config_of("policy", "policy_shielded"), datasets)
    assert results(found["policy_shielded"]) == results(shielded["policy"])
    assert max(row["shield_share"] for row in found["policy_shielded"]) > 0, "the case shows a difference"
    assert {row["shield_share"] for name in ("policy", "ce") for row in found[name]} == {None}
    without = judged(config_of("policy"), datasets)
    assert "shield_share" not in without["policy"][0]
    assert results(found["policy"]) == [row | {"shield_share": None} for row in results(without["policy"])]


@pytest.mark.parametrize(
    ("method", "override", "reason"),
    [
        ("policy_trainval", "policy.kind=maml", "a policy of policy.kind maml adapts by its loss on them"),
        (
            "policy_trainval",
            "policy.features=[time, validation_loss, loss, accuracy_gap]",
            r"policy\.features read them \(validation_loss, accuracy_gap\)",
        ),
        ("policy_shielded", "policy.basis=[robust_ce, focal]", r"policy\.basis leaves out \(robust_ce, focal\)"),
        ("policy_shielded", "policy.shield=0.3", r"was trained under one \(policy\.shield 0\.3\)"),
    ],
)
def test_a_policy_that_does_not_suit_is_refused(
    method: str, override: str, reason: str, datasets: dict[str, EncodedDataset]
) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluation\.methods: {method} .*{reason}; leave the method out$"):
        check_methods(config_of("policy", method, overrides=(override,)), datasets)
    check_methods(config_of("policy", "ce_trainval", "ce_by_validation", overrides=(override,)), datasets)
    other = {"policy_trainval": "policy_shielded", "policy_shielded": "policy_trainval"}[method]
    check_methods(config_of("policy", other, overrides=(override,)), datasets)


@pytest.mark.parametrize("method", ["ce", "ce_trainval", "tuneloss"])
def test_what_more_rows_take_of_memory_is_known(method: str) -> None:
    """Against the whole unit under the meter, which does not see the allocator's part."""
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    changes = {
        "evaluation": {"methods": (method,), "seeds": 5, "conditions": ("balanced",), "noise_rates": (0.0,)},
        "tasks": {"group_size": 5, "train_size": (1600, 1600)},
        "inner": {"steps": 20},
    }
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    config = config.model_copy(update=sections)
    runner = units.Runner(config, datasets)
    unit = next(unit for unit in units.evaluate_units(config, datasets) if f'"{method}"' in unit.settings)
    phi, prepared = units.initial_policy(config), memory_cases.prepared(config)
    runner.run(unit, phi, 0, prepared)
    with Meter() as meter:
        runner.run(unit, phi, 0, prepared)
    assert need(config, datasets, Work("evaluate", 0, "adam")).total(5) == pytest.approx(meter.peak, rel=0.05)


def test_the_rehearsal_of_memory_knows_the_shield() -> None:
    work = Work("evaluate", 0, "adam")
    for methods, shields in ((("policy", "policy_shielded"), {None, KAPPA}), (("policy_shielded",), {KAPPA})):
        found = rehearsal._policies(config_of(*methods), work)
        assert {policy.shield for policy in found if policy.num_parameters} == shields
