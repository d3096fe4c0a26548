"""The pictures of a run, drawn without a display: what the policy does over inner time, how meta-training went, and
what the policy is worth on held-out datasets. Colours are Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from palf_dist.evaluation.derived import PICKS
from palf_dist.evaluation.methods import REFERENCE, is_baseline
from palf_dist.evaluation.statistics import Comparison, Slice
from palf_dist.evaluation.table import Column, condition_columns, is_policy, label_of
from palf_dist.types import BASIS_LOSSES, HYPERPARAMETERS

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
)
GREY = "#999999"
BROWN = "#8C6D31"
BASIS_COLOURS = dict(
    zip(BASIS_LOSSES, (BLUE, SKY, GREEN, YELLOW, PURPLE, ORANGE, VERMILION, GREY, BLACK, BROWN), strict=True)
)
POLICY_COLOUR, OTHER_COLOUR = VERMILION, "#555555"

NOISE_LEVELS: tuple[tuple[str, float, float, str, str], ...] = (
    # name, smallest rate, largest rate, colour, line style
    ("no label noise", 0.0, 0.0, BLUE, "-"),
    ("noise up to 0.3", 0.0, 0.3, ORANGE, "--"),
    ("noise above 0.3", 0.3, 1.0, VERMILION, "-."),
)

CONDITION_TITLES = {
    "balanced": "balanced: as the data is",
    "matched": "matched: training and test imbalanced",
    "shifted": "shifted: only training imbalanced",
}

HYPERPARAMETER_LABELS = {
    "e": "e: assumed noise rate",
    "la": "la: logit adjustment",
    "ew": "ew: posterior weights",
    "wd": "wd: L2 multiplier",
    "gamma": "gamma: focal exponent",
    "eps": "eps: label smoothing",
    "a": "a: weight of CE",
    "b": "b: weight of reverse CE",
    "tau": "tau: temperature",
    "q": "q: exponent of generalised CE",
    "lam": "lam: early-learning term",
    "beta": "beta: given label of bootstrapping",
}

MAX_NAMES = 9
"""Basis losses that a line of the alpha figure's legend has room for."""

MAX_DATASETS = 4
"""Rows of the alpha figure; the datasets with the most tasks are shown."""

FAR_BELOW = -15.0
"""Points against the reference below which a method is off the scale of the plots (InfoNCE alone is near chance)."""

PANELS_IN_A_ROW = 4
"""Of the held-out comparison: the README shows it at the width of a page."""

WIDEST_ARM = 6.0
"""Points of an interval's half-width that the limits of a plot make room for: with few datasets it can be huge."""

