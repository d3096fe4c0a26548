"""The few figures that a set of results is quoted by: how far the policy is ahead, of what, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from palf_dist.config import NoiseKind, RunConfig
from palf_dist.evaluation.conditions import imbalanced
from palf_dist.evaluation.derived import BEST_STATIC, PICKED_STATIC, pick_rows
from palf_dist.evaluation.inference import Estimate
from palf_dist.evaluation.measures import MEASURES, Measure
from palf_dist.evaluation.methods import (
    CE_BY_VALIDATION,
    CE_TRAINVAL,
    LEARNED,
    METHODS,
    POLICY,
    REFERENCE,
    TRAINVAL,
    TRUE_LABELS,
)
from palf_dist.evaluation.statistics import Comparison, Task, clusters_of, compare, compare_each, task_of
from palf_dist.evaluation.table import label_of

HIGH_NOISE = 0.3
"""Noise rates from which on noise counts as high."""

UNSEEN_KINDS: tuple[NoiseKind, ...] = ("pair_flip", "class_dependent", "instance_dependent")
"""Kinds of label noise that a policy can be judged on without having met them in meta-training."""

OWN_SCHEDULE, LEARNED_SCHEDULE = "policy_schedule", LEARNED["schedule"].name
STATICS = (BEST_STATIC, LEARNED["constant"].name)
"""What can be the best static loss, chosen without a look at held-out rows."""

PAPER_STATICS = (REFERENCE, "focal", "label_smoothing")
STATIC_POOL = (*PAPER_STATICS, "s5_tuned")
"""What a static loss has to be chosen from, at least, for the choice to be a measure: the paper's, and the strongest
that we know."""

ADAPTIVE = ("curriculum", LEARNED["maml"].name, LEARNED_SCHEDULE)
"""What has to be among the adaptive baselines for the best of them to be a measure."""

Row = Mapping[str, Any]
Chosen = Callable[[Row], bool]


@dataclass(frozen=True)
class Figure:
    """One figure. Where it could not be measured ``value`` is None and ``meaning`` says why."""

    name: str
    meaning: str
    value: float | None = None
    estimate: Estimate | None = None  # a difference with its uncertainty
    of: str | None = None  # the method that the policy is compared with
    missing: tuple[str, ...] = ()  # methods without which "the best of" is no measure: a verdict takes them
    unit: str = "points"  # of the estimate
    clusters: int | None = None  # independent datasets behind a value that has no estimate
    upper: float | None = None  # end of the 95 % interval of a value that has no estimate


def headline(
    rows: Sequence[Row], compared: Sequence[Comparison], pairs: Sequence[Comparison], config: RunConfig
) -> dict[str, Figure]:
    """The figures that follow from the rows of runs of one configuration, by name; ``compared`` and ``pairs`` are what
    ``derived.held_out`` makes of ``rows``."""
    skewed = imbalanced(config.evaluation)
    there = {row["method"] for row in rows}
    no_static = tuple(name for name in STATIC_POOL if name not in there)

    def is_balanced(row: Row) -> bool:
        return _matched(row) and row["condition"] not in skewed

    def without_noise(row: Row) -> bool:
        return _matched(row) and row["noise_rate"] == 0

    overall = _against(pairs, REFERENCE, "diff_vs_tuned_ce", "all tasks")
    se = overall.estimate.se if overall.estimate else math.nan
    as_the_data = "tasks with the data's own class frequencies in training and test"
    figures = [
        overall,
        Figure("se_clustered", "its standard error, clustered by dataset", se)
        if math.isfinite(se)
        else Figure("se_clustered", "there is none with one independent dataset"),
        _against(
            pairs,
            CE_BY_VALIDATION,
            "diff_vs_ce_by_validation",
            "all tasks; its learning rate and L2 were tuned on each task's noisy validation rows",
        ),
        _trainval(rows),
        _slice(rows, "diff_matched_prior", "tasks with the class frequencies of training in the test", _matched),
        _slice(
            rows,
            "diff_at_no_noise",
            "tasks with no label noise added and the class frequencies of training in the test, of the conditions "
            + ", ".join(dict.fromkeys(row["condition"] for row in rows if without_noise(row))),
            without_noise,
        ),
        _slice(
            rows,
            "diff_at_high_noise",
            f"tasks with a rate of {HIGH_NOISE:g} or more of meta-training's kind of noise ({config.tasks.noise.kind}) "
            "and the class frequencies of training in the test",
            lambda row: (
                _matched(row)
                and task_of(row).noise_kind == config.tasks.noise.kind
                and round(row["noise_rate"], 6) >= HIGH_NOISE
            ),
        ),
        _slice(
            rows,
            "diff_shifted_prior",
            "balanced accuracy on tasks with imbalanced training and balanced test rows",
            lambda row: not _matched(row) and row["condition"] in skewed,
            measure=MEASURES["balanced_accuracy"],
        ),
        *(_unseen(rows, kind, config) for kind in UNSEEN_KINDS),
        _regained(rows),
        _best(pairs, "diff_vs_best_static", STATICS, (*STATICS, *no_static)),
        _best(
            _pairs_on(rows, lambda row: _matched(row) and row["condition"] in skewed, STATICS),
            "diff_vs_best_static_imbalanced",
            STATICS,
            (*STATICS, *no_static),
            " on tasks with equally imbalanced training and test rows",
        ),
        _against(pairs, OWN_SCHEDULE, "diff_vs_own_schedule", "its own controls, averaged over tasks"),
        _slice(rows, "diff_vs_own_schedule_balanced", as_the_data, is_balanced, OWN_SCHEDULE),
        _against(pairs, LEARNED_SCHEDULE, "diff_vs_learned_schedule", "a policy that reads t/T alone"),
        _slice(rows, "diff_vs_learned_schedule_balanced", as_the_data, is_balanced, LEARNED_SCHEDULE),
        _against(pairs, "policy_shuffled", "diff_vs_shuffled", "its own controls for another task"),
        replace(
            _against(
                pairs,
                PICKED_STATIC,
                "diff_vs_picked_static",
                "the static loss picked on each task's noisy validation rows",
            ),
            missing=no_static,
        ),
        replace(
            _against(pairs, "static_oracle", "diff_vs_oracle", "the static loss picked on each task's own test rows"),
            missing=no_static,
        ),
        _steps_ratio(compared),
        _mean_steps_ratio(rows),
    ]
    return {figure.name: figure for figure in figures}


def best_adaptive(pairs: Sequence[Comparison]) -> Figure:
    """Against the method that does best among those that change their weights on their own."""
    schedules = (name for name, method in METHODS.items() if method.schedule is not None)
    names = (*schedules, LEARNED_SCHEDULE, LEARNED["maml"].name)
    return _best(pairs, "diff_vs_best_adaptive", names, ADAPTIVE)


def _matched(row: Row) -> bool:
    return row["target_prior"] == "train"


def _unseen(rows: Sequence[Row], kind: NoiseKind, config: RunConfig) -> Figure:
    name, words = f"diff_unseen_noise_{kind}", kind.replace("_", "-")
    if config.tasks.noise.kind == kind:
        return Figure(name, f"meta-training has {words} noise, so it is not unseen")
    return _slice(
        rows,
        name,
        f"tasks with {words} noise, which meta-training has none of, and the class frequencies of training in the test",
        lambda row: _matched(row) and row.get("noise_kind") == kind and row["noise_rate"] > 0,
    )


def _regained(rows: Sequence[Row]) -> Figure:
    """How much of the room that label noise leaves is used: a gain can be no larger than what the noise costs, but for
    what is gained without noise, too."""
    name, methods = "noise_cost_regained", (REFERENCE, POLICY, TRUE_LABELS)
    noisy = [row for row in rows if row["method"] in methods and row["noise_rate"] > 0]
    if not noisy:
        return Figure(name, "there are no tasks with label noise")
    there = {row["method"] for row in noisy}
    if lacking := [label_of(method) for method in methods if method not in there]:
        return Figure(name, f"takes {' and '.join(lacking)}, which these runs do not have")
    gains = {item.method: item.overall.difference.mean for item in compare(noisy)}
    gain, cost = gains[POLICY], gains[TRUE_LABELS]
    if not math.isfinite(gain * cost):
        return Figure(name, "no task with label noise has a result of each of the three methods that it takes")
    if cost <= 0:
        return Figure(name, "label noise costs tuned CE nothing on these tasks")
    meaning = (
        "tasks with label noise: the gain over tuned CE, as a share of what CE gains there by the same rows' true "
        f"labels: {gain:+.2f} of {cost:+.2f} points"
    )
    return Figure(name, meaning, gain / cost, clusters=len(set(clusters_of(noisy).values())))


def _best(
    pairs: Sequence[Comparison], name: str, methods: Sequence[str], needed: Sequence[str], where: str = ""
) -> Figure:
    """Against the strongest of the methods on the held-out tasks; those of ``needed`` that are not there are its
    ``missing``, since the best of what is weak is no measure."""
    known = {
        item.reference: item
        for item in pairs
        if item.reference in methods and not math.isnan(item.overall.difference.mean)
    }
    if not known:
        return Figure(
            name, f"takes {', '.join(map(label_of, needed))}{where}, of which these runs have none to compare with"
        )
    best = min(known.values(), key=lambda item: item.overall.difference.mean)
    missing = tuple(method for method in needed if method not in known)
    words = f"the strongest of {', '.join(label_of(method) for method in methods if method in known)}{where}"
    return replace(_difference(name, words, best), missing=missing)


def _against(pairs: Sequence[Comparison], method: str, name: str, meaning: str) -> Figure:
    found = next((item for item in pairs if item.reference == method), None)
    if found is None:
        return Figure(name, f"takes the method {label_of(method)}, which these runs do not have")
    return _difference(name, meaning, found)


def _trainval(rows: Sequence[Row]) -> Figure:
    """Of those that train on the validation rows too, which is fair to neither where only one of them does."""
    name, methods = "diff_trainval", (TRAINVAL, CE_TRAINVAL)
    two = [row for row in rows if row["method"] in methods]
    if lacking := [label_of(method) for method in methods if method not in {row["method"] for row in two}]:
        return Figure(name, f"takes {' and '.join(lacking)}, which these runs do not have")
    (found,) = compare_each(two, TRAINVAL)
    return _difference(name, f"{label_of(TRAINVAL)}: all tasks, each trained on its validation rows too", found)


def _slice(
    rows: Sequence[Row],
    name: str,
    meaning: str,
    chosen: Chosen,
    method: str = REFERENCE,
    measure: Measure = MEASURES["accuracy"],
) -> Figure:
    """Against one method on some of the tasks."""
    if not any(row["method"] == POLICY and chosen(row) for row in rows):
        return Figure(name, f"there are none: {meaning}")
    return _against(_pairs_on(rows, chosen, (method,), measure), method, name, meaning)


def _pairs_on(
    rows: Sequence[Row], chosen: Chosen, methods: Sequence[str], measure: Measure = MEASURES["accuracy"]
) -> list[Comparison]:
    """The policy against each of these methods, as far as they are there, on some of the tasks."""
    some = [row for row in rows if chosen(row)]
    if BEST_STATIC in methods:
        some += pick_rows(some)
    two = [row for row in some if row["method"] in (POLICY, *methods)]
    return compare_each(two, POLICY, measure) if any(row["method"] == POLICY for row in two) else []


def _difference(name: str, meaning: str, item: Comparison) -> Figure:
    estimate = item.overall.difference
    if not estimate.tasks:
        return Figure(
            name, f"no task on which {label_of(item.method)} and {label_of(item.reference)} both have a result"
        )
    return Figure(name, meaning, estimate.mean, estimate, item.reference)


def _steps_ratio(compared: Sequence[Comparison]) -> Figure:
    name = "steps_to_ce_best_ratio"
    policy = next(item for item in compared if item.method == POLICY)
    steps = policy.others.get("steps_to_best")
    if steps is None or not steps.overall.difference.tasks:
        return Figure(name, "the rows of these runs have no learning curves")
    value, difference = steps.overall.value, steps.overall.difference
    if value == difference.mean:
        return Figure(name, "tuned CE is never better than before its first step")
    meaning = (
        "steps to the reference's best accuracy on the task, all steps where never reached, over the reference's own; "
        + reached_words(policy, "reached_best")
    )
    return Figure(name, meaning, value / (value - difference.mean), difference, REFERENCE, unit="inner steps")


def reached_words(item: Comparison, measure: str) -> str:
    """On which share of tasks a method, and the reference, got to an accuracy (``reached_best``, ``reached_95``)."""
    reached = item.others[measure].overall
    own, reference = reached.value, reached.value - reached.difference.mean
    return f"reached on {own:.0f} % of tasks, by {label_of(REFERENCE)} on {reference:.0f} %"


def _mean_steps_ratio(rows: Sequence[Row]) -> Figure:
    """By the curves of the mean accuracy: each task's own best is partly luck, which comes early in some runs."""
    name = "steps_to_ce_best_mean_ratio"
    curves: dict[str, dict[Task, Row]] = {POLICY: {}, REFERENCE: {}}
    for row in rows:
        if row["method"] in curves and row.get("curve_accuracy") is not None:
            curves[row["method"]][task_of(row)] = row
    tasks = curves[POLICY].keys() & curves[REFERENCE].keys()
    lengths = {tuple(curves[method][task]["curve_steps"]) for method in curves for task in tasks}
    if not tasks:
        return Figure(name, "the rows of these runs have no learning curves")
    if len(lengths) > 1:
        return Figure(name, "the learning curves of these runs have moments that differ")
    steps = lengths.pop()
    mean = {m: np.mean([curves[m][task]["curve_accuracy"] for task in sorted(tasks)], axis=0) for m in curves}
    best = int(np.argmax(mean[REFERENCE]))
    if best == 0:
        return Figure(name, "tuned CE is never better than before its first step")
    reached = np.flatnonzero(mean[POLICY] >= mean[REFERENCE][best])
    taken = steps[reached[0]] if len(reached) else steps[-1]
    meaning = (
        "steps to the best mean accuracy over all tasks that tuned CE has along the run, over its own: "
        f"{taken if len(reached) else f'never in {taken}'} of {steps[best]}"
    )
    rows_of_tasks = (curves[POLICY][task] for task in tasks)
    return Figure(name, meaning, taken / steps[best], clusters=len(set(clusters_of(rows_of_tasks).values())))
