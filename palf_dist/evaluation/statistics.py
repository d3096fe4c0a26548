"""Paired differences between methods on the same tasks, with standard errors clustered by dataset.

Tasks of one dataset are not independent, and what we claim is about datasets never seen: so the dataset is the unit
of replication; datasets that hold the same rows (their origin says so) are one. Results come in as the columns of a
row; what goes out is scaled as its measure says (``Measure.scale``: fractions in percentage points).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from palf_dist.evaluation.inference import Estimate, bootstrap_interval, clustered_mean, holm
from palf_dist.evaluation.measures import MEASURES, SECONDS, Measure
from palf_dist.evaluation.methods import REFERENCE, is_claimed

TASK_KEYS = ("dataset", "architecture", "noise_kind", "noise_rate", "condition", "seed")
"""Columns that say which task a result belongs to: two methods are compared on equal keys only."""

CONDITIONS = ("balanced", "matched", "shifted")
"""Class frequencies of a task, in the order of the tables (see ``EvaluationConfig.conditions``); the conditions of
a suite come after them, in the order in which the rows have them."""


class Task(NamedTuple):
    """The ``TASK_KEYS`` of a result."""

    dataset: str
    architecture: int | str
    noise_kind: str
    noise_rate: float
    condition: str
    seed: int


class Noise(NamedTuple):
    """What label noise was added to a task: no kind where there is none."""

    kind: str
    rate: float

    def __str__(self) -> str:
        """As columns are called: the rate alone, with the kind where it is not the usual one."""
        kind = "" if self.kind in ("", "uniform") else f"{self.kind.replace('_', '-')} "
        return f"{kind}{self.rate:g}"


Rows: TypeAlias = pa.Table | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Slice:
    """One method on some of the tasks: its mean there, and its paired difference to the reference."""

    value: float
    difference: Estimate


@dataclass(frozen=True)
class Tally:
    """Datasets on which a method is better, no different, or worse than the reference. A tie: the 95 % t interval of
    the mean difference over the dataset's own tasks holds zero; with a single task, a difference of zero."""

    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Comparison:
    """One method against a reference by one measure. Means are over the tasks where both have a finite value; the other
    tasks are counted in ``missing`` (no row) and ``non_finite`` (NaN, inf or null)."""

    method: str
    reference: str
    measure: Measure
    overall: Slice
    bootstrap: tuple[float, float]  # 95 % interval of the overall difference
    by_noise: dict[Noise, Slice]  # no noise first, then each kind in the order of the rows
    by_condition: dict[str, Slice]
    by_cell: dict[tuple[str, float], Slice]  # (condition, noise rate)
    by_dataset: dict[str, Slice]  # here the standard error is over tasks: it speaks of this dataset only
    by_dataset_cell: dict[tuple[str, float], dict[str, Slice]]  # the same within each (condition, noise rate)
    tally: Tally
    missing: int
    non_finite: int
    adjusted_p: float = math.nan  # of the overall difference, by Holm over all methods compared together
    others: Mapping[str, Comparison] = field(default_factory=dict)  # the same two by the other measures there are
    chosen: tuple[str, ...] = ()  # what was chosen for the method on meta-training tasks, see ``derived``

    @property
    def datasets(self) -> int:
        """Of how many datasets the overall mean is; ``overall.difference.clusters`` of them are independent."""
        return sum(part.difference.tasks > 0 for part in self.by_dataset.values())


def compare(rows: Rows, reference: str = REFERENCE, measure: Measure = MEASURES["accuracy"]) -> list[Comparison]:
    """Every method against ``reference``, which comes first; the others by falling gain.

    ``rows`` holds one result per method and task: "method", the ``TASK_KEYS``, "origin" (see ``clusters_of``) and the
    column of the measure (a fraction where its scale is 100). By accuracy, the comparisons by the other measures come
    with it where rows have them.
    """
    rows = to_rows(rows)
    compared = _compare_all(rows, reference, measure)
    if measure.name != "accuracy":
        return compared
    others: dict[str, dict[str, Comparison]] = {item.method: {} for item in compared}
    for other in (*MEASURES.values(), SECONDS):
        if other is not measure and any(row.get(other.name) is not None for row in rows):
            for item in _compare_all(rows, reference, other):
                others[item.method][other.name] = item
    return [replace(item, others=others[item.method]) for item in compared]


def compare_each(rows: Rows, method: str, measure: Measure = MEASURES["accuracy"]) -> list[Comparison]:
    """``method`` against each other method as the reference, by rising gain over it."""
    rows = to_rows(rows)
    results, tasks = _index(rows, measure)
    clusters = clusters_of(rows)
    assert method in results, f"no results of the method {method!r}"
    compared = [_compare(method, other, measure, results, tasks, clusters) for other in results if other != method]
    return _adjusted(sorted(compared, key=lambda item: (_gain(item, math.inf), item.reference)))


def to_rows(rows: Rows) -> list[Mapping[str, Any]]:
    """As a list of mappings."""
    return rows.to_pylist() if isinstance(rows, pa.Table) else list(rows)


def task_of(row: Mapping[str, Any]) -> Task:
    """The ``TASK_KEYS`` of a row."""
    # Rounded, so that a rate that went through float32 still meets its partner and prints as it was written.
    # Results of earlier versions have no kind of noise.
    kind, rate = row.get("noise_kind") or "uniform", round(row["noise_rate"], 6)
    return Task(row["dataset"], row["architecture"], kind, rate, row["condition"], row["seed"])


def noise_of(task: Task) -> Noise:
    return Noise(task.noise_kind if task.noise_rate else "", task.noise_rate)


