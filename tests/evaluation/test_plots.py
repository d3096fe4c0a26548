"""The pictures show the numbers they were given, stay inside their panels and need no display."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from palf_dist.evaluation.methods import METHODS
from palf_dist.evaluation.plots import plot_alpha, plot_held_out, plot_noise, plot_outer_loss, to_png
from palf_dist.evaluation.statistics import compare
from palf_dist.types import BASIS_LOSSES, DEFAULT_HYPERPARAMETERS
from tests.evaluation.synthetic import TRAINING, few_rows, metrics_table, result_rows, trajectory


@pytest.fixture(scope="module")
def comparisons():
    return compare(result_rows())


@pytest.fixture(scope="module")
def trajectories():
    return pa.concat_tables([trajectory(step) for step in (98, 99)])


def visible(figure: Figure):
    return [axis for axis in figure.get_axes() if axis.get_visible()]


def areas(axis):
    """Upper and lower edge of every stacked area at its first and last inner step."""
    return [area.get_paths()[0].vertices for area in axis.collections]


def test_png_has_150_dots_per_inch():
    png = to_png(Figure(figsize=(2, 1)))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (300, 150)


def test_alpha_areas_fill_the_simplex_and_hold_the_means(trajectories):
    axes = visible(plot_alpha(trajectories))
    assert len(axes) == 4 * 3 + 4  # four datasets by three noise levels, and e, la, ew, wd
    for axis in axes[:12]:
        assert len(axis.collections) == len(BASIS_LOSSES)
        assert max(vertices[:, 1].max() for vertices in areas(axis)) == pytest.approx(1, abs=1e-5)
    shown = trajectories.filter((pc.field("dataset") == "breast_cancer") & (pc.field("noise_rate") > 0.3))
    last = shown.filter(pc.field("inner_step") == 140)["alpha_ce"].to_numpy()
    edge = areas(axes[2])[0]
    assert axes[0].get_ylabel() == "breast cancer" and axes[2].get_title() == "noise above 0.3"
    assert edge[edge[:, 0] == 140, 1].max() == pytest.approx(last.mean(), abs=1e-5)


def test_alpha_leaves_out_what_the_policy_does_not_move():
    two = pa.concat_tables([trajectory(step, basis=("ce", "robust_ce")) for step in (98, 99)])
    for name, value in DEFAULT_HYPERPARAMETERS.items():
        constant = pa.array([value] * two.num_rows, pa.float32())
        two = two.set_column(two.column_names.index(name), two.schema.field(name), constant)
    figure = plot_alpha(two)
    assert len(visible(figure)) == 12
    assert all(len(axis.collections) == 2 for axis in visible(figure))


def test_alpha_says_what_is_not_there(trajectories):
    clean = trajectories.filter(pc.field("noise_rate") == 0)
    broken = clean["alpha_ce"].to_numpy().copy()
    broken[:7] = np.nan
    index = clean.column_names.index("alpha_ce")
    figure = plot_alpha(clean.set_column(index, clean.schema.field("alpha_ce"), pa.array(broken)))
    texts = [text.get_text() for axis in figure.get_axes() for text in axis.texts]
    assert texts == ["no such task"] * (2 * min(4, len(set(clean["dataset"].to_pylist()))))
    assert f"7 of {clean.num_rows} rows are not finite" in figure.subfigs[0].get_suptitle()


def test_alpha_of_a_single_inner_step_and_of_a_run_that_diverged(trajectories):
    start = trajectories.filter(pc.field("inner_step") == 0)
    assert len(visible(plot_alpha(start))) == 12 + 2  # e and ew still differ between tasks at inner step 0
    index = start.column_names.index("e")
    diverged = start.set_column(index, start.schema.field("e"), pa.array([math.nan] * start.num_rows, pa.float32()))
    assert [text.get_text() for text in plot_alpha(diverged).texts] == [
        f"none of {start.num_rows} trajectory rows is finite"
    ]


def test_alpha_counts_the_datasets_it_leaves_out(trajectories):
    assert f"(4 of {len(TRAINING)} datasets)" in plot_alpha(trajectories).subfigs[0].get_suptitle()


def test_outer_loss_marks_the_best_selection_score():
    table = metrics_table()
    loss_axis, score_axis = visible(plot_outer_loss(table))
    assert loss_axis.lines[0].get_ydata() == pytest.approx(table["outer_loss"].to_numpy())
    scores = dict(zip(table["outer_step"].to_pylist(), table["selection_score"].to_pylist(), strict=True))
    scores = {step: 100 * score for step, score in scores.items() if score is not None}
    best = max(scores, key=scores.__getitem__)
    assert score_axis.lines[0].get_xdata().tolist() == list(scores)
    assert score_axis.lines[1].get_xdata().tolist() == [best]
    assert len(loss_axis.lines[1].get_ydata()) == table.num_rows
    assert np.median(loss_axis.lines[0].get_ydata()[-10:]) == loss_axis.lines[1].get_ydata()[-1]


def test_outer_loss_without_a_score_has_one_panel_and_bears_refused_steps():
    table = metrics_table(6).select(["outer_step", "outer_loss"])
    refused = table.set_column(1, "outer_loss", pa.array([math.nan] * 2 + table["outer_loss"].to_pylist()[2:]))
    assert len(visible(plot_outer_loss(refused))) == 1


def test_held_out_points_are_the_differences(comparisons):
    figure = plot_held_out(comparisons)
    axes = visible(figure)
    assert len(axes) == 4
    names = [text.get_text() for text in axes[0].get_yticklabels()]
    assert names == [METHODS[item.method].label for item in comparisons[1:]]
    points = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes[3].lines[1:]}
    expected = {row: item.by_condition["shifted"].difference for row, item in enumerate(comparisons[1:])}
    off_scale = [row for row, estimate in expected.items() if row not in points]
    assert [comparisons[1 + row].method for row in off_scale] == ["info_nce"]
    assert points == {row: estimate.mean for row, estimate in expected.items() if row not in off_scale}
    assert f"{expected[off_scale[0]].mean:+.1f}" in axes[3].texts[0].get_text()
    low, high = axes[0].get_xlim()
    assert low < 0 < high < 20  # the failed method does not squeeze the others


def test_noise_shows_the_policy_and_the_best_others_with_their_intervals(comparisons):
    figure = plot_noise(comparisons)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == METHODS["policy"].label and METHODS["s5"].label in labels and len(labels) == 5
    hidden = ("ce", "ce_true_labels")  # the reference, and an oracle; nor is the policy in another use a baseline
    best = [item for item in comparisons if item.method not in hidden and not item.method.startswith("policy")]
    assert labels[1:] == [METHODS[item.method].label for item in best[:4]]
    policy = next(item for item in comparisons if item.method == "policy")
    line, _, (bars,) = visible(figure)[0].containers[0].lines
    estimates = [part.difference for part in policy.by_noise.values()]
    assert line.get_ydata().tolist() == [estimate.mean for estimate in estimates]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[estimate.low, estimate.high] for estimate in estimates]))


def test_many_conditions_wrap_and_each_row_of_panels_names_the_methods():
    rows = [row | {"condition": f"c{index}"} for index in range(5) for row in few_rows() if row["noise_rate"] == 0]
    figure = plot_held_out(compare(rows))
    axes = visible(figure)
    assert len(axes) == 6 and figure.get_figwidth() == pytest.approx(2.6 + 4 * 2.5)
    figure.draw_without_rendering()
    named = [axis for axis in axes if any(text.get_visible() and text.get_text() for text in axis.get_yticklabels())]
    lefts = [axis.get_position().x0 for axis in (axes[0], axes[4])]
    assert [axis.get_title() for axis in named] == [axes[0].get_title(), axes[4].get_title()]
    assert lefts[0] == pytest.approx(lefts[1])


def test_kinds_of_noise_have_panels_of_their_own():
    rows = few_rows()
    flipped = [row | {"noise_kind": "pair_flip", "accuracy": 0.5} for row in rows if row["noise_rate"]]
    axes = visible(plot_noise(compare(rows + flipped)))
    assert [axis.get_title() for axis in axes] == ["uniform noise", "pair-flip noise"]
    policy = next(item for item in compare(rows) if item.method == "policy")
    alone = [part.difference.mean for part in policy.by_noise.values()]
    drawn = [axis.containers[0].lines[0].get_ydata().tolist() for axis in axes]
    assert drawn == [pytest.approx(alone), pytest.approx([alone[0], 0.0])]


def test_controls_are_none_of_the_best_others():
    rows = few_rows()
    control = [row | {"method": "policy_schedule", "accuracy": 0.99} for row in rows if row["method"] == "s5"]
    labels = [text.get_text() for text in plot_noise(compare(rows + control)).legends[0].get_texts()]
    assert labels == [METHODS[name].label for name in ("policy", "s5")]


@pytest.mark.parametrize("plot", [plot_held_out, plot_noise])
def test_small_and_broken_comparisons_are_drawn(plot):
    rows = result_rows(datasets=("iris",), noise_rates=(0.3,), conditions=("balanced",), seeds=1)
    rows = [{**row, "accuracy": math.nan} if row["method"] == "s5" else row for row in rows]
    assert to_png(plot(compare(rows)))


def test_no_text_overlaps_another_or_leaves_the_figure(comparisons, trajectories):
    for figure in (
        plot_alpha(trajectories),
        plot_outer_loss(metrics_table()),
        plot_held_out(comparisons),
        plot_noise(comparisons),
    ):
        figure.draw_without_rendering()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and (text.axes is None or text.axes.get_visible())
        ]
        titles = [(name, box) for name, box in boxes if len(name) > 6]
        assert len(titles) > 5
        for index, (name, box) in enumerate(titles):
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, name
            for other, other_box in titles[:index]:
                assert not box.overlaps(other_box), f"{name!r} and {other!r}"
