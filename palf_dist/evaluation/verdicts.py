"""From an estimate, with its 95 % interval (Student's t, clustered by dataset), to a verdict on a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from palf_dist.evaluation.inference import Estimate
from palf_dist.evaluation.table import interval, signed

Verdict = Literal["reproduced", "not reproduced", "opposite", "not measured"]

FEWEST_CLUSTERS = 5
"""Independent datasets that a verdict takes: with fewer the t interval rests on hardly any estimate of its error."""

NO_ERROR = 1e-9  # standard errors up to this are those of rounding


@dataclass(frozen=True)
class Finding:
    measured: str
    verdict: Verdict


def judge(estimate: Estimate, claimed: float = 0.0) -> Verdict:
    """The verdict on a claim of a gain of at least ``claimed``, in the unit of the estimate: "reproduced" where the
    95 % interval lies above zero and the mean reaches what is claimed, "opposite" where the interval lies below zero,
    "not reproduced" otherwise, and "not measured" where there is no value or too little to judge it by."""
    if too_little(estimate):
        return "not measured"
    if estimate.high < 0:
        return "opposite"
    return "reproduced" if estimate.low > 0 and estimate.mean >= claimed else "not reproduced"


def too_little(estimate: Estimate) -> str:
    """Why there is no verdict on an estimate; empty where there is one."""
    if math.isnan(estimate.mean):
        return "there is no value"
    if estimate.clusters < FEWEST_CLUSTERS:
        return f"{estimate.clusters} independent datasets, and a verdict takes {FEWEST_CLUSTERS}"
    # Differences that are all equal have no error but that of rounding.
    return "" if estimate.se > NO_ERROR else "all datasets have the same difference, which gives no error to judge by"


def judged(estimate: Estimate, unit: str, claimed: float = 0.0) -> Finding:
    """``judge`` with the estimate in words."""
    words = f"{signed(estimate)} {unit}"
    if reason := too_little(estimate):
        return Finding(f"{words}; {reason}", "not measured")
    return Finding(f"{words}, 95 % interval {interval(estimate)}", judge(estimate, claimed))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same in another unit."""
    low, high = sorted((estimate.low * factor, estimate.high * factor))
    return replace(estimate, mean=estimate.mean * factor, se=estimate.se * abs(factor), low=low, high=high)


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """On a claim that consists of several."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "not measured" if "not measured" in verdicts else "not reproduced"
