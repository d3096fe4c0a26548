"""The pictures show the numbers they were given, stay legible with 4 to 20 curves, and need no display."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from palf_dist.evaluation.importance import Importance
from palf_dist.evaluation.interpretation import Interpretation, interpret
from palf_dist.evaluation.interpretation_plots import pictures, plot_controls, plot_importance, plot_phases
from palf_dist.evaluation.interpretation_tables import ranking
from palf_dist.evaluation.report import CAPTIONS
from palf_dist.randomness import random_generator
from palf_dist.types import CONTROLS
from tests.evaluation.recorded import by_noise, constant, facts, in_phases, played, run_config, time
from tests.evaluation.test_interpretation import CONTROLS as PLAYED
from tests.evaluation.test_interpretation import FEATURES, artefact


@pytest.fixture(scope="module")
def item() -> Interpretation:
    table = pa.concat_tables([played(step, PLAYED, FEATURES, noise=0.02) for step in range(3)])
    return interpret(table, run_config(), facts(), [artefact()])


@pytest.fixture(scope="module")
def crowded() -> Figure:
    """The controls of eighteen architectures."""
    controls = {name: in_phases for name in ("ce", "generalised_ce", "wd")} | {"lam": by_noise}
    table = played(0, controls, FEATURES, noise=0.03)
    place = table.column_names.index("architecture")
    table = table.set_column(place, table.schema.field("architecture"), table["task"].cast(pa.int32()))
    kinds = ", ".join(["{kind: mlp}"] * 18)
    return plot_controls(interpret(table, run_config(f"tasks.architectures=[{kinds}]"), facts(), [None]))


def visible(figure: Figure):
    return [axis for axis in figure.get_axes() if axis.get_visible()]


@pytest.mark.slow
def test_every_picture_has_a_caption_and_none_is_drawn_of_nothing(item: Interpretation) -> None:
    made = pictures(item)
    assert [*made] == ["controls", "phases", "importance"] and {*made} <= {*CAPTIONS}
    assert all(png.startswith(b"\x89PNG") for png in made.values())
    still = interpret(played(0, {"e": constant(0.3)}, {"time": time}), run_config(), facts(), [None])
    assert pictures(still) == {}


def test_controls_are_the_means_with_their_bands(item: Interpretation) -> None:
    axes = np.array(visible(plot_controls(item))).reshape(len(item.runs.names), 3)
    assert [axis.get_title() for axis in axes[0]] == ["by family", "by noise", "by architecture"]
    curve = item.curves["noise"]["noise above 0.3"]
    axis = axes[item.runs.names.index("wd"), 1]
    line = next(line for line in axis.lines if line.get_label().startswith("noise above"))
    assert line.get_label() == "noise above 0.3 (18 runs, 6 datasets)"
    assert line.get_ydata()[:-1] == pytest.approx(curve.array("mean")[:, 3]) and line.get_xdata()[-1] == 100
    band = axis.collections[2].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((curve.array("mean") + curve.array("se"))[:, 3].max())
    low, high = axis.get_ylim()
    assert low < curve.array("mean")[:, 3].min() and high > curve.array("mean")[:, 3].max()
    assert axes[1, 0].get_ylabel().replace("\n", " ") == "weight of robust ce"
    assert all(axis.get_xlabel() == "% of the inner run" for axis in axes[-1])


def test_phases_show_both_boundaries_and_those_of_the_paper(item: Interpretation) -> None:
    axes = visible(plot_phases(item))
    assert len(axes) == 4 and axes[0].get_title().startswith("all tasks: three phases explain 100 %,")
    places = [line.get_xdata()[0] for line in axes[0].lines if len({*line.get_xdata()}) == 1]
    assert places == pytest.approx([20, 20, 80, 80])
    (robust,) = (line for line in axes[0].lines if line.get_label() == "alpha_robust_ce")
    mean = item.curves["all"]["all"].array("mean")[:, 1]
    assert robust.get_ydata()[:-1] == pytest.approx((mean - mean.mean()) / item.runs.spread[1])


def test_importance_shows_the_means_the_most_important_first(item: Interpretation) -> None:
    found = item.importance
    figure = plot_importance(found)
    among, along, bar = visible(figure)
    for axis, draws in ((among, found.among), (along, found.along)):
        assert np.asarray(axis.images[0].get_array()) == pytest.approx(draws.mean(0)[ranking(found)])
    names = [text.get_text() for text in among.get_yticklabels()]
    assert names == [found.features[index].replace("_", " ") for index in ranking(found)]
    assert "standard deviations" in bar.get_ylabel()


def test_twenty_curves_look_different(crowded: Figure) -> None:
    lines = [line for line in visible(crowded)[2].lines if not line.get_label().startswith("_")]
    assert len(lines) == 18
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == 18


def many_features() -> Importance:
    draws = random_generator("draws").random((10, 19, 13))
    return Importance(tuple(f"feature_number_{index}" for index in range(19)), CONTROLS[:13], draws, draws, draws[0])


@pytest.mark.slow
def test_no_text_overlaps_another_or_leaves_the_figure(item: Interpretation, crowded: Figure) -> None:
    figures = [plot_controls(item), plot_phases(item), plot_importance(item.importance)]
    figures += [crowded, plot_importance(many_features())]
    for figure in figures:
        figure.draw_without_rendering()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and (text.axes is None or text.axes.get_visible())
        ]
        titles = [(name, box) for name, box in boxes if len(name) > 4]
        assert len(titles) > 5
        for index, (name, box) in enumerate(titles):
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, name
            assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, name
            for other, other_box in titles[:index]:
                assert not box.overlaps(other_box), f"{name!r} and {other!r}"
