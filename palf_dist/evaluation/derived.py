"""What follows from the results of several methods on the same task: steps to the reference's accuracy, and the rows of
methods that pick a static loss for each task. Nothing of this is run; it is made from rows when they are reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose, isfinite
from typing import Any, TypeGuard

import numpy as np

from palf_dist.evaluation.methods import LEARNED, METHODS, POLICY, REFERENCE, Method
from palf_dist.evaluation.statistics import Comparison, Rows, Task, compare, compare_each, task_of, to_rows

Row = Mapping[str, Any]

NEAR = 0.95
"""Share of the reference's best accuracy that counts as nearly reached."""

BEST_STATIC, PICKED_STATIC = "best_static", "static_by_validation"


@dataclass(frozen=True)
class Pick:
    """A method that takes, on each task, the static loss that looks best by some score; of equals the mean."""

    name: str
    label: str
    note: str
    score: Callable[[Row, Sequence[Row]], float | None]
    """Of a static method's row, given all rows of that method in the task's cell: the tasks that differ in the seed
    alone. None where there is nothing to go by."""
    trains_all: bool = True  # it takes the training of all of them on the task itself


def _left_out(row: Row, cell: Sequence[Row]) -> float | None:
    scores = [other["accuracy"] for other in cell if other["seed"] != row["seed"] and _known(other["accuracy"])]
    return float(np.mean(scores)) if scores else None


PICKS: dict[str, Pick] = {
    pick.name: pick
    for pick in (
        Pick(
            "static_oracle",
            "oracle: static",
            "the static loss that is best on the task's own test rows: no method, but a bound on picking one",
            lambda row, cell: row["accuracy"],
        ),
        Pick(
            "static_oracle_left_out",
            "oracle, other seeds",
            "the static loss that is best on the test rows of the same dataset and condition under the other seeds: "
            "the oracle without the luck of the draw",
            _left_out,
        ),
        Pick(
            PICKED_STATIC,
            "picked static",
            "the static loss with the best final accuracy on the task's own validation rows, which are as noisy as the "
            "training rows; it costs the training of all",
            lambda row, cell: row.get("validation_accuracy"),
        ),
        Pick(
            BEST_STATIC,
            "best tuned static",
            "the static loss with the best mean accuracy on meta-training tasks, tuned where it is a tuned one, for "
            "all held-out tasks of an architecture and inner optimiser",
            lambda row, cell: row.get("tuning_accuracy"),
            trains_all=False,
        ),
    )
}
"""The methods derived from others, by name."""


DESCRIBED: dict[str, Method | Pick] = {**METHODS, **PICKS, **{method.name: method for method in LEARNED.values()}}
"""What has a label and a note, by the name that rows have."""


def held_out(rows: Rows) -> tuple[list[Comparison], list[Comparison]]:
    """What the results of a run say: every method, the ``PICKS`` among them, against the reference; and the
    meta-learned policy against each other one, where it was run."""
    completed = with_steps(to_rows(rows))
    completed += pick_rows(completed)
    chosen = _chosen(completed)
    compared = [replace(item, chosen=chosen.get(item.method, ())) for item in compare(completed)]
    judged = any(row["method"] == POLICY for row in completed)
    return compared, compare_each(completed, POLICY) if judged else []


def with_steps(rows: Iterable[Row], reference: str = REFERENCE) -> list[dict[str, Any]]:
    """The rows with ``steps_to_best`` and ``steps_to_95``: the first moment of the learning curve (``curve_steps``,
    ``curve_accuracy``) with the reference's best test accuracy on the same task, and with ``NEAR`` of it. Where it is
    never reached they are all the steps of the run, and ``reached_best`` or ``reached_95`` is 0 instead of 1.

    Rows without a curve, or without a reference that has one, stay as they are.
    """
    rows = list(rows)
    best = {
        task_of(row): max(row["curve_accuracy"])
        for row in rows
        if row["method"] == reference and row.get("curve_accuracy") is not None
    }
    completed = []
    for row in rows:
        changed, target = dict(row), best.get(task_of(row))
        if target is not None and row.get("curve_accuracy") is not None:
            for name, wanted in (("best", target), ("95", NEAR * target)):
                reached = [s for s, a in zip(row["curve_steps"], row["curve_accuracy"], strict=True) if a >= wanted]
                changed[f"steps_to_{name}"] = float(reached[0] if reached else row["curve_steps"][-1])
                changed[f"reached_{name}"] = float(bool(reached))
        completed.append(changed)
    return completed


def pick_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A row per pick and task, made of the rows of static losses that are trained to the end. None with fewer than two
    such methods, and none for a task where some of them lack an accuracy or the score."""
    static = [row for row in rows if _is_static(row["method"])]
    names = {row["method"] for row in static}
    if len(names) < 2:
        return []
    by_task: dict[Task, list[Row]] = {}
    by_cell: dict[tuple[Any, ...], list[Row]] = {}
    for row in static:
        by_task.setdefault(task_of(row), []).append(row)
        by_cell.setdefault((row["method"], *task_of(row)[:-1]), []).append(row)
    made = []
    for pick in PICKS.values():
        for candidates in by_task.values():
            usable = [row for row in candidates if _known(row["accuracy"])]
            scores = [pick.score(row, by_cell[row["method"], *task_of(row)[:-1]]) for row in usable]
            scored = [(score, row) for score, row in zip(scores, usable, strict=True) if _known(score)]
            if len(scored) == len(names):
                highest = max(score for score, _ in scored)
                best = [row for score, row in scored if isclose(score, highest)]
                made.append(_mean_row(pick.name, best, candidates if pick.trains_all else best[:1]))
    return made


def _is_static(method: str) -> bool:
    """Whether a method is a static loss, trained to the end as all are: a validation accuracy that a run was stopped or
    kept by is the largest of many looks, and says too much."""
    return method in METHODS and METHODS[method].is_static


def _mean_row(name: str, best: Sequence[Row], trained: Sequence[Row]) -> dict[str, Any]:
    """What the best rows of a task have in common, and the mean of what they have not; the time of all that had to be
    trained. ``picked``: which methods they are of."""
    row: dict[str, Any] = {**best[0], "method": name, "tuned": None, "picked": [each["method"] for each in best]}
    for column in best[0].keys() - {"method", "tuned"}:
        values = [each[column] for each in best]
        if any(value != values[0] for value in values):
            row[column] = None if any(value is None for value in values) else np.mean(values, axis=0).tolist()
    if "seconds" in row:
        row["seconds"] = sum(each["seconds"] for each in trained)
    return row


def _chosen(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """By method what tuning chose, as text: the hyper-parameters of a tuned static loss, or which one is the best; each
    once, with its architecture."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["method"] == BEST_STATIC:
            text = " or ".join(row["picked"])
        elif row.get("tuned"):
            text = ", ".join(f"{name} = {value:g}" for name, value in json.loads(row["tuned"]).items())
        else:
            continue
        found.setdefault(row["method"], {})[f"{text} ({row['architecture']})"] = None
    return {method: tuple(texts) for method, texts in found.items()}


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value)