LINE_LOOKS = ((BLUE, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"), (ORANGE, "v", (0, (5, 1))))
"""Colour, marker and line style of the methods beside the policy in the plot by noise."""

TITLE: dict[str, Any] = {"fontweight": "bold", "fontsize": 11}

FIGURE_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 150 dpi."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FIGURE_STYLE["savefig.dpi"])
    return buffer.getvalue()


@matplotlib.rc_context(FIGURE_STYLE)
def plot_alpha(trajectories: pa.Table) -> Figure:
    """Mixture weights over inner time as stacked areas, by dataset (rows) and label noise (columns); below them the
    loss hyper-parameters that the policy moves, as lines by label noise. Means over the tasks of ``trajectories``;
    drawn as steps, since the policy's choice stands until its next refresh."""
    data = {name: trajectories[name].to_numpy() for name in trajectories.column_names if _is_plotted(name)}
    finite = np.all([np.isfinite(column) for column in data.values() if column.dtype.kind == "f"], axis=0)
    if not finite.any():
        figure = Figure(figsize=(9, 1))
        figure.text(0.5, 0.5, f"none of {len(finite)} trajectory rows is finite", ha="center", va="center")
        return figure
    data = {name: column[finite] for name, column in data.items()}
    level = noise_level(data["noise_rate"])
    names, counts = np.unique(data["dataset"].astype(str), return_counts=True)
    datasets = sorted(names[np.argsort(-counts, kind="stable")][:MAX_DATASETS])
    basis = [name for name in BASIS_LOSSES if f"alpha_{name}" in data and data[f"alpha_{name}"].max() > 1e-3]
    moved = [name for name in HYPERPARAMETERS if name in data and np.ptp(data[name]) > 1e-4]

    line_columns = 2 if len(moved) in (2, 4) else 3
    line_rows = math.ceil(len(moved) / line_columns)
    heights = [1.4 * len(datasets) + 1.2] + ([1.9 * line_rows + 1.0] if moved else [])
    figure = Figure(figsize=(9, sum(heights)))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    first, last = data["inner_step"].min(), data["inner_step"].max()
    axes = parts[0].subplots(len(datasets), len(NOISE_LEVELS), sharex=True, sharey=True, squeeze=False)
    for row, dataset in enumerate(datasets):
        for column, (title, *_) in enumerate(NOISE_LEVELS):
            axis = axes[row, column]
            chosen = (data["dataset"] == dataset) & (level == column)
            if chosen.any():
                steps, means = _mean_over_tasks(data["inner_step"][chosen], [data[f"alpha_{k}"][chosen] for k in basis])
                areas = axis.stackplot(steps, means, colors=[BASIS_COLOURS[name] for name in basis], step="post")
                for area in areas:
                    area.set(edgecolor="white", linewidth=0.5)
            else:
                axis.text(0.5, 0.5, "no such task", transform=axis.transAxes, ha="center", va="center", color="#777777")
            axis.set(ylim=(0, 1), yticks=(0, 0.5, 1), xlim=(first, max(last, first + 1)))
            if row == 0:
                axis.set_title(title)
            if column == 0:
                axis.set_ylabel(textwrap.fill(dataset.replace("_", " "), 14))
    for axis in axes[-1]:
        axis.set_xlabel("inner step")
    title = "Mixture weights over inner time, mean over tasks"
    if len(datasets) < len(names):
        title += f" ({len(datasets)} of {len(names)} datasets)"
    if not finite.all():
        title += f"\n{(~finite).sum()} of {len(finite)} rows are not finite and left out"
    parts[0].suptitle(title, **TITLE)
    handles = [Patch(color=BASIS_COLOURS[name], label=name.replace("_", " ")) for name in basis]
    rows = math.ceil(len(basis) / MAX_NAMES) or 1
    parts[0].legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(basis) / rows))
    if moved:
        _plot_hyperparameters(parts[1], data, level, moved, (line_rows, line_columns))
    return figure


def _plot_hyperparameters(
    part: Any, data: dict[str, np.ndarray], level: np.ndarray, moved: list[str], shape: tuple[int, int]
) -> None:
    axes = part.subplots(*shape, sharex=True, squeeze=False).ravel()
    for axis, name in zip(axes, moved, strict=False):
        for index, (label, _, _, colour, style) in enumerate(NOISE_LEVELS):
            chosen = level == index
            if chosen.any():
                steps, (mean,) = _mean_over_tasks(data["inner_step"][chosen], [data[name][chosen]])
                axis.step(steps, mean, where="post", color=colour, linestyle=style, linewidth=1.8, label=label)
        axis.set_title(HYPERPARAMETER_LABELS[name])
    _finish_grid(axes, len(moved), shape[1], "inner step")
    part.suptitle("Loss hyper-parameters set by the policy, mean over the tasks of all datasets", **TITLE)
    part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NOISE_LEVELS))


