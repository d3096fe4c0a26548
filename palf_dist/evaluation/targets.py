"""What the results were meant to reach, and whether they did. The targets were set before these measurements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from palf_dist.config import Family
from palf_dist.evaluation.ablation_figures import FACTOR
from palf_dist.evaluation.headline import Figure
from palf_dist.evaluation.table import Cells, interval, label_of, number, signed
from palf_dist.evaluation.verdicts import FEWEST_CLUSTERS, NO_ERROR

SMALLEST_SHORTFALL = 0.00005
"""Below that ``short_by`` would be a zero, as figures are rounded."""


@dataclass(frozen=True)
class Target:
    """A mean that is to be reached: ``bound`` or more, where ``at_most`` or less."""

    text: str
    figure: str  # of the headline
    bound: float
    at_most: bool = False
    significant: bool = False  # the 95 % interval has to lie above zero besides
    harmless: bool = False  # instead of a bound: the 95 % interval must not lie below zero
    family: bool = False  # of the headline of the runs that hold out a family

    @property
    def wanted(self) -> str:
        if self.harmless:
            return "not significantly below 0"
        bound = f"at most {self.bound:g}" if self.at_most else f"{self.bound:+.1f} or more"
        return f"{bound}, significant" if self.significant else bound


TARGETS = (
    Target("tuned CE, all tasks: what a first implementation reached on other datasets", "diff_vs_tuned_ce", 4.3),
    Target("tuned CE, matched prior", "diff_matched_prior", 3.0),
    Target("tuned CE, matched prior, noise rates of .3 or more", "diff_at_high_noise", 4.5),
    Target("tuned CE, matched prior, no noise added", "diff_at_no_noise", 0.0),
    Target(
        "datasets as they are on which it is significantly below tuned CE", "datasets_below_ce_as_is", 0, at_most=True
    ),
    Target("tuned CE, datasets as they are together", "diff_as_is", 0.0, harmless=True),
    Target("tuned CE, shifted prior, balanced accuracy", "diff_shifted_prior", 5.0),
    Target("tuned CE, unseen noise: pair-flip", "diff_unseen_noise_pair_flip", 3.0),
    Target("tuned CE, unseen noise: class-dependent", "diff_unseen_noise_class_dependent", 3.0),
    Target("tuned CE, unseen noise: instance-dependent", "diff_unseen_noise_instance_dependent", 3.0),
    Target("the best tuned static loss", "diff_vs_best_static", 1.5, significant=True),
    Target("its own mean schedule", "diff_vs_own_schedule", 1.0),
    Target("its own mean schedule, balanced tasks", "diff_vs_own_schedule_balanced", 0.5),
    Target("a learned schedule", "diff_vs_learned_schedule", 1.0),
    Target("a learned schedule, balanced tasks", "diff_vs_learned_schedule_balanced", 0.5),
    Target("shuffled states: clearly worse", "diff_vs_shuffled", 0.0, significant=True),
    Target("the static loss picked by noisy validation on each task", "diff_vs_picked_static", 2.5),
    Target("the static loss picked by the test rows of each task", "diff_vs_oracle", 0.0),
    Target(
        "steps to tuned CE's best accuracy on each task, share of its own (no loss of final accuracy: above)",
        "steps_to_ce_best_ratio",
        0.4,
        at_most=True,
    ),
    Target("steps to the best of tuned CE's mean accuracy", "steps_to_ce_best_mean_ratio", 0.4, at_most=True),
    Target("tuned CE, families never seen", "diff_vs_tuned_ce", 2.0, family=True),
    Target("tuned CE, judged with other architectures than it was trained on", "diff_architecture_transfer", 2.0),
    Target("tuned CE, judged over other horizons than it was trained over", "diff_horizon_transfer", 2.0),
    Target(f"more meta-training tasks, by a factor of {FACTOR} or more: what they add", "diff_more_tasks", 0.0),
    Target("number of meta-training tasks with which fewer would be better", "falls_with_more_tasks", 0, at_most=True),
)
"""Gains over what is named, in points of clean test accuracy on held-out datasets unless said otherwise."""


def judge_targets(
    figures: Mapping[str, Figure], family_figures: Mapping[str, Figure], families: Collection[str | None]
) -> list[dict[str, Any]]:
    """One entry per target: target, wanted, measured, verdict (reached, missed or not measured), and how much is
    missing (None unless the mean falls short). ``family_figures``: of runs that hold out one of ``families``; empty
    without such runs."""
    lacking = tuple(family for family in get_args(Family) if family not in families)
    if lacking:
        family_figures = {name: replace(figure, missing=lacking) for name, figure in family_figures.items()}
    return [
        {
            "target": target.text,
            "wanted": target.wanted,
            **_judged(target, family_figures if target.family else figures),
        }
        for target in TARGETS
    ]


def target_cells(entries: Sequence[Mapping[str, Any]]) -> Cells:
    """As results.md has them."""
    header = ["target", "wanted", "measured", "verdict"]
    return header, [
        [
            entry["target"],
            entry["wanted"],
            entry["measured"],
            entry["verdict"] if entry["short_by"] is None else f"missed by {entry['short_by']:.3g}",
        ]
        for entry in entries
    ]


def _judged(target: Target, figures: Mapping[str, Figure]) -> dict[str, Any]:
    def entry(measured: str, verdict: str, short_by: float | None = None) -> dict[str, Any]:
        return {"measured": measured, "verdict": verdict, "short_by": number(short_by)}

    if not figures:
        return entry("nothing: no run that holds out a family", "not measured")
    figure = figures[target.figure]
    if figure.value is None:
        return entry(f"nothing: {figure.meaning}", "not measured")
    measured = _measured(figure)
    estimate = figure.estimate
    clusters = figure.clusters if estimate is None else estimate.clusters
    if clusters is not None and clusters < FEWEST_CLUSTERS:
        return entry(
            f"{measured}; {clusters} independent datasets, and a verdict takes {FEWEST_CLUSTERS}",
            "not measured",
        )
    if figure.missing:
        return entry(f"{measured}; a verdict takes {', '.join(map(label_of, figure.missing))}", "not measured")
    if target.harmless:
        harms = estimate is not None and estimate.high < 0
        return entry(
            f"{measured}; the 95 % interval lies below zero" if harms else measured, "missed" if harms else "reached"
        )
    short = figure.value - target.bound if target.at_most else target.bound - figure.value
    if short >= SMALLEST_SHORTFALL:
        return entry(measured, "missed", short)
    if target.significant and not (estimate is not None and estimate.low > 0):
        return entry(f"{measured}; the 95 % interval holds zero", "missed")
    if target.significant and estimate is not None and not estimate.se > NO_ERROR:
        return entry(
            f"{measured}; all datasets have the same difference, which gives no error to judge by", "not measured"
        )
    return entry(measured, "reached")


def _measured(figure: Figure) -> str:
    """In the unit of the target."""
    estimate = figure.estimate
    if estimate is None or figure.value != estimate.mean:  # a number, or a ratio
        return f"{figure.value:.3g}"
    against = f", against {label_of(figure.of)}" if figure.of else ""
    return f"{signed(estimate)}, {interval(estimate)}{against}"
