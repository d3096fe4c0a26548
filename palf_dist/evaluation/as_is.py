"""Whether the policy does harm where nothing is wrong with a dataset: each one as it is, against the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palf_dist.config import EvaluationConfig
from palf_dist.evaluation.conditions import as_is
from palf_dist.evaluation.headline import POLICY, Figure
from palf_dist.evaluation.inference import Estimate, holm
from palf_dist.evaluation.methods import REFERENCE
from palf_dist.evaluation.statistics import compare_each
from palf_dist.evaluation.table import Cells, label_of, number, p_value, signed

LEVEL = 0.05
"""Of the family of tests: one for each dataset."""

CAVEAT = (
    "The unit here is the task, not the dataset: the tasks of a dataset draw their rows from one pool, so that these "
    "errors are too small for other rows of the same source. And with few tasks each a loss has to be large to be "
    "significant: none found is no proof of none."
)


@dataclass(frozen=True)
class AsIs:
    """The policy's differences to the reference in points, each dataset over its own tasks, with p-values adjusted by
    Holm over the datasets."""

    differences: Mapping[str, Estimate]
    adjusted: Mapping[str, float]  # NaN where a dataset has fewer than two tasks

    @property
    def below(self) -> list[str]:
        """The datasets on which the policy is significantly below the reference, at ``LEVEL`` for all together."""
        return [name for name, p in self.adjusted.items() if p < LEVEL and self.differences[name].mean < 0]

    def figure(self) -> Figure:
        name = "datasets_below_ce_as_is"
        if not self.differences:
            return Figure(name, "no condition of these runs leaves the datasets as they are")
        if untested := [dataset for dataset, p in self.adjusted.items() if math.isnan(p)]:
            return Figure(name, f"takes two tasks or more of each dataset as it is; not so: {', '.join(untested)}")
        meaning = (
            f"of {len(self.differences)} datasets as they are, those on which it is significantly below "
            f"{label_of(REFERENCE)} (p < {LEVEL:g} by Holm over the datasets)"
        )
        return Figure(name, f"{meaning}{': ' if self.below else ''}{', '.join(self.below)}", len(self.below))

    def record(self) -> dict[str, Any]:
        """As results.json has it."""
        datasets = {
            name: {
                "difference": number(estimate.mean),
                "se": number(estimate.se),
                "p": number(estimate.p, 9),
                "p_holm": number(self.adjusted[name], 9),
                "tasks": estimate.tasks,
            }
            for name, estimate in self.differences.items()
        }
        return {"level": LEVEL, "significantly_below": self.below, "datasets": datasets}

    def cells(self) -> Cells:
        """As results.md has it, the worst dataset first."""
        worst_first = sorted(self.differences.items(), key=lambda item: item[1].mean)
        header = ["dataset", f"difference to {label_of(REFERENCE)}", "p", "p (Holm)", "tasks"]
        return header, [
            [name, signed(estimate), p_value(estimate.p), p_value(self.adjusted[name]), str(estimate.tasks)]
            for name, estimate in worst_first
        ]


def compare_as_is(rows: Sequence[Mapping[str, Any]], evaluation: EvaluationConfig) -> AsIs:
    """By accuracy, on the tasks of ``rows`` whose condition is one of ``conditions.as_is``."""
    conditions = as_is(evaluation)
    two = [row for row in rows if row["method"] in (POLICY, REFERENCE) and row["condition"] in conditions]
    found = compare_each(two, POLICY)[0].by_dataset if two else {}
    differences = {name: part.difference for name, part in found.items()}
    return AsIs(differences, holm({name: estimate.p for name, estimate in differences.items()}))