@matplotlib.rc_context(FIGURE_STYLE)
def plot_outer_loss(metrics: pa.Table) -> Figure:
    """Outer loss of every outer step with its running median, and the selection score, in points, where it was taken.

    ``metrics`` is metrics.parquet: outer_step, outer_loss and, once there is one, selection_score, a fraction.
    """
    steps = metrics["outer_step"].to_numpy()
    loss = metrics["outer_loss"].to_numpy().astype(float)
    score = np.full(len(steps), np.nan)
    if "selection_score" in metrics.column_names:
        score = 100 * metrics["selection_score"].to_numpy().astype(float)
    scored = np.isfinite(score)

    figure = Figure(figsize=(8, 5.2 if scored.any() else 3))
    axes = figure.subplots(2 if scored.any() else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(steps, loss, color=SKY, linewidth=1, label="each outer step (other tasks every time)")
    window = max(3, len(steps) // 10)
    axes[0].plot(steps, _running_median(loss, window), color=BLUE, linewidth=2.2, label=f"median of {window} steps")
    axes[0].set(ylabel="outer loss", title="Outer loss on clean meta-validation rows (lower is better)")
    axes[0].legend(loc="best")
    if scored.any():
        best = np.flatnonzero(scored)[np.argmax(score[scored])]
        axes[1].plot(steps[scored], score[scored], color=GREEN, marker="o", linewidth=1.8)
        label = f"highest: after {steps[best] + 1} outer steps"
        axes[1].plot(steps[best], score[best], "*", color=VERMILION, markersize=14, label=label)
        axes[1].set(
            ylabel=f"points against {label_of(REFERENCE)}",
            title="Selection score on fresh training tasks (higher is better)",
        )
        axes[1].legend(loc="best")
    axes[-1].set_xlabel("outer step")
    return figure


@matplotlib.rc_context(FIGURE_STYLE)
def plot_held_out(comparisons: Sequence[Comparison]) -> Figure:
    """Difference of every method to tuned cross-entropy with its 95 % interval: all conditions, then each apart,
    ``PANELS_IN_A_ROW`` beside each other."""
    reference, *shown = comparisons
    assert reference.method == REFERENCE
    panels: list[Column] = [("all conditions", [item.overall for item in comparisons])]
    panels += [(CONDITION_TITLES.get(name, name), slices) for name, slices in condition_columns(comparisons)]
    limits = _limits([part for _, slices in panels for part in slices])
    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.6 + 2.5 * columns, 0.6 + rows * (1.0 + 0.32 * len(shown))))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    _finish_grid(axes, len(panels), columns, "")
    for axis, (title, (of_reference, *slices)) in zip(axes, panels, strict=False):
        axis.axvline(0, color=BLACK, linewidth=1)
        for row, (item, part) in enumerate(zip(shown, slices, strict=True)):
            _interval(axis, row, part, POLICY_COLOUR if is_policy(item.method) else OTHER_COLOUR, limits)
        title = title.replace(": ", "\n")
        axis.set(title=f"{title}\n({label_of(REFERENCE)}: {of_reference.value:.1f} %)", xlim=limits)
        axis.grid(axis="y", visible=False)
    axes[0].set(yticks=range(len(shown)), ylim=(len(shown) - 0.4, -0.6))
    for axis in axes[::columns]:
        axis.set_yticklabels([label_of(item.method) for item in shown])
        for tick, item in zip(axis.get_yticklabels(), shown, strict=True):
            if is_policy(item.method):
                tick.set(color=POLICY_COLOUR, fontweight="bold")
    figure.supxlabel(
        f"points of held-out accuracy against {label_of(REFERENCE)} (95 % interval clustered by dataset)", fontsize=9
    )
    return figure


def _interval(axis: Axes, row: int, part: Slice, colour: str, limits: tuple[float, float]) -> None:
    """A point with its interval; a mean beyond the limits is an arrow at the edge with its value."""
    estimate = part.difference
    if math.isnan(estimate.mean):
        axis.text(0, row, " no result", color=colour, va="center", fontsize=8)
    elif estimate.mean < limits[0]:
        axis.text(limits[0], row, f" ◂ {estimate.mean:+.1f}", color=colour, va="center", fontsize=8)
    else:
        if not math.isnan(estimate.se):
            axis.hlines(row, max(estimate.low, limits[0]), min(estimate.high, limits[1]), color=colour, linewidth=1.8)
        axis.plot(estimate.mean, row, "o", color=colour, markersize=5.5)


def _limits(parts: Sequence[Slice]) -> tuple[float, float]:
    """Limits that hold the intervals, but neither those of methods that fail outright nor all of a very wide one:
    they would squeeze the rest together."""
    near = [part.difference for part in parts if part.difference.mean > FAR_BELOW]
    arms = [(e.mean, 0.0 if math.isnan(e.se) else min(e.high - e.mean, WIDEST_ARM)) for e in near]
    low = min([mean - arm for mean, arm in arms], default=0.0)
    high = max([mean + arm for mean, arm in arms], default=0.0)
    margin = 0.05 * (high - low)
    return min(low, -1.0) - margin, max(high, 1.0) + margin


