"""Paired differences between methods on the same tasks, with standard errors clustered by dataset.

Tasks of one dataset are not independent, and what we claim is about datasets never seen: so the dataset is the unit
of replication. Accuracies come in as fractions; everything that goes out is in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from scipy import stats

from palf_dist.evaluation.methods import REFERENCE

TASK_KEYS = ("dataset", "architecture", "noise_rate", "condition", "seed")
"""Columns that say which task a result belongs to: two methods are compared on equal keys only."""

CONDITIONS = ("balanced", "matched", "shifted")
"""Class frequencies of a task, in the order of the tables; see ``EvaluationConfig.conditions``."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its uncertainty, in points. ``se``, ``low`` and ``high`` are NaN with one cluster."""

    mean: float
    se: float
    low: float  # 95 % confidence interval, Student's t with clusters - 1 degrees of freedom
    high: float
    tasks: int
    clusters: int


@dataclass(frozen=True)
class Slice:
    """One method on some of the tasks: its mean accuracy there, and its paired difference to the reference."""

    accuracy: float
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """One method against the reference. Means are over the tasks where both have a finite accuracy; the other tasks
    are counted in ``missing`` (no row) and ``non_finite`` (NaN, inf or null)."""

    method: str
    overall: Slice
    by_noise: dict[float, Slice]
    by_condition: dict[str, Slice]
    by_cell: dict[tuple[str, float], Slice]  # (condition, noise rate)
    by_dataset: dict[str, Slice]  # here the standard error is over tasks: it speaks of this dataset only
    missing: int
    non_finite: int


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Mean of ``values`` [N] with its cluster-robust standard error; ``clusters`` [N] names each value's cluster.

    SE = sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / N for G clusters: the sandwich estimator of a mean with
    the usual small-sample factor. With one value per cluster it is the ordinary standard error.
    """
    values = np.asarray(values, dtype=np.float64)
    assert values.ndim == 1 and len(values) == len(clusters) and np.isfinite(values).all()
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(codes)
    mean = float(values.mean())
    if count == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, len(values), 1)
    sums = np.bincount([codes[cluster] for cluster in clusters], weights=values - mean)
    se = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values)
    half_width = float(stats.t.ppf(0.975, count - 1)) * se
    return Estimate(mean, se, mean - half_width, mean + half_width, len(values), count)


def compare(rows: pa.Table | Iterable[Mapping[str, Any]], reference: str = REFERENCE) -> list[Comparison]:
    """Every method against ``reference``, which comes first; the others by falling mean difference.

    ``rows`` holds one result per method and task: "method", the ``TASK_KEYS`` and "accuracy", a fraction in [0, 1].
    Other columns are ignored.
    """
    results = _index(rows.to_pylist() if isinstance(rows, pa.Table) else rows)
    assert reference in results, f"no results of the reference method {reference!r}"
    tasks = list(dict.fromkeys(task for accuracies in results.values() for task in accuracies))
    comparisons = [_compare(method, results[method], results[reference], tasks) for method in results]
    return sorted(comparisons, key=lambda item: (item.method != reference, -_or_lowest(item), item.method))


Task = tuple[str, int | str, float, str, int]  # the TASK_KEYS of a result


def _index(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[Task, float]]:
    """Accuracy in points of every method and task; NaN where it is null."""
    results: dict[str, dict[Task, float]] = {}
    for row in rows:
        # Rounded, so that a rate that went through float32 still meets its partner and prints as it was written.
        task = (row["dataset"], row["architecture"], round(row["noise_rate"], 6), row["condition"], row["seed"])
        accuracies = results.setdefault(row["method"], {})
        assert task not in accuracies, f"two results of {row['method']} for the task {task}"
        accuracies[task] = math.nan if row["accuracy"] is None else 100 * row["accuracy"]
    return results


def _compare(method: str, own: dict[Task, float], other: dict[Task, float], tasks: list[Task]) -> Comparison:
    both = [task for task in tasks if task in own and task in other]
    paired = [task for task in both if math.isfinite(own[task]) and math.isfinite(other[task])]

    def summary(chosen: list[Task], cluster: Callable[[Task], Hashable] = lambda task: task[0]) -> Slice:
        accuracy = float(np.mean([own[task] for task in chosen])) if chosen else math.nan
        differences = [own[task] - other[task] for task in chosen]
        return Slice(accuracy, clustered_mean(differences, [cluster(task) for task in chosen]))

    def split(key: Callable[[Task], Any]) -> dict[Any, list[Task]]:
        # The values come from all tasks, so that a slice with no paired task is there and says so.
        values = sorted({key(task) for task in tasks})
        return {value: [task for task in paired if key(task) == value] for value in values}

    def in_order(condition: str) -> int:
        return CONDITIONS.index(condition)

    by_condition = split(lambda task: task[3])
    return Comparison(
        method=method,
        overall=summary(paired),
        by_noise={rate: summary(chosen) for rate, chosen in split(lambda task: task[2]).items()},
        by_condition={name: summary(by_condition[name]) for name in sorted(by_condition, key=in_order)},
        by_cell={cell: summary(chosen) for cell, chosen in split(lambda task: (task[3], task[2])).items()},
        by_dataset={
            name: summary(chosen, cluster=lambda task: task) for name, chosen in split(lambda task: task[0]).items()
        },
        missing=len(tasks) - len(both),
        non_finite=len(both) - len(paired),
    )


def _or_lowest(comparison: Comparison) -> float:
    mean = comparison.overall.difference.mean
    return -math.inf if math.isnan(mean) else mean
