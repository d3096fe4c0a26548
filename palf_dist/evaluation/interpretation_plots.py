"""The pictures of an interpretation: what the policy sets by kind of task, the phases of the run, and which state
features move the controls."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from palf_dist.evaluation.change_points import PAPER_PHASES, Phases
from palf_dist.evaluation.importance import Importance
from palf_dist.evaluation.inner_runs import WEIGHT
from palf_dist.evaluation.interpretation import ALL, Curve, Interpretation
from palf_dist.evaluation.interpretation_tables import percent, ranking, short_name
from palf_dist.evaluation.plots import (
    BASIS_COLOURS,
    BLACK,
    BLUE,
    FIGURE_STYLE,
    GREEN,
    GREY,
    HYPERPARAMETER_LABELS,
    NOISE_LEVELS,
    ORANGE,
    PURPLE,
    SKY,
    TITLE,
    VERMILION,
    to_png,
)

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
STYLES = ("-", "--", ":")
"""Looks of the curves of one panel: each colour in every style, 21 in all."""

NOISE_LOOKS = {name: (colour, style) for name, _, _, colour, style in NOISE_LEVELS}

FEW = 6
"""Curves in a panel up to which bands can be told apart."""


def pictures(item: Interpretation) -> dict[str, bytes]:
    """Those that there are as PNG, by name; ``report.CAPTIONS`` has what they show."""
    made = {}
    if item.curves:
        made["controls"] = to_png(plot_controls(item))
    if item.phases:
        made["phases"] = to_png(plot_phases(item))
    if item.importance is not None:
        made["importance"] = to_png(plot_importance(item.importance))
    return made


@matplotlib.rc_context(FIGURE_STYLE | {"figure.constrained_layout.use": False})  # it takes seconds with these panels
def plot_controls(item: Interpretation) -> Figure:
    """The mean of each control (rows) over the run, by family, noise and architecture (columns), with a band of one
    standard error to each side, clustered by dataset. Drawn as steps: what the policy says stands until its next
    refresh."""
    names, groupings = item.runs.names, {by: curves for by, curves in item.curves.items() if by != ALL}
    longest = max(len(curves) for curves in groupings.values())
    above, below = 0.55, 0.75 + 0.17 * longest  # inches for the titles, and for the legends
    figure = Figure(figsize=(9.5, 1.35 * len(names) + above + below))
    height = figure.get_figheight()
    places = {"left": 0.085, "right": 0.985, "top": 1 - above / height, "bottom": below / height}
    axes = figure.subplots(
        len(names),
        len(groupings),
        sharex=True,
        sharey="row",
        squeeze=False,
        gridspec_kw={**places, "hspace": 0.15, "wspace": 0.11},
    )
    for column, (by, curves) in enumerate(groupings.items()):
        for row in range(len(names)):
            _curves(axes[row, column], item.runs.times, curves, row)
        axes[0, column].set_title(f"by {by}")
        axes[-1, column].set_xlabel("% of the inner run")
        axes[-1, column].legend(loc="upper center", bbox_to_anchor=(0.5, -0.38), fontsize=8)
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(_label(name), fontsize=8)
        axes[row, 0].set_ylim(_limits([curve for curves in groupings.values() for curve in curves.values()], row))
    figure.align_ylabels(axes[:, 0])
    figure.suptitle("What the policy sets over inner time, mean over tasks", y=1 - 0.12 / height, va="top", **TITLE)
    return figure


def _curves(axis: Axes, times: np.ndarray, curves: Mapping[str, Curve], control: int) -> None:
    for at, _ in PAPER_PHASES[1:]:
        axis.axvline(100 * at, color=GREY, linewidth=0.8, linestyle=":")
    for index, (label, curve) in enumerate(curves.items()):
        colour, style = NOISE_LOOKS.get(label) or _look(index)
        mean, error = (_to_the_end(curve.array(of)[:, control]) for of in ("mean", "se"))
        x = 100 * np.append(times, 1.0)
        width, opacity = (1.6, 0.16) if len(curves) <= FEW else (1.0, 0.05)
        axis.step(x, mean, where="post", color=colour, linestyle=style, linewidth=width, label=_counted(label, curve))
        if curve.clusters > 1:
            axis.fill_between(x, mean - error, mean + error, step="post", color=colour, alpha=opacity, linewidth=0)
    axis.set(xlim=(0, 100), xticks=(0, 20, 40, 60, 80, 100))


def _counted(label: str, curve: Curve) -> str:
    counts = [
        f"{count} {noun}{'s' * (count > 1)}" for count, noun in ((curve.runs, "run"), (curve.clusters, "dataset"))
    ]
    return f"{label} ({', '.join(counts)})"


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]


def _to_the_end(values: np.ndarray) -> np.ndarray:
    """What is in force at the last refresh stays so to the end of the run."""
    return np.append(values, values[-1:])


def _limits(curves: list[Curve], control: int) -> tuple[float, float]:
    """Room for all means, and for bands as far as they are no wider than those lie apart: with two or three datasets
    they can be huge."""
    means, errors = (np.stack([curve.array(of)[:, control] for curve in curves]) for of in ("mean", "se"))
    room = max(float(np.ptp(means)), 0.02)
    arms = np.minimum(np.nan_to_num(errors), room / 2) + 0.05 * room
    return float((means - arms).min()), float((means + arms).max())


def _label(control: str) -> str:
    if control.startswith(WEIGHT):
        return f"weight of\n{short_name(control).replace('_', ' ')}"
    return textwrap.fill(HYPERPARAMETER_LABELS[control], 17)


@matplotlib.rc_context(FIGURE_STYLE)
def plot_phases(item: Interpretation) -> Figure:
    """The mean of each control over the run, from its own mean and in its spread over tasks and time; the two change
    points with their 95 % intervals, and the paper's. All tasks, then each family."""
    panels: Mapping[str, Curve] = {ALL: item.curves[ALL][ALL], **item.curves["family"]}
    if len(panels) == 2:  # a single family is all there is
        panels = item.curves[ALL]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 2.7 * rows + 1.1))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    looks = _control_looks(item.runs.names)
    for axis, (label, curve) in zip(axes, panels.items(), strict=False):
        _boundaries(axis, item.phases[label])
        mean = curve.array("mean")
        scaled = (mean - mean.mean(0)) / item.runs.spread
        for index in item.runs.independent:
            name, values = item.runs.names[index], scaled[:, index]
            x = 100 * np.append(item.runs.times, 1.0)
            colour, style = looks[name]
            axis.step(x, _to_the_end(values), where="post", color=colour, linestyle=style, linewidth=1.6, label=name)
        axis.set(xlim=(0, 100), xticks=(0, 20, 40, 60, 80, 100), title=_phase_title(label, item.phases[label]))
    for index, axis in enumerate(axes):
        axis.set_visible(index < len(panels))
        if index < len(panels) <= index + columns:
            axis.set_xlabel("% of the inner run")
            axis.tick_params(labelbottom=True)
    figure.supylabel("standard deviations from the run's mean", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, [short_name(name) for name in labels], loc="outside lower center", ncols=6)
    figure.suptitle("Phases of the run, by two change points of the mean controls", **TITLE)
    return figure


