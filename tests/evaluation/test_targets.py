"""Targets are judged by the figures alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from palf_dist.evaluation.headline import Figure
from palf_dist.evaluation.inference import clustered_mean
from palf_dist.evaluation.targets import TARGETS, judge_targets, target_cells

FAMILIES = ("image", "text", "tabular")


def gain(points: float, spread: float = 0.1, clusters: int = 6) -> Figure:
    scatter = [spread * (index - (clusters - 1) / 2) for index in range(clusters)]
    estimate = clustered_mean([points + each for each in scatter], range(clusters))
    return Figure("any", "of something", estimate.mean, estimate, "ce")


def judged(
    text: str, figure: Figure, families: Figure | None = None, held_out: tuple[str, ...] = FAMILIES
) -> dict[str, Any]:
    figures = {target.figure: figure for target in TARGETS}
    family_figures = {} if families is None else {name: families for name in figures}
    (entry,) = (each for each in judge_targets(figures, family_figures, held_out) if each["target"] == text)
    return entry


MEAN_STEPS = "steps to the best of tuned CE's mean accuracy"
AS_IS = "tuned CE, datasets as they are together"
STATIC, MATCHED = "the best tuned static loss", "tuned CE, matched prior"


@pytest.mark.parametrize(
    ("text", "figure", "verdict", "short_by"),
    [
        (MATCHED, gain(3.1), "reached", None),
        (MATCHED, gain(2.4), "missed", 0.6),
        (MATCHED, gain(3.1, spread=5.0), "reached", None),  # a mean is asked for
        (MATCHED, gain(9.0, clusters=4), "not measured", None),
        (MEAN_STEPS, Figure("any", "", 0.3, clusters=5), "reached", None),
        (MEAN_STEPS, Figure("any", "", 0.3, clusters=4), "not measured", None),
        (MATCHED, Figure("any", "there are none"), "not measured", None),
        (STATIC, gain(1.6), "reached", None),
        (STATIC, gain(1.49999), "reached", None),  # short by what is rounded away
        (STATIC, gain(1.6, spread=0.0), "not measured", None),  # no error to be significant by
        (STATIC, gain(1.6, spread=5.0), "missed", None),  # not significant
        (STATIC, gain(1.0), "missed", 0.5),
        ("shuffled states: clearly worse", gain(0.5, spread=5.0), "missed", None),
        ("shuffled states: clearly worse", gain(-1.0), "missed", 1.0),
        ("datasets as they are on which it is significantly below tuned CE", Figure("any", "", 0), "reached", None),
        ("datasets as they are on which it is significantly below tuned CE", Figure("any", "", 2), "missed", 2.0),
        (
            "datasets as they are on which it is significantly below tuned CE",
            Figure("any", "", 0, clusters=4),
            "not measured",
            None,
        ),
        (AS_IS, gain(-0.3), "missed", None),
        (AS_IS, gain(-0.3, spread=5.0), "reached", None),
        (AS_IS, gain(0.3), "reached", None),
        (
            "steps to tuned CE's best accuracy on each task, share of its own (no loss of final accuracy: above)",
            Figure("any", "", 0.39),
            "reached",
            None,
        ),
        (
            "steps to tuned CE's best accuracy on each task, share of its own (no loss of final accuracy: above)",
            Figure("any", "", 0.55),
            "missed",
            0.15,
        ),
    ],
)
def test_verdicts(text: str, figure: Figure, verdict: str, short_by: float | None) -> None:
    entry = judged(text, figure)
    assert entry["verdict"] == verdict and entry["short_by"] == (short_by and pytest.approx(short_by))


def test_the_mean_alone_is_not_significant_and_that_is_said() -> None:
    assert judged(STATIC, gain(1.6, spread=5.0))["measured"].endswith("; the 95 % interval holds zero")
    assert judged(MATCHED, gain(9.0, clusters=4))["measured"].endswith(
        "; 4 independent datasets, and a verdict takes 5"
    )


def test_the_best_of_what_is_weak_reaches_no_target() -> None:
    entry = judged(STATIC, replace(gain(9.0), missing=("s5_tuned", "learned_constant")))
    assert entry["verdict"] == "not measured" and entry["measured"].startswith("+9.00 (")
    assert entry["measured"].endswith("; a verdict takes S5, tuned, learned constants")


def test_families_have_figures_of_their_own() -> None:
    family = "tuned CE, families never seen"
    assert judged(family, gain(9.0))["measured"] == "nothing: no run that holds out a family"
    assert judged(family, gain(9.0), gain(1.0))["short_by"] == pytest.approx(1.0)
    two = judged(family, gain(9.0), gain(3.0), ("image", "text"))
    assert two["verdict"] == "not measured" and two["measured"].endswith("; a verdict takes tabular")
    assert judged(family, gain(9.0), gain(3.0))["verdict"] == "reached"


def test_the_table_and_the_record_have_every_target() -> None:
    """The issue's numbers, one by one."""
    entries = judge_targets({target.figure: gain(1.2) for target in TARGETS}, {}, ())
    assert json.loads(json.dumps(entries)) == entries
    header, cells = target_cells(entries)
    assert [row[0] for row in cells] == [target.text for target in TARGETS]
    assert all(len(row) == len(header) for row in cells)
    (matched,) = (row for row in cells if row[0] == MATCHED)
    assert matched[1:] == ["+3.0 or more", entries[1]["measured"], "missed by 1.8"]
    bounds = {target.figure: target.bound for target in TARGETS if not target.family}
    assert bounds == {
        "diff_more_tasks": 0.0,
        "falls_with_more_tasks": 0,
        "diff_vs_tuned_ce": 4.3,
        "diff_matched_prior": 3.0,
        "diff_at_high_noise": 4.5,
        "diff_at_no_noise": 0.0,
        "datasets_below_ce_as_is": 0,
        "diff_as_is": 0.0,
        "diff_shifted_prior": 5.0,
        "diff_unseen_noise_pair_flip": 3.0,
        "diff_unseen_noise_class_dependent": 3.0,
        "diff_unseen_noise_instance_dependent": 3.0,
        "diff_vs_best_static": 1.5,
        "diff_vs_own_schedule": 1.0,
        "diff_vs_own_schedule_balanced": 0.5,
        "diff_vs_learned_schedule": 1.0,
        "diff_vs_learned_schedule_balanced": 0.5,
        "diff_vs_shuffled": 0.0,
        "diff_vs_picked_static": 2.5,
        "diff_vs_oracle": 0.0,
        "steps_to_ce_best_ratio": 0.4,
        "steps_to_ce_best_mean_ratio": 0.4,
        "diff_architecture_transfer": 2.0,
        "diff_horizon_transfer": 2.0,
    }