def clusters_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The cluster of each dataset, for standard errors. Datasets that have a source in common are one; the sources are
    the words of a row's "origin" (``EncodedDataset.origin``), or the dataset itself where a row has none."""
    sources = {row["dataset"]: (row.get("origin") or "").split() or [row["dataset"]] for row in rows}
    cluster: dict[str, str] = {}  # of each source
    for dataset, own in sources.items():
        met = {cluster[source] for source in own if source in cluster}
        cluster = {source: dataset if name in met else name for source, name in cluster.items()}
        cluster |= dict.fromkeys(own, dataset)
    return {dataset: cluster[own[0]] for dataset, own in sources.items()}


Results = dict[str, dict[Task, float]]
"""The scaled value of every method and task; NaN where it is null."""


def _compare_all(rows: Sequence[Mapping[str, Any]], reference: str, measure: Measure) -> list[Comparison]:
    results, tasks = _index(rows, measure)
    assert reference in results, f"no results of the reference method {reference!r}"
    clusters = clusters_of(rows)
    compared = [_compare(method, reference, measure, results, tasks, clusters) for method in results]
    return _adjusted(
        sorted(compared, key=lambda item: (item.method != reference, -_gain(item, -math.inf), item.method))
    )


def _gain(item: Comparison, unknown: float) -> float:
    """The overall difference, positive where it is for the better."""
    mean = item.overall.difference.mean
    return unknown if math.isnan(mean) else mean * item.measure.sign


def _adjusted(compared: list[Comparison]) -> list[Comparison]:
    """With the p-values of all differences to another method corrected together; oracles and controls, which nobody
    would choose, make no claim and stay out of it."""
    others = {
        str(index): item
        for index, item in enumerate(compared)
        if item.method != item.reference and is_claimed(item.method) and is_claimed(item.reference)
    }
    adjusted = holm({index: item.overall.difference.p for index, item in others.items()})
    return [replace(item, adjusted_p=adjusted.get(str(index), math.nan)) for index, item in enumerate(compared)]


def _index(rows: Sequence[Mapping[str, Any]], measure: Measure) -> tuple[Results, list[Task]]:
    """Results, and all tasks in the order of the rows."""
    results: Results = {}
    for row in rows:
        task = task_of(row)
        values = results.setdefault(row["method"], {})
        assert task not in values, f"two results of {row['method']} for the task {task}"
        value = row.get(measure.name)
        values[task] = math.nan if value is None else measure.scale * value
    return results, list(dict.fromkeys(task for values in results.values() for task in values))


def _compare(
    method: str, reference: str, measure: Measure, results: Results, tasks: list[Task], clusters: Mapping[str, str]
) -> Comparison:
    own, other = results[method], results[reference]
    both = [task for task in tasks if task in own and task in other]
    paired = [task for task in both if math.isfinite(own[task]) and math.isfinite(other[task])]

    def cluster_of(task: Task) -> str:
        return clusters[task.dataset]

    def summary(chosen: list[Task], cluster: Callable[[Task], Hashable] = cluster_of) -> Slice:
        value = float(np.mean([own[task] for task in chosen])) if chosen else math.nan
        differences = [own[task] - other[task] for task in chosen]
        return Slice(value, clustered_mean(differences, [cluster(task) for task in chosen]))

    def split(key: Callable[[Task], Any]) -> dict[Any, list[Task]]:
        # The values come from all tasks, so that a slice with no paired task is there and says so.
        values = sorted({key(task) for task in tasks})
        return {value: [task for task in paired if key(task) == value] for value in values}

    order = [*CONDITIONS, *(task.condition for task in tasks)]
    by_condition = split(lambda task: task.condition)
    by_noise = split(noise_of)
    kinds = ["", *(task.noise_kind for task in tasks)]

    def noise_order(noise: Noise) -> tuple[int, float]:
        return kinds.index(noise.kind), noise.rate

    def own_summary(chosen: list[Task]) -> Slice:
        return summary(chosen, cluster=lambda task: task)

    by_dataset = {name: own_summary(chosen) for name, chosen in split(lambda task: task.dataset).items()}
    by_dataset_cell: dict[tuple[str, float], dict[str, Slice]] = {}
    for (cell, dataset), chosen in split(lambda task: ((task.condition, task.noise_rate), task.dataset)).items():
        by_dataset_cell.setdefault(cell, {})[dataset] = own_summary(chosen)
    return Comparison(
        method=method,
        reference=reference,
        measure=measure,
        overall=summary(paired),
        bootstrap=bootstrap_interval([own[task] - other[task] for task in paired], [*map(cluster_of, paired)]),
        by_noise={noise: summary(by_noise[noise]) for noise in sorted(by_noise, key=noise_order)},
        by_condition={name: summary(by_condition[name]) for name in sorted(by_condition, key=order.index)},
        by_cell={
            cell: summary(chosen) for cell, chosen in split(lambda task: (task.condition, task.noise_rate)).items()
        },
        by_dataset=by_dataset,
        by_dataset_cell=by_dataset_cell,
        tally=_tally([part.difference for part in by_dataset.values() if part.difference.tasks], measure),
        missing=len(tasks) - len(both),
        non_finite=len(both) - len(paired),
    )


def _tally(differences: Sequence[Estimate], measure: Measure) -> Tally:
    outcomes = [_outcome(difference) * measure.sign for difference in differences]
    return Tally(*(outcomes.count(outcome) for outcome in (1, 0, -1)))


def _outcome(difference: Estimate) -> int:
    """Whether the difference is above (1) or below (-1) zero, or neither (0)."""
    low, high = (difference.low, difference.high) if difference.tasks > 1 else (difference.mean, difference.mean)
    return (low > 0) - (high < 0)
