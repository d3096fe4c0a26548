"""Task families: which tasks there are, and how a group of them is built. Every draw depends on keys alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from palf_dist.config import Condition, DatasetSource, RunConfig, TasksConfig
from palf_dist.errors import ConfigError, DataError, PalfError
from palf_dist.inner_models import build_model
from palf_dist.randomness import random_generator
from palf_dist.tasks.corruptions import add_label_noise, class_transitions, draw_labels, instance_transitions
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.inputs import fits, group_shape, input_widths, read_features, read_inputs
from palf_dist.tasks.splits import SPLITS, TaskRows, draw_rows, imbalanced_capacity, num_task_classes, train_capacity
from palf_dist.types import Rows, TaskGroup, TaskSpec

Datasets = Mapping[str, EncodedDataset]


def sample_specs(config: RunConfig, datasets: Datasets, keys: tuple[int | str, ...], turn: int) -> tuple[TaskSpec, ...]:
    """One meta-training group: ``group_size`` tasks of one architecture and one optimiser, drawn from ``keys``. Where
    the families take turns (``tasks.families``), it is that of family number ``turn`` modulo their number.

    Raises DataError when no training dataset fits any architecture, or one has no two classes with enough rows.
    """
    tasks = config.tasks
    training = [datasets[source.name] for source in config.data.train]
    compatible = {
        index: [dataset for dataset in training if fits(architecture, dataset)]
        for index, architecture in enumerate(tasks.architectures)
    }
    if tasks.families == "in_turn":
        families = sorted({dataset.family for found in compatible.values() for dataset in found})
        turn_of = families[turn % len(families)] if families else None
        compatible = {index: [item for item in found if item.family == turn_of] for index, found in compatible.items()}
    usable = [index for index, found in compatible.items() if found]
    if not usable:
        raise _unreadable(config, config.data.train, datasets)
    group = random_generator(*keys, "group")
    architecture = int(group.choice(usable))
    optimiser = str(group.choice(tasks.optimisers))

    specs = []
    for index in range(tasks.group_size):
        generator = random_generator(*keys, index, "spec")
        dataset = compatible[architecture][generator.integers(len(compatible[architecture]))]
        noisy = generator.random() >= tasks.noise.clean_share
        imbalanced = generator.random() >= tasks.imbalance.balanced_share
        uniform = generator.random() < tasks.imbalance.uniform_target_share
        noise_rate = float(generator.uniform(tasks.noise.low, tasks.noise.high))
        ratio = _log_uniform(tasks.imbalance.low, tasks.imbalance.high, generator)
        specs.append(
            TaskSpec(
                keys=(*keys, index),
                dataset=dataset.name,
                train_size=_train_size(config, dataset, generator),
                noise_kind=tasks.noise.kind,
                noise_rate=noise_rate if noisy else 0.0,
                imbalance=ratio if imbalanced else 1.0,
                target_prior="uniform" if imbalanced and uniform else "train",
                architecture=architecture,
                optimiser=optimiser,
            )
        )
    return tuple(specs)


def whole_turns(config: RunConfig, groups: int) -> int:
    """At least so many groups; where families take turns, as many of each of the one, two or three that there are."""
    return groups if config.tasks.families == "mixed" else -(-groups // 6) * 6


def evaluation_specs(config: RunConfig, datasets: Datasets) -> list[tuple[TaskSpec, ...]]:
    """The held-out grid (dataset x noise rate x condition x seed, or dataset x condition of a suite x seed), each
    dataset in the first architecture that fits it, cut into groups of one architecture. The run's seed plays no part:
    every run is judged on the same tasks."""
    evaluation = config.evaluation
    by_architecture: dict[int, list[TaskSpec]] = {}

    def architecture_of(source: DatasetSource) -> int:
        fitting = (index for index, item in enumerate(config.tasks.architectures) if fits(item, datasets[source.name]))
        architecture = next(fitting, None)
        if architecture is None:
            raise _unreadable(config, (source,), datasets)
        return architecture

    optimiser = config.tasks.optimisers[0]
    for source, item, seed in product(config.data.held_out, evaluation.suite_conditions, range(evaluation.seeds)):
        architecture = architecture_of(source)
        suite_keys = ("evaluate", source.name, item.name, seed)
        spec = condition_task(item, datasets[source.name], config.tasks, suite_keys, architecture, optimiser)
        by_architecture.setdefault(architecture, []).append(spec)
    conditions = {"balanced": (1.0, "train"), "matched": (evaluation.imbalance, "train")}
    conditions["shifted"] = (evaluation.imbalance, "uniform")
    noise_rates = () if evaluation.suite_conditions else evaluation.noise_rates
    grid = product(config.data.held_out, noise_rates, evaluation.conditions, range(evaluation.seeds))
    for source, noise_rate, condition, seed in grid:
        dataset = datasets[source.name]
        architecture = architecture_of(source)
        keys = ("evaluate", source.name, f"{noise_rate:g}", condition, seed)
        imbalance, target_prior = conditions[condition]
        by_architecture.setdefault(architecture, []).append(
            TaskSpec(
                keys=keys,
                dataset=source.name,
                train_size=_train_size(config, dataset, random_generator(*keys, "spec")),
                noise_kind=config.tasks.noise.kind,
                noise_rate=noise_rate,
                imbalance=imbalance,
                target_prior=target_prior,
                architecture=architecture,
                optimiser=optimiser,
                condition=condition,
            )
        )
    size = config.tasks.group_size
    return [
        tuple(specs[start : start + size])
        for _, specs in sorted(by_architecture.items())
        for start in range(0, len(specs), size)
    ]


def condition_task(
    condition: Condition,
    dataset: EncodedDataset,
    tasks: TasksConfig,
    keys: tuple[int | str, ...],
    architecture: int,
    optimiser: str,
) -> TaskSpec:
    """The task that puts ``dataset`` in a condition. Raises DataError for a dataset without two classes to learn."""
    capacity, class_rows = train_capacity(dataset, tasks), 0
    if condition.imbalance > 1:
        capacity, class_rows = imbalanced_capacity(dataset, tasks, condition.imbalance)
    return TaskSpec(
        keys=keys,
        dataset=dataset.name,
        train_size=min(condition.train_size or capacity, capacity),
        noise_kind=condition.noise_kind,
        noise_rate=condition.noise_rate,
        imbalance=condition.imbalance,
        target_prior=condition.target_prior,
        architecture=architecture,
        optimiser=optimiser,
        condition=condition.name,
        class_rows=class_rows,
    )


def check_tasks(config: RunConfig, datasets: Datasets) -> None:
    """Refuse, before any work starts, what a unit would refuse later: raises DataError for an architecture that no
    training dataset fits although something is to be tuned for it, a held-out dataset that no architecture fits, or a
    dataset too small for the tasks, and ConfigError for an architecture that cannot be built."""
    judged = {(spec.dataset, spec.condition): spec for specs in evaluation_specs(config, datasets) for spec in specs}
    for spec in judged.values() if config.evaluation.suite_conditions else ():
        draw_rows(datasets[spec.dataset], spec, config.tasks)
    imbalance = max(config.tasks.imbalance.high, config.evaluation.imbalance)
    for dataset in datasets.values():
        size = _train_size(config, dataset, random_generator("check", dataset.name))
        for ratio, target_prior in ((1.0, "train"), (imbalance, "train"), (imbalance, "uniform")):
            spec = TaskSpec(("check",), dataset.name, size, "uniform", 0.0, ratio, target_prior, 0, "adam")
            draw_rows(dataset, spec, config.tasks)
    training = [datasets[source.name] for source in config.data.train]
    tuned = "tuned" in (config.inner.learning_rate, config.inner.weight_decay)
    for index, architecture in enumerate(config.tasks.architectures):
        readable = [dataset for dataset in training if fits(architecture, dataset)]
        if not readable and tuned:
            names = ", ".join(f"{dataset.name} ({dataset.family})" for dataset in training)
            raise DataError(
                f"tasks.architectures.{index}: {architecture.kind} can read none of the training datasets: {names}; "
                "add a dataset it reads, leave it out, or give inner.learning_rate and inner.weight_decay, for there "
                "is nothing to tune them on"
            )
        readable = readable or [item for item in datasets.values() if fits(architecture, item)]
        if not readable:  # it is never used
            continue
        try:
            build_model(architecture, group_shape(architecture, readable), max(map(num_task_classes, readable)))
        except PalfError as error:
            field = ".factory" if architecture.kind == "module" else ""
            raise ConfigError(f"tasks.architectures.{index}{field}: {error}") from error


def build_group(
    config: RunConfig,
    datasets: Datasets,
    specs: Sequence[TaskSpec],
    reference: Mapping[str, Mapping[str, float]],
    train_on_validation: bool = False,
) -> TaskGroup:
    """Build the tasks of ``specs``, all of one architecture and optimiser, side by side and padded to the widest.

    ``reference["architecture/optimiser"]`` holds the learning rate and weight decay. A task's rows, labels, noise and
    batches depend on its spec alone. Raises DataError when a dataset is too small for what a spec asks.

    ``train_on_validation``: the validation rows come after the training rows, with the labels that they have anyway;
    the validation split has its padding alone (a mask of 0).
    """
    (architecture_index, optimiser), *others = {(spec.architecture, spec.optimiser) for spec in specs}
    assert not others, "tasks of one group share architecture and optimiser"
    architecture = config.tasks.architectures[architecture_index]
    used = [datasets[spec.dataset] for spec in specs]
    shape = group_shape(architecture, used)
    num_classes = max(num_task_classes(dataset) for dataset in used)
    drawn = [draw_rows(dataset, spec, config.tasks) for dataset, spec in zip(used, specs, strict=True)]
    given = [_given_labels(*each) for each in zip(used, specs, drawn, strict=True)]
    if train_on_validation:
        for of_split in (*(task.rows for task in drawn), *given):
            of_split["train"] = np.concatenate([of_split["train"], of_split["validation"]])
    size = len(specs)

    lengths = {split: max(len(task.rows[split]) for task in drawn) for split in SPLITS}
    inputs: dict[str, list[np.ndarray]] = {
        split: [np.zeros((size, length, *width), kind) for width, kind in input_widths(shape)]
        for split, length in lengths.items()
    }
    labels = {split: np.zeros((size, length), np.int64) for split, length in lengths.items()}
    masks = {split: np.zeros((size, length), np.float32) for split, length in lengths.items()}
    clean_train_labels = np.zeros_like(labels["train"])
    batches = np.empty((config.inner.steps, size, config.inner.batch_size), np.int64)
    log_prior_ratio = np.zeros((size, num_classes), np.float32)

    for g, (dataset, spec, task) in enumerate(zip(used, specs, drawn, strict=True)):
        edges = np.cumsum([len(task.rows[split]) for split in SPLITS])[:-1]
        rows = np.concatenate([task.rows[split] for split in SPLITS])
        for position, values in enumerate(read_inputs(architecture, dataset, rows, first_train=edges[-1])):
            for split, part in zip(SPLITS, np.split(values, edges), strict=True):
                inputs[split][position][g][tuple(map(slice, part.shape))] = part
        for split in SPLITS:
            count = len(task.rows[split])
            masks[split][g, :count] = split != "validation" or not train_on_validation
            labels[split][g, :count] = given[g][split]
        count = len(task.rows["train"])
        clean_train_labels[g, :count] = task.labels[task.rows["train"]]
        batches[:, g] = epochs(count, *batches.shape[::2], random_generator(*spec.keys, "batches"))
        if spec.target_prior == "uniform":
            noisy_counts = np.bincount(labels["train"][g, :count], minlength=task.num_classes)
            prior = (noisy_counts + 1) / (count + task.num_classes)
            log_prior_ratio[g, : task.num_classes] = np.log(prior * task.num_classes)

    model = build_model(architecture, shape, num_classes)
    splits: dict[str, Any] = {
        split: Rows(tuple(map(torch.from_numpy, inputs[split])), *map(torch.from_numpy, (labels[split], masks[split])))
        for split in SPLITS
    }
    tuned = reference[f"{architecture_index}/{optimiser}"]
    return TaskGroup(
        specs=tuple(specs),
        model=model,
        theta0=model.init([random_generator(*spec.keys, "init") for spec in specs]),
        **splits,
        clean_train_labels=torch.from_numpy(clean_train_labels),
        batches=torch.from_numpy(batches),
        class_mask=torch.arange(num_classes) < torch.tensor([task.num_classes for task in drawn])[:, None],
        log_prior_ratio=torch.from_numpy(log_prior_ratio),
        learning_rate=torch.full((size, 1), tuned["learning_rate"]),
        weight_decay=torch.full((size, 1), tuned["weight_decay"]),
    )


def _given_labels(dataset: EncodedDataset, spec: TaskSpec, task: TaskRows) -> dict[str, np.ndarray]:
    """Labels of each split: training and validation rows have the same noise, the rest is clean."""
    labels = {split: task.labels[task.rows[split]] for split in SPLITS}
    noisy = ("validation", "train")
    transitions: dict[str, np.ndarray] = {}
    if spec.noise_kind in ("class_dependent", "instance_dependent"):
        joined = np.concatenate([labels[split] for split in noisy])
        generator = random_generator(*spec.keys, "noise")
        if spec.noise_kind == "class_dependent":
            by_row = class_transitions(joined, spec.noise_rate, task.num_classes, generator)[joined]
        else:
            features = read_features(dataset, np.concatenate([task.rows[split] for split in noisy]))
            by_row = instance_transitions(joined, features, spec.noise_rate, task.num_classes, generator)
        transitions = dict(zip(noisy, np.split(by_row, [len(labels["validation"])]), strict=True))
    for split in noisy:
        generator = random_generator(*spec.keys, "noise", split)
        if transitions:
            labels[split] = draw_labels(transitions[split], generator)
        else:
            kind, rate = spec.noise_kind, spec.noise_rate
            labels[split] = add_label_noise(labels[split], kind, rate, task.num_classes, generator)
    return labels


def epochs(count: int, steps: int, batch_size: int, generator: np.random.Generator) -> np.ndarray:
    """Row indices [steps, batch_size]: epoch after epoch, each a permutation of all rows."""
    epochs = math.ceil(steps * batch_size / count)
    order = generator.permuted(np.tile(np.arange(count), (epochs, 1)), axis=1)
    return order.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


def _train_size(config: RunConfig, dataset: EncodedDataset, generator: np.random.Generator) -> int:
    """Log-uniform between the two sizes of ``tasks.train_size``, the larger being lowered to what the dataset allows;
    the smaller one is not (``draw_rows`` refuses it when it is too large)."""
    low, high = config.tasks.train_size
    return round(_log_uniform(low, max(low, min(high, train_capacity(dataset, config.tasks))), generator))


def _log_uniform(low: float, high: float, generator: np.random.Generator) -> float:
    return float(np.exp(generator.uniform(math.log(low), math.log(high))))


def _unreadable(config: RunConfig, sources: Sequence[DatasetSource], datasets: Datasets) -> DataError:
    families = sorted({f"{source.name} ({datasets[source.name].family})" for source in sources})
    kinds = ", ".join(architecture.kind for architecture in config.tasks.architectures)
    return DataError(
        f"no architecture of tasks.architectures ({kinds}) can read {', '.join(families)}: mlp reads tables and "
        "images, with words also texts; conv and resnet read images, transformer texts"
    )