@matplotlib.rc_context(FIGURE_STYLE)
def plot_noise(comparisons: Sequence[Comparison]) -> Figure:
    """Difference to tuned cross-entropy by label noise, in each condition, for the policy and the best others; several
    kinds of noise have a panel each, over all conditions."""
    policies = [item for item in comparisons if is_policy(item.method)]
    hidden = {REFERENCE, *PICKS}
    others = [item for item in comparisons if item.method not in hidden and is_baseline(item.method)]
    shown = policies + others[: len(LINE_LOOKS)]
    noises = list(comparisons[0].by_noise)
    kinds = list(dict.fromkeys(noise.kind for noise in noises if noise.rate)) or [""]
    rates = sorted({noise.rate for noise in noises})
    panels = []
    for kind in kinds:
        own = [noise for noise in noises if noise.kind in ("", kind)]
        title = "all conditions" if len(kinds) == 1 else f"{kind.replace('_', '-')} noise"
        panels.append((title, own, [[item.by_noise[noise] for noise in own] for item in shown]))
    panels += [
        (CONDITION_TITLES.get(name, name), noises, [[item.by_cell[name, rate] for rate in rates] for item in shown])
        for name in (comparisons[0].by_condition if len(kinds) == 1 else ())
        if all((name, rate) in comparisons[0].by_cell for rate in rates)  # a suite's condition has a rate of its own
    ]
    figure = Figure(figsize=(9, 3.1 * math.ceil(len(panels) / 2) + 0.5))
    axes = figure.subplots(math.ceil(len(panels) / 2), 2, sharex=True, sharey=True, squeeze=False).ravel()
    limits = _limits([part for *_, lines in panels for line in lines for part in line])
    spread = 0.012 * (max(rates) - min(rates) or 1)
    for axis, (title, own, lines) in zip(axes, panels, strict=False):
        axis.axhline(0, color=BLACK, linewidth=1)
        for index, (item, line) in enumerate(zip(shown, lines, strict=True)):
            bold = is_policy(item.method)
            colour, marker, style = (POLICY_COLOUR, "o", "-") if bold else LINE_LOOKS[index - len(policies)]
            estimates = [part.difference for part in line]
            axis.errorbar(
                np.array([noise.rate for noise in own]) + spread * (index - (len(shown) - 1) / 2),
                [estimate.mean for estimate in estimates],
                np.nan_to_num([[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]),
                color=colour,
                marker=marker,
                linestyle=style,
                markersize=5,
                linewidth=2.2 if bold else 1.3,
                elinewidth=1,
                label=label_of(item.method),
            )
        axis.set(title=title, ylim=limits)
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    _finish_grid(axes, len(panels), 2, "label noise of the training rows")
    figure.supylabel(f"points against {label_of(REFERENCE)} (95 % interval)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown))
    return figure


def _finish_grid(axes: np.ndarray, used: int, columns: int, xlabel: str) -> None:
    """Hide the axes that are left over, and label the lowest of each column."""
    for index, axis in enumerate(axes):
        if index >= used:
            axis.set_visible(False)
        elif index + columns >= used:
            axis.set_xlabel(xlabel)
            axis.tick_params(labelbottom=True)


def _is_plotted(column: str) -> bool:
    return column in {"dataset", "noise_rate", "inner_step", *HYPERPARAMETERS} or column.startswith("alpha_")


def noise_level(rates: np.ndarray) -> np.ndarray:
    """Index into ``NOISE_LEVELS`` of each rate."""
    return np.searchsorted([high for _, _, high, _, _ in NOISE_LEVELS[:-1]], rates)


def _mean_over_tasks(inner_step: np.ndarray, columns: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The inner steps in order, and the mean of every column at each of them."""
    steps, index = np.unique(inner_step, return_inverse=True)
    counts = np.bincount(index)
    return steps, [np.bincount(index, weights=column) / counts for column in columns]


def _running_median(values: np.ndarray, window: int) -> np.ndarray:
    """Median of the finite ones of the last ``window`` values at every place (fewer at the start)."""
    recent = (values[max(0, stop - window) : stop] for stop in range(1, len(values) + 1))
    finite = (part[np.isfinite(part)] for part in recent)
    return np.array([np.median(part) if len(part) else np.nan for part in finite])