def _phase_title(label: str, phases: Phases) -> str:
    name = "all tasks" if label == ALL else label
    return (
        f"{name}: three phases explain {percent(phases.by_phases)},\n"
        f"a line with one bend {percent(phases.by_line)} ({phases.clusters} datasets)"
    )


def _boundaries(axis: Axes, phases: Phases) -> None:
    for index, (at, (low, high)) in enumerate(zip(phases.boundaries, phases.intervals, strict=True)):
        if not math.isnan(low):
            axis.axvspan(
                100 * low, 100 * high, color="#dddddd", linewidth=0, label="95 % interval" if not index else None
            )
        axis.axvline(100 * at, color=GREY, linewidth=3, label="change point" if not index else None)
        paper = 100 * PAPER_PHASES[index][1]
        axis.axvline(paper, color=BLACK, linewidth=1, linestyle=":", label="the paper's" if not index else None)


def _control_looks(names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Mixture weights as in the picture of the mixture; hyper-parameters dashed, in the other colours first."""
    weights = {name: BASIS_COLOURS[short_name(name)] for name in names if name.startswith(WEIGHT)}
    colours = sorted(COLOURS, key=lambda colour: colour in weights.values())
    others = [name for name in names if name not in weights]
    return {name: (colour, "-") for name, colour in weights.items()} | {
        name: (colours[index % len(colours)], STYLES[1 + index // len(colours)]) for index, name in enumerate(others)
    }


@matplotlib.rc_context(FIGURE_STYLE)
def plot_importance(importance: Importance) -> Figure:
    """Permutation importance of each feature (rows) for each control (columns): among tasks, and along the run."""
    order = ranking(importance)
    values = [draws.mean(0)[order] for draws in (importance.among, importance.along)]
    highest = max(float(each.max()) for each in values)
    figure = Figure(figsize=(max(6.5, 3.2 + 1.05 * len(importance.controls)), 1.9 + 0.3 * len(order)))
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("the value of another task,\nat the same inner step", "the value of the same task,\nat another refresh")
    for axis, shares, title in zip(axes, values, titles, strict=True):
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for (row, column), value in np.ndenumerate(shares):
            colour = "white" if value > 0.6 * highest else BLACK
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(title)
        axis.set_xticks(range(len(importance.controls)), importance.controls, rotation=90)
        axis.grid(visible=False)
    axes[0].set_yticks(range(len(order)), [importance.features[index].replace("_", " ") for index in order])
    figure.colorbar(image, ax=axes, label="mean |change| of the control\n(standard deviations of it)")
    figure.suptitle("Permutation importance of the state features for each control", **TITLE)
    return figure
