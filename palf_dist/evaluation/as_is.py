"""Whether the policy does harm where nothing is wrong with a dataset: each one as it is, against the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import special

from palf_dist.config import EvaluationConfig
from palf_dist.evaluation.conditions import as_is
from palf_dist.evaluation.headline import Figure
from palf_dist.evaluation.inference import Estimate, clustered_mean, holm
from palf_dist.evaluation.methods import POLICY, REFERENCE
from palf_dist.evaluation.statistics import compare_each
from palf_dist.evaluation.table import NOTHING, Cells, label_of, number, p_value, signed

LEVEL = 0.05
"""Of each test, uncorrected: it is hoped that none rejects, and a correction for many would make that the easier."""

POWER = 0.8
NONE_AS_IS = "no condition of these runs leaves the datasets as they are"

CAVEAT = (
    "The unit here is the task, not the dataset: the tasks of a dataset draw their rows from one pool, so that these "
    "errors are too small for other rows of the same source. A dataset counts as below where its own test says so, "
    "uncorrected; the p by Holm stands beside it. None found is no proof of none: *detectable* is the loss that such a "
    f"test would find with a probability of {POWER:.0%}. The mean over all datasets is clustered by dataset."
)


@dataclass(frozen=True)
class AsIs:
    """The policy's differences to the reference in points, each dataset over its own tasks, with p-values adjusted by
    Holm over the datasets, and all of them together, clustered by dataset."""

    differences: Mapping[str, Estimate]
    adjusted: Mapping[str, float]  # NaN where a dataset has fewer than two tasks
    pooled: Estimate

    @property
    def below(self) -> list[str]:
        """The datasets on which the policy is significantly below the reference, each at ``LEVEL``."""
        return [name for name, estimate in self.differences.items() if estimate.p < LEVEL and estimate.mean < 0]

    @property
    def below_by_holm(self) -> list[str]:
        """The same, at ``LEVEL`` for all together."""
        return [name for name in self.below if self.adjusted[name] < LEVEL]

    def figures(self) -> dict[str, Figure]:
        """How many datasets are below, and the mean over all."""
        return {figure.name: figure for figure in (self._below_figure(), self._pooled_figure())}

    def _below_figure(self) -> Figure:
        name = "datasets_below_ce_as_is"
        if not self.differences:
            return Figure(name, NONE_AS_IS)
        if untested := [dataset for dataset, estimate in self.differences.items() if math.isnan(estimate.p)]:
            return Figure(name, f"takes two tasks or more of each dataset as it is; not so: {', '.join(untested)}")
        largest = max(map(detectable_loss, self.differences.values()))
        meaning = (
            f"of {len(self.differences)} datasets as they are, those on which it is significantly below "
            f"{label_of(REFERENCE)} (p < {LEVEL:g} each, uncorrected; by Holm {len(self.below_by_holm)}; detectable "
            f"are losses of {largest:.2f} points on every dataset)"
        )
        clusters = self.pooled.clusters
        return Figure(
            name, f"{meaning}{': ' if self.below else ''}{', '.join(self.below)}", len(self.below), clusters=clusters
        )

    def _pooled_figure(self) -> Figure:
        if not self.pooled.tasks:
            return Figure("diff_as_is", NONE_AS_IS)
        loss = detectable_loss(self.pooled)
        meaning = "all tasks of datasets as they are" + (
            "" if math.isnan(loss) else f" (a loss of {loss:.2f} would be detectable)"
        )
        return Figure("diff_as_is", meaning, self.pooled.mean, self.pooled, REFERENCE)

    def record(self) -> dict[str, Any]:
        """As results.json has it."""
        datasets = {
            name: {
                "difference": number(estimate.mean),
                "se": number(estimate.se),
                "p": number(estimate.p, 9),
                "p_holm": number(self.adjusted[name], 9),
                "detectable_loss": number(detectable_loss(estimate)),
                "tasks": estimate.tasks,
            }
            for name, estimate in self.differences.items()
        }
        return {"level": LEVEL, "significantly_below": self.below, "by_holm": self.below_by_holm, "datasets": datasets}

    def cells(self) -> Cells:
        """As results.md has it, the worst dataset first."""
        worst_first = sorted(self.differences.items(), key=lambda item: item[1].mean)
        header = ["dataset", f"difference to {label_of(REFERENCE)}", "p", "p (Holm)", "detectable", "tasks"]
        return header, [
            [
                name,
                signed(estimate),
                p_value(estimate.p),
                p_value(adjusted),
                NOTHING if math.isnan(detectable_loss(estimate)) else f"{detectable_loss(estimate):.2f}",
                str(estimate.tasks),
            ]
            for name, estimate, adjusted in (
                ("all", self.pooled, math.nan),
                *((name, estimate, self.adjusted[name]) for name, estimate in worst_first),
            )
        ]


def detectable_loss(estimate: Estimate) -> float:
    """Points of a loss that the two-sided t test behind an estimate finds with probability ``POWER``, by the usual
    approximation (t_{1-LEVEL/2} + t_{POWER}) se. NaN without a standard error."""
    if math.isnan(estimate.se):
        return math.nan
    freedom = estimate.clusters - 1
    return float(special.stdtrit(freedom, 1 - LEVEL / 2) + special.stdtrit(freedom, POWER)) * estimate.se


def compare_as_is(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> AsIs:
    """By accuracy, on the tasks of ``rows`` whose condition is one of ``conditions.as_is``."""
    conditions = as_is(evaluation)
    two = [row for row in rows if row["method"] in (POLICY, REFERENCE) and row["condition"] in conditions]
    if not two:
        return AsIs({}, {}, clustered_mean([], []))
    found = compare_each(two, POLICY)[0]
    differences = {name: part.difference for name, part in found.by_dataset.items()}
    adjusted = holm({name: estimate.p for name, estimate in differences.items()})
    return AsIs(differences, adjusted, found.overall.difference)
