"""The anytime plot: how far from the best anyone found each method is, against what it has spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.tuneloss.methods import METHODS
from benchmarks.tuneloss.results import Curve
from palf_dist.evaluation.plots import BLACK, BLUE, FIGURE_STYLE, GREEN, ORANGE, PURPLE, SKY, TITLE, VERMILION

LOOKS = {
    "tuneloss_curvature_fly": (VERMILION, "-"),
    "tuneloss_curvature": (VERMILION, "--"),
    "tuneloss_adjoint_fly": (ORANGE, "-"),
    "tuneloss_adjoint": (ORANGE, "--"),
    "tuneloss_fly": (PURPLE, "-"),
    "tuneloss": (PURPLE, "--"),
    "hoag": (BLACK, "-."),
    "tpe": (BLUE, "-"),
    "gp": (SKY, "-"),
    "cma_es": (GREEN, "-"),
    "random": ("#777777", ":"),
}
"""Colour and line style; a dashed line is the same without the on-the-fly start."""

SMALLEST = 1e-3
"""Distances below it are drawn at it: zero has no place on a log scale."""
POINTS = 200


@matplotlib.rc_context(FIGURE_STYLE)
def plot_anytime(curves: Sequence[Curve], best: dict[tuple[str, int], float], title: str) -> Figure:
    """Median over cases of (best so far / best anyone found - 1) against trainings and against gradient evaluations.

    A line begins where most cases have a trained model, and ends with the budget of most of them.
    """
    figure = Figure(figsize=(10, 4.8))
    axes = figure.subplots(1, 2, sharey=True)
    _lines(axes[0], curves, best, lambda curve: np.arange(1, len(curve.errors) + 1))
    _lines(axes[1], curves, best, lambda curve: curve.costs)
    for axis, label in zip(axes, ("trainings", "gradient evaluations"), strict=True):
        axis.axhline(0.01, color=BLACK, linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set(ylabel="median distance to the best anyone found", ylim=(SMALLEST, None))
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    figure.suptitle(title, **TITLE)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _lines(
    axis: Axes,
    curves: Sequence[Curve],
    best: dict[tuple[str, int], float],
    spent: Callable[[Curve], np.ndarray],
) -> None:
    for method, (colour, style) in LOOKS.items():
        own = [curve for curve in curves if curve.method == method]
        if own:
            start = np.median([spent(curve)[0] for curve in own])
            end = np.median([spent(curve)[-1] for curve in own])
            places = np.geomspace(start, end, POINTS)
            distances = [_at(places, spent(curve), curve.errors / best[curve.case] - 1) for curve in own]
            median = np.maximum(np.median(distances, axis=0), SMALLEST)
            axis.step(places, median, where="post", color=colour, linestyle=style, label=METHODS[method].label)


def _at(places: np.ndarray, spent: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The last of ``values`` [n] that was reached with what is spent at each place; infinite before the first."""
    reached = np.searchsorted(spent, places * (1 + 1e-9), side="right")
    return np.concatenate([[np.inf], values])[reached]
