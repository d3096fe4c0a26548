"""Which rows of a dataset a task trains and is judged on. Every row belongs to one split, so that none can leak."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palf_dist.config import TasksConfig
from palf_dist.errors import DataError
from palf_dist.randomness import random_generator
from palf_dist.tasks.corruptions import imbalance_profile
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import TaskSpec

TEST_SHARE = 0.3
META_VALIDATION_SHARE = 0.15
"""Shares of a dataset's rows that test and meta-validation may use at most; validation and training share the rest in
the proportion of ``tasks.validation_share``. A split that wants fewer rows takes fewer; one that wants more shrinks."""

MIN_CLASS_ROWS = 8
"""Classes with fewer rows are left out of a dataset's tasks: they could not be in every split."""

RAREST = 5
"""Training rows that the rarest class of an imbalanced task of a suite has, where the dataset allows it."""

SPLITS = ("test", "meta_validation", "validation", "train")


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task: indices into its dataset by split, and the label that each dataset row has in the task."""

    rows: dict[str, np.ndarray]  # split -> [n] int64
    labels: np.ndarray  # [N of the dataset] int64, -1 where the class is left out
    num_classes: int
    target: np.ndarray  # [k] class frequencies of the test and meta-validation rows


def train_capacity(dataset: EncodedDataset, tasks: TasksConfig) -> int:
    """The most training rows that a task of this dataset can have. DataError where not even two classes have enough."""
    return int(_train_rows(dataset, tasks).sum())


def imbalanced_capacity(dataset: EncodedDataset, tasks: TasksConfig, ratio: float) -> tuple[int, int]:
    """The most training rows of a task with an imbalance of ``ratio``, and the rows that a class of it has at least
    (``TaskSpec.class_rows``): so many that the ratio is kept whichever class is drawn to be the most frequent one.

    A class stays in the task if, as the most frequent one, it leaves the rarest ``RAREST`` training rows; with
    fewer than two such classes the two largest stay. DataError as above, and where the rarest would have no row.
    """
    available = np.sort(_train_rows(dataset, tasks))[::-1]
    counts = np.sort(np.bincount(dataset.labels))[::-1]
    least = int(counts[max(2, (available >= RAREST * ratio).sum()) - 1])
    classes = int((counts >= least).sum())
    profile = imbalance_profile(classes, ratio, random_generator("any order"))
    size = int(available[classes - 1] / profile.max())
    if size * profile.min() < 1:
        raise DataError(
            f"{dataset.name}: an imbalance of {ratio:g} leaves the rarest class of a task no training row; lower the "
            "imbalance of the condition, or use a larger dataset"
        )
    return size, least


def _train_rows(dataset: EncodedDataset, tasks: TasksConfig) -> np.ndarray:
    """Rows [k] of each class that can be training rows."""
    classes = num_task_classes(dataset)
    if classes < 2:
        raise DataError(
            f"{dataset.name}: {classes} of its {len(dataset.class_names)} classes have {MIN_CLASS_ROWS} rows or more, "
            "and a task needs two; use a larger dataset, or join rare classes"
        )
    counts = np.bincount(dataset.labels)
    bounds = _bounds(counts[counts >= MIN_CLASS_ROWS], tasks)
    return bounds[:, 4] - bounds[:, 3]


def num_task_classes(dataset: EncodedDataset) -> int:
    """Number of classes k that a task of this dataset has."""
    return int((np.bincount(dataset.labels) >= MIN_CLASS_ROWS).sum())


def draw_rows(dataset: EncodedDataset, spec: TaskSpec, tasks: TasksConfig) -> TaskRows:
    """Draw the rows of one task: one keyed permutation, cut within each class at the same shares, so that the four
    splits are slices of it; each split then takes as many rows of each class as its class frequencies say.

    Class frequencies: training and validation follow the data, or with ``imbalance`` > 1 its exponential profile, as
    far as each class has rows; test and meta-validation follow those of training (``target_prior`` train) or are
    uniform, and shrink until the rarest class suffices. Raises DataError when the training rows asked for are not
    there, or a split would have one class only.
    """
    capacity = train_capacity(dataset, tasks)
    if spec.train_size > capacity:
        raise DataError(
            f"{dataset.name}: a training size of {spec.train_size} is larger than the data allows: of its "
            f"{dataset.rows} rows {capacity} can be training rows (the rest is for test, meta-validation and "
            "validation); lower tasks.train_size, or leave the dataset out"
        )
    generator = random_generator(*spec.keys, "rows")
    counts = np.bincount(dataset.labels)
    kept = np.flatnonzero(counts >= max(MIN_CLASS_ROWS, spec.class_rows))
    k = len(kept)
    lookup = np.full(len(counts), -1)
    lookup[kept] = np.arange(k)
    labels = lookup[dataset.labels]

    permutation = generator.permutation(dataset.rows)
    # int16: numpy sorts it by radix, in linear time
    by_class = permutation[np.argsort(labels[permutation].astype(np.int16), kind="stable")]
    starts = dataset.rows - counts[kept].sum() + np.cumsum(counts[kept]) - counts[kept]
    bounds = _bounds(counts[kept], tasks)
    available = np.diff(bounds, axis=1)  # [k, 4]

    natural = counts[kept] / counts[kept].sum()
    profile = imbalance_profile(k, spec.imbalance, generator) if spec.imbalance > 1 else natural
    training = np.minimum(spec.train_size * profile, available[:, 3])
    frequencies = training / training.sum() if spec.imbalance > 1 else natural
    target = frequencies if spec.target_prior == "train" else np.full(k, 1 / k)
    exact = spec.imbalance > 1 or spec.target_prior == "uniform"

    validation_size = max(2, round(tasks.validation_share * spec.train_size))
    expected = {
        "test": _reachable(tasks.test_size, target, available[:, 0], exact),
        "meta_validation": _reachable(tasks.meta_validation_size, target, available[:, 1], exact),
        "validation": np.minimum(validation_size * frequencies, available[:, 2]),
        "train": training,
    }
    rows = {}
    for index, split in enumerate(SPLITS):
        taken = _whole_numbers(expected[split], available[:, index], generator)
        if (taken > 0).sum() < 2:
            raise DataError(
                f"{dataset.name}: its {dataset.rows} rows give a task {taken.sum()} {split} rows, not enough for two "
                "classes; use a larger dataset, or larger splits (see the sizes and shares of the tasks section)"
            )
        first = starts + bounds[:, index]
        chosen = np.concatenate([by_class[start : start + count] for start, count in zip(first, taken, strict=True)])
        rows[split] = generator.permutation(chosen)
    return TaskRows(rows, labels, k, target)


def _bounds(counts: np.ndarray, tasks: TasksConfig) -> np.ndarray:
    """Where each class's rows are cut into the four splits: [k, 5] from 0 to the class's count."""
    rest = 1 - TEST_SHARE - META_VALIDATION_SHARE
    train = rest / (1 + tasks.validation_share)
    cuts = np.array([0, TEST_SHARE, TEST_SHARE + META_VALIDATION_SHARE, 1 - train, 1])
    return np.rint(cuts * counts[:, None]).astype(np.int64)


def _reachable(size: int, frequencies: np.ndarray, available: np.ndarray, exact: bool) -> np.ndarray:
    """Expected rows [k] of each class in at most ``size`` rows with these frequencies; ``exact``: fewer rows rather
    than other frequencies."""
    if exact:
        size = min(size, (available / frequencies).min())
    return np.minimum(size * frequencies, available)


def _whole_numbers(expected: np.ndarray, available: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Round expected rows to whole ones without bias (systematic sampling); a second class gets a row if need be."""
    order = generator.permutation(len(expected))
    edges = np.floor(np.cumsum(expected[order]) + generator.random()).astype(np.int64)
    counts = np.empty(len(expected), np.int64)
    counts[order] = np.diff(edges, prepend=0)
    counts = np.minimum(counts, available)
    if (counts > 0).sum() == 1 and counts.sum() > 1:
        largest = counts.argmax()
        second = np.where((counts == 0) & (available > 0), expected, -1.0).argmax()
        if counts[second] == 0 and available[second] > 0:
            counts[largest] -= 1
            counts[second] += 1
    return counts
