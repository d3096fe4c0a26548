"""What the reports of ``palf-dist ablate`` that lie beside the results say of the paper's claims and of the targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.designs import ABLATIONS
from palf_dist.evaluation.headline import Figure
from palf_dist.evaluation.inference import Estimate
from palf_dist.evaluation.table import interval, signed
from palf_dist.evaluation.verdicts import Finding, all_of, judge, judged, scaled, too_little

FACTOR = 8
"""Of the number of meta-training tasks, over which more of them have to give a better policy."""

LOST_WITHOUT = {"info_nce": 1.3, "focal": 1.1}
"""Points that are said to be lost without these basis losses."""

K_META = 100
"""Inner steps between two updates of the policy that are said to be best."""


class Measured(BaseModel):
    """A paired difference in points."""

    difference: float | None
    se: float | None
    ci95: tuple[float, float] | None
    tasks: int
    clusters: int

    @property
    def estimate(self) -> Estimate:
        """What there is none of is NaN, as is p, which the report keeps elsewhere."""
        low, high = self.ci95 or (math.nan, math.nan)
        mean, se = (math.nan if value is None else value for value in (self.difference, self.se))
        return Estimate(mean, se, low, high, math.nan, self.tasks, self.clusters)


class Variant(BaseModel):
    name: str
    set: dict[str, Any]
    against_base: Measured

    @property
    def update_every(self) -> int | None:
        """Inner steps between two updates of the policy, where that is what it changes."""
        free = {"estimator.window", "meta_learner.outer_steps"}
        return self.set.get("estimator.window") if self.set.keys() <= free else None


class Base(BaseModel):
    name: str
    digest: str  # of its design
    policy: str  # its kind
    basis: tuple[str, ...]
    window: int | None  # inner steps between two updates of the policy; None: the whole run


class Point(BaseModel):
    """Of the curve over the number of meta-training tasks."""

    name: str
    tasks: int
    gains: dict[str, Measured]  # over the points with fewer tasks


class AblationRecord(BaseModel):
    """What is read of one report."""

    base: Base
    groups: dict[str, list[Variant]]
    curve: list[Point]

    @property
    def variants(self) -> list[Variant]:
        return [variant for group in self.groups.values() for variant in group]


def read_ablations(folder: Path) -> list[AblationRecord]:
    """All reports in ``folder``; none where there are none. Raises RunDirectoryError for a file that is none of
    theirs."""
    records = []
    for path in sorted(folder.glob(f"{ABLATIONS}*.json")):
        try:
            records.append(AblationRecord.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise RunDirectoryError(
                f"{path}: is no file of this version of palf-dist ablate ({type(error).__name__}); write it again by "
                "the same command, or remove it"
            ) from error
    return records


def more_tasks_figures(records: Sequence[AblationRecord], digest: str) -> dict[str, Figure]:
    """Of the curve whose base is the design ``digest``: the gain of the most meta-training tasks over those of
    ``FACTOR`` times fewer, and how many points lie significantly below one with fewer tasks."""
    names = ("diff_more_tasks", "falls_with_more_tasks")
    curves = [record.curve for record in records if record.base.digest == digest and record.curve]
    if not curves:
        return {name: Figure(name, "takes the curve of palf-dist ablate, of this design") for name in names}
    last = curves[0][-1]
    fewer = [point for point in curves[0] if FACTOR * point.tasks <= last.tasks]
    if not fewer:
        reason = f"the curve of palf-dist ablate spans less than a factor of {FACTOR}"
        return {name: Figure(name, reason) for name in names}
    first = fewer[-1]
    gain = last.gains[first.name].estimate
    every = [each.estimate for point in curves[0] for each in point.gains.values()]
    falls = sum(each.high < 0 for each in every)
    meaning = f"{last.tasks:,} meta-training tasks against {first.tasks:,}"
    points = f"points of a curve of {len(curves[0])} that lie significantly below one with fewer tasks"
    return {
        names[0]: Figure(names[0], meaning, gain.mean, gain),
        names[1]: Figure(names[1], points, falls, clusters=min(each.clusters for each in every)),
    }


def losses_left_out(records: Sequence[AblationRecord]) -> Finding:
    """By the 95 % intervals of what each loss adds; the claim is of both."""
    for record in records:
        if set(LOST_WITHOUT) <= set(record.base.basis):
            by_name = {variant.name: variant.against_base for variant in record.variants}
            lost = {
                name: scaled(by_name[f"no-{name}"].estimate, -1.0) for name in LOST_WITHOUT if f"no-{name}" in by_name
            }
            if len(lost) == len(LOST_WITHOUT):
                found = [judged(lost[name], "points lost", claimed) for name, claimed in LOST_WITHOUT.items()]
                words = "; ".join(f"without {name} {each.measured}" for name, each in zip(lost, found, strict=True))
                return Finding(f"{words} (policy {record.base.policy})", all_of([each.verdict for each in found]))
    wanted = " and ".join(f"no-{name}" for name in LOST_WITHOUT)
    return Finding(f"nothing: takes palf-dist ablate with {wanted}", "not measured")


def update_frequency(records: Sequence[AblationRecord]) -> Finding:
    """Reproduced: an update every ``K_META`` steps is significantly ahead of one at the end of the run, and ahead of
    every other frequency; opposite: significantly behind the end of the run. The paper's own policy comes first."""
    for record in sorted(records, key=lambda record: record.base.policy != "palf"):
        found = {each.update_every: each.against_base.estimate for each in record.variants if each.update_every}
        if record.base.window is None and K_META in found and len(found) > 1:
            best = found.pop(K_META)
            others = ", ".join(f"every {steps} {signed(each)}" for steps, each in sorted(found.items()))
            words = (
                f"every {K_META} {signed(best)} points against an update at the end of each run, 95 % interval "
                f"{interval(best)}; {others} (policy {record.base.policy})"
            )
            if reason := too_little(best):
                return Finding(f"{words}; {reason}", "not measured")
            verdict = judge(best)
            if verdict == "reproduced" and any(each.mean >= best.mean for each in found.values()):
                verdict = "not reproduced"
            return Finding(words, verdict)
    return Finding("nothing: takes palf-dist ablate with windows of 100 and others", "not measured")
