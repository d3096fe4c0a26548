"""The pictures of a search: the best answer so far against what it has cost, and which parameters gave which error."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from palf_dist.evaluation.plots import BLUE, FIGURE_STYLE, SKY, TITLE, VERMILION
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange
from palf_dist.search.trial import Parameters

SHOWN_SHARE = 0.9
"""Share of the errors that the scales of the pictures make room for: trials that fail badly would squeeze the rest."""

FAILED_COLOUR = "#999999"
COLOUR_MAP = "viridis"


@dataclass(frozen=True)
class Tried:
    """One trial as the parallel coordinates show it."""

    parameters: Parameters
    error: float  # the lowest that it has reported; NaN where none is finite


@matplotlib.rc_context(FIGURE_STYLE)
def plot_anytime(curve: pa.Table) -> Figure:
    """Best error so far, and the error of every report, against trainings and against seconds of the search.

    ``curve`` is anytime.parquet: trainings, seconds, error and best, in the order in which the reports came.
    """
    error, best = (curve[name].to_numpy().astype(float) for name in ("error", "best"))
    figure = Figure(figsize=(9, 3.6))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, label in zip(
        axes, ("trainings", "seconds"), ("trainings", "seconds of work on the search"), strict=True
    ):
        cost = curve[name].to_numpy().astype(float)
        axis.plot(cost, error, ".", color=SKY, markersize=4, alpha=0.7, label="each report")
        axis.step(cost, best, where="post", color=BLUE, linewidth=2.2, label="best so far")
        axis.set_xlabel(label)
        if np.isfinite(best).any():
            first = int(np.nanargmin(best))
            axis.plot(cost[first], best[first], "*", color=VERMILION, markersize=13, label=f"best: {best[first]:.4g}")
    low, high, above = _limits(error)
    margin = 0.05 * (high - low or abs(high) or 1.0)
    axes[0].set(ylabel="error", ylim=(low - margin, high + margin))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.set_xlim(left=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    title = "Best error so far (lower is better)"
    figure.suptitle(title + (f"; reports above the frame: {above}" if above else ""), **TITLE)
    return figure


@matplotlib.rc_context(FIGURE_STYLE)
def plot_parallel(space: Mapping[str, Domain], tried: Sequence[Tried], best: Tried | None) -> Figure:
    """Parallel coordinates: one axis a searched parameter, in log scale where it is searched so, and one for the error;
    one line a trial, coloured by its error, failed ones grey, ``best`` on top of them all with its values below."""
    finite = np.array([item.error for item in tried if math.isfinite(item.error)])
    low, high, above = _limits(finite if best is None else np.append(finite, best.error))
    norm = Normalize(low, high, clip=True)
    figure = Figure(figsize=(max(5.0, 2.2 + 1.35 * len(space)), 4.2))
    axis = figure.subplots()
    colours = matplotlib.colormaps[COLOUR_MAP]
    for item in sorted(tried, key=lambda item: -item.error if math.isfinite(item.error) else -math.inf):
        if math.isfinite(item.error):
            line: dict[str, Any] = {"color": colours(norm(item.error)), "alpha": 0.75, "linewidth": 1.3}
            axis.plot(_heights(space, item, norm), **line)
        else:
            axis.plot(_heights(space, item, norm)[:-1], color=FAILED_COLOUR, linestyle=":", linewidth=1, marker="x")
    if best is not None:
        axis.plot(_heights(space, best, norm), color=VERMILION, linewidth=2.6, marker="o", markersize=4, zorder=4)
    for index, (name, domain) in enumerate(space.items()):
        _scale(axis, index, name, _ticks(domain), None if best is None else _text(best.parameters[name]))
    ends = {float(norm(value)): f"{value:.4g}" for value in (low, (low + high) / 2, high)} if len(finite) else {}
    if above:
        ends[1.0] = f"\u2265 {high:.4g}"
    _scale(axis, len(space), "error", ends, None if best is None else f"{best.error:.4g}")
    last = len(space) + 0.03
    axis.imshow(
        np.linspace(0, 1, 256)[:, None], COLOUR_MAP, extent=(last, last + 0.07, 0, 1), origin="lower", aspect="auto"
    )
    axis.set(xlim=(-0.4, len(space) + 0.3), ylim=(-0.02, 1.02))
    axis.axis("off")
    handles = [Line2D([], [], color=VERMILION, linewidth=2.6, label="the best")] if best is not None else []
    if len(finite) < len(tried):
        failed = len(tried) - len(finite)
        handles.append(
            Line2D([], [], color=FAILED_COLOUR, linestyle=":", marker="x", label=f"without a finite error ({failed})")
        )
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    count = "1 trial" if len(tried) == 1 else f"{len(tried)} trials"
    figure.suptitle(f"{count}: parameters and error (lower is better)", **TITLE)
    return figure


def _limits(errors: np.ndarray) -> tuple[float, float, int]:
    """Ends of the scale for errors, and how many of them lie above it."""
    finite = errors[np.isfinite(errors)]
    if not len(finite):
        return 0.0, 1.0, 0
    low, high = float(finite.min()), float(np.quantile(finite, SHOWN_SHARE, method="higher"))
    return low, high, int((finite > high).sum())


def _heights(space: Mapping[str, Domain], item: Tried, norm: Normalize) -> list[float]:
    """Where the line of a trial crosses each axis, from 0 to 1."""
    return [*(_height(domain, item.parameters[name]) for name, domain in space.items()), float(norm(item.error))]


def _height(domain: Domain, value: Any) -> float:
    if isinstance(domain, Choice):
        return (domain.values.index(value) + 0.5) / len(domain.values)
    scale = math.log if isinstance(domain, LogRange) else float
    low, high = scale(domain.low), scale(domain.high)
    return min(max((scale(value) - low) / (high - low), 0.0), 1.0)


def _ticks(domain: Domain) -> dict[float, str]:
    """Height -> label: the ends of the domain and, in log scale, the decades between; of a choice all values."""
    if isinstance(domain, Choice):
        return {_height(domain, value): _text(value) for value in domain.values}
    inner: list[float]
    if isinstance(domain, LogRange):
        first, last = math.ceil(math.log10(domain.low)), math.floor(math.log10(domain.high))
        inner = [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
    elif isinstance(domain, IntegerRange):
        inner = [(domain.low + domain.high) // 2]
    else:
        inner = [(domain.low + domain.high) / 2]
    ends = {0.0: _text(domain.low), 1.0: _text(domain.high)}
    return {height: _text(value) for value in inner if 0.06 < (height := _height(domain, value)) < 0.94} | ends


def _scale(axis: Axes, index: int, name: str, ticks: Mapping[float, str], best: str | None) -> None:
    """One vertical axis with its ticks, its name above, and the best value below."""
    axis.axvline(index, 0, 1, color="#444444", linewidth=0.8, zorder=3)
    for height, text in ticks.items():
        axis.plot([index - 0.03, index], [height, height], color="#444444", linewidth=0.8, zorder=3)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        axis.text(index - 0.05, height, text, ha="right", va="center", fontsize=7.5, zorder=5, bbox=box)
    title = "\n".join(textwrap.fill(part, 15) for part in name.replace("_", " ").split("."))
    axis.annotate(title, (index, 1.02), (0, 6), textcoords="offset points", ha="center", va="bottom")
    if best is not None:
        below: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
        axis.annotate(best, (index, -0.02), (0, -6), color=VERMILION, fontweight="bold", **below)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
