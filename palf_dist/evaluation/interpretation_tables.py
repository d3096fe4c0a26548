"""The interpretation of a policy as tables, as JSON, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palf_dist.evaluation.change_points import PAPER_PHASES, RESAMPLES, Interval, Phases
from palf_dist.evaluation.importance import SEEDS, Importance
from palf_dist.evaluation.inner_runs import WEIGHT
from palf_dist.evaluation.interpretation import ALL, Curve, Interpretation
from palf_dist.evaluation.plots import HYPERPARAMETER_LABELS
from palf_dist.evaluation.table import NOTHING, Cells, markdown_notes, markdown_table, number

PHASE_NAMES = tuple(f"{100 * start:.0f}-{100 * stop:.0f} %" for start, stop in PAPER_PHASES)


@dataclass(frozen=True)
class TitledTable:
    title: str
    cells: Cells
    texts: int  # how many of the first columns are words
    notes: Sequence[str]


def tables(item: Interpretation) -> list[TitledTable]:
    """Those that there are, in the order to be read in."""
    found = []
    if item.curves:
        found.append(TitledTable("What the policy sets", _curve_cells(item), 2, _curve_notes(item)))
    if item.phases:
        found.append(TitledTable("Phases of the run", _phase_cells(item), 1, _phase_notes(item)))
    if item.importance is not None:
        title = "Which state features move the controls"
        found.append(TitledTable(title, _importance_cells(item.importance), 1, _importance_notes()))
    return found


def to_record(item: Interpretation) -> dict[str, Any]:
    """The key ``interpretation`` of results.json; what cannot be computed is None."""
    runs = item.runs
    return {
        "inner_runs": runs.count,
        "left_out": runs.left_out,
        "refreshes": len(runs.times),
        "spread": {name: number(value) for name, value in zip(runs.names, runs.spread, strict=True)},
        "controls": [
            {"by": by, "group": label, **_curve_record(curve, runs.names)}
            for by, curves in item.curves.items()
            for label, curve in curves.items()
        ],
        "phases": {label: _phase_record(phases) for label, phases in item.phases.items()},
        "importance": None if item.importance is None else _importance_record(item.importance),
        "not_measured": dict(item.not_measured),
    }


def section(item: Interpretation | None) -> list[str]:
    """The tables as parts of a Markdown page, or why there are none."""
    if item is None or not item.curves:
        reason = item.not_measured["curves"] if item else "these runs have no trajectories"
        return [f"Not measured: {reason}.\n"]
    parts = []
    for each in tables(item):
        parts += [f"{each.title}:\n", markdown_table(each.cells, texts=each.texts), markdown_notes(each.notes)]
    return parts


def in_words(phases: Phases) -> str:
    """Where the boundaries are, and whether it is fair to call it phases."""
    places = " and ".join(
        f"{percent(boundary)} ({_range(interval)})"
        for boundary, interval in zip(phases.boundaries, phases.intervals, strict=True)
    )
    return (
        f"boundaries at {places} of the run, resolved to {percent(phases.resolution)}; three phases explain "
        f"{percent(phases.by_phases)} of the variation over time, a line with one bend {percent(phases.by_line)} "
        f"(difference {_range(phases.ahead, '+')}); on datasets left out the third adds {_range(phases.third, '+')}"
    )


def ranking(importance: Importance) -> list[int]:
    """The features by how much they move the controls in both ways, the most first."""
    total = (importance.among + importance.along).mean((0, 2))
    return np.argsort(-total, kind="stable").tolist()


def short_name(control: str) -> str:
    return control.removeprefix(WEIGHT)


def percent(share: float, sign: str = "") -> str:
    return f"{round(100 * share):{sign}d} %"


def _range(interval: Interval, sign: str = "") -> str:
    if np.isnan(interval).any():
        return NOTHING
    low, high = interval
    return f"{round(100 * low):{sign}d} to {percent(high, sign)}"


def _curve_cells(item: Interpretation) -> Cells:
    rows = []
    for by, curves in item.curves.items():
        for label, curve in curves.items():
            controls = zip(*curve.phases, strict=True)
            cells = [" → ".join(NOTHING if each is None else f"{each.mean:.2f}" for each in own) for own in controls]
            rows.append([NOTHING if by == ALL else by, label, str(curve.runs), str(curve.clusters), *cells])
    return ["by", "group", "inner runs", "datasets", *map(short_name, item.runs.names)], rows


def _curve_notes(item: Interpretation) -> list[str]:
    notes = [
        "Means over inner runs of the last outer steps of meta-training, on its own datasets, in "
        f"{', '.join(PHASE_NAMES)} of the run, the phases of the paper. Mixture weights by the name of their basis "
        "loss. What the policy leaves where it is has no column. Groups differ in more than in what they are named "
        "for: what an architecture reads is of one family, say.",
    ]
    if named := [label for name, label in HYPERPARAMETER_LABELS.items() if name in item.runs.names]:
        notes.append(f"{'; '.join(named)}.")
    notes += [f"Not measured: {what} ({reason})." for what, reason in item.not_measured.items()]
    if item.runs.left_out:
        notes.append(f"{item.runs.left_out} inner runs are left out, as they are not whole or not finite.")
    return notes


def _phase_cells(item: Interpretation) -> Cells:
    header = ["of", "first boundary", "95 % interval", "second boundary", "95 % interval", "three phases explain"]
    header += ["a line with one bend", "difference", "95 % interval", "inner runs", "datasets"]
    rows = []
    for label, phases in item.phases.items():
        places = zip(phases.boundaries, phases.intervals, strict=True)
        cells = [cell for at, interval in places for cell in (percent(at), _range(interval))]
        cells += [percent(phases.by_phases), percent(phases.by_line)]
        cells += [percent(phases.by_phases - phases.by_line, "+"), _range(phases.ahead, "+")]
        rows.append([label, *cells, str(phases.runs), str(phases.clusters)])
    return header, rows


def _phase_notes(item: Interpretation) -> list[str]:
    resolution = next(iter(item.phases.values())).resolution
    return [
        "The two moments of the run at which three constants fit the mean of all controls best, each control in "
        "standard deviations over inner runs and refreshes (of two mixture weights one counts). The paper has 20 % and "
        f"80 %. The policy is asked every {percent(resolution)} of the run, and no boundary is known better than that.",
        f"Intervals: percentiles when datasets are drawn anew ({RESAMPLES} times), too narrow with few datasets.",
        "explain: share of the variation of that mean over the run. Two boundaries are found in any curve. A line with "
        "one bend has three numbers for each control and one place, three constants have as many and two places: where "
        "the line explains as much the controls change gradually, and there are no phases.",
    ]


def _importance_cells(importance: Importance) -> Cells:
    rows = []
    for index in ranking(importance):
        both = [importance.among[:, index], importance.along[:, index]]
        cells = [_with_deviation(draws.mean(1)) for draws in both]
        pairs = zip(*(draws.mean(0) for draws in both), strict=True)
        cells += [f"{among:.2f} / {along:.2f}" for among, along in pairs]
        rows.append([importance.features[index], *cells])
    return ["feature", "among tasks", "along the run", *importance.controls], rows


def _importance_notes() -> list[str]:
    return [
        "Mean absolute change of what the policy asks for, in standard deviations of each control over the recorded "
        "states, when it is given a feature's values of another task at the same inner steps (among tasks), or of "
        "the same task at other refreshes (along the run): the mean over the controls, then both for each control. "
        "Of two mixture weights one is there, as the other is its mirror.",
        f"Mean over {SEEDS} random permutations; in brackets the standard deviation from one permutation to another, "
        "which says nothing of other tasks or policies. Time is the same for all tasks, and what is known of a task "
        "beforehand the same along its run: 0 there by construction. Features that say the same share the importance.",
    ]


def _with_deviation(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ({values.std(ddof=1):.2f})".replace("(0.", "(.")


def _curve_record(curve: Curve, names: Sequence[str]) -> dict[str, Any]:
    means = {
        name: {
            phase: None if each is None else {"mean": number(each.mean), "se": number(each.se)}
            for phase, each in zip(PHASE_NAMES, own, strict=True)
        }
        for name, own in zip(names, zip(*curve.phases, strict=True), strict=True)
    }
    return {"inner_runs": curve.runs, "clusters": curve.clusters, "means": means}


def _phase_record(phases: Phases) -> dict[str, Any]:
    known = _ends(phases.ahead) is not None
    return {
        "boundaries": [number(boundary) for boundary in phases.boundaries],
        "ci95": [_ends(interval) for interval in phases.intervals],
        "paper": [stop for _, stop in PAPER_PHASES[:-1]],
        "paper_within": list(phases.agree) if known else None,
        "resolution": number(phases.resolution),
        "explained_by_three_phases": number(phases.by_phases),
        "explained_by_a_line_with_one_bend": number(phases.by_line),
        "difference_ci95": _ends(phases.ahead),
        "third_phase_on_left_out_ci95": _ends(phases.third),
        "inner_runs": phases.runs,
        "clusters": phases.clusters,
    }


def _ends(interval: Interval) -> list[float | None] | None:
    return None if np.isnan(interval).any() else [number(end) for end in interval]


def _importance_record(importance: Importance) -> dict[str, Any]:
    def measured(draws: np.ndarray) -> dict[str, Any]:
        """Of one feature [Q, C]: the mean over all controls, and each of them."""
        columns = {"mean": draws.mean(1), **dict(zip(importance.controls, draws.T, strict=True))}
        return {
            name: {"mean": number(float(values.mean())), "sd": number(float(values.std(ddof=1)))}
            for name, values in columns.items()
        }

    return {
        "permutations": SEEDS,
        "features": {
            importance.features[index]: {
                "among_tasks": measured(importance.among[:, index]),
                "along_the_run": measured(importance.along[:, index]),
            }
            for index in ranking(importance)
        },
    }
