"""The pictures of what a policy does in which state: its controls along each feature that it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from palf_dist.evaluation.interpretation_plots import COLOURS, STYLES
from palf_dist.evaluation.plots import BASIS_COLOURS, FIGURE_STYLE, HYPERPARAMETER_LABELS, TITLE, to_png
from palf_dist.explanation import Explanation
from palf_dist.types import BASIS_LOSSES

COLUMNS = 4


def pictures(item: Explanation) -> dict[str, bytes]:
    """PNG by name; none where the policy reads nothing."""
    weights = [name for name in item.controls if name in BASIS_LOSSES]
    others = [name for name in item.controls if name not in BASIS_LOSSES]
    made = {}
    if item.features:
        looks = {name: {"color": BASIS_COLOURS[name], "label": name} for name in weights}
        made["mixture_weights"] = to_png(_plot(item, "Mixture weights", looks, relative=False))
    if item.features and others:
        looks = {
            name: {"color": colour, "linestyle": style, "label": HYPERPARAMETER_LABELS[name]}
            for name, (style, colour) in zip(others, product(STYLES, COLOURS), strict=False)
        }
        made["hyperparameters"] = to_png(_plot(item, "Hyper-parameters, relative to the usual", looks, relative=True))
    return made


@matplotlib.rc_context(FIGURE_STYLE)
def _plot(item: Explanation, title: str, looks: Mapping[str, Mapping[str, Any]], relative: bool) -> Figure:
    """A panel for each feature, the others being at their usual values (dotted: its own)."""
    rows = math.ceil(len(item.features) / COLUMNS)
    figure = Figure(figsize=(10, 1.9 * rows + 1.0))
    axes = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
    for place, (axis, feature) in enumerate(zip(axes, item.features, strict=False)):
        for name, look in looks.items():
            column = item.controls.index(name)
            scale = item.usual[column] if relative else 1.0
            axis.plot(item.values[place], item.curves[place, :, column] / scale, **look)
        axis.axvline(item.usual_state[place], color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel(feature)
        if relative:
            axis.set_yscale("log", base=2)
        else:
            axis.set_ylim(-0.02, 1.02)
    for axis in axes[len(item.features) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    figure.suptitle(f"{title}, by each feature of the training state", **TITLE)
    return figure
