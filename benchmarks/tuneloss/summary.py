"""From curves to the figures that are quoted: how much each method needs until it is near the best anyone found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.tuneloss.methods import METHODS, REFERENCE
from benchmarks.tuneloss.results import Curve

NEAR = (0.01, 0.02, 0.05)
"""Relative distances to the best error that anyone found."""
UNITS = ("trainings", "gradient evaluations")


@dataclass(frozen=True)
class Need:
    """What a method needs, over some cases, to come within a distance; unsolved cases count as infinite.

    In the ratios a case that the reference method did not solve counts with all that it spent, so they understate how
    much more it needs. NaN: nothing can be said.
    """

    median: float
    solved: int
    ratio: float = np.nan  # median of the reference / this median
    understated: bool = False  # the median of the reference is infinite
    paired: float = np.nan  # median over cases of reference / this; 0 where only the reference solved it

    @classmethod
    def of(cls, values: np.ndarray, reference: np.ndarray | None = None, spent: np.ndarray | None = None) -> Need:
        """From the needs [n] of a method, those of the reference on the same cases and all that it spent there."""
        median, solved = float(np.median(values)), int(np.isfinite(values).sum())
        if reference is None or spent is None or not solved:
            return cls(median, solved)
        at_least = np.minimum(reference, spent)
        ratio = float(np.median(at_least) / median) if np.isfinite(median) else np.nan
        either = np.isfinite(values) | np.isfinite(reference)
        paired = float(np.median((at_least / values)[either]))
        return cls(median, solved, ratio, not np.isfinite(np.median(reference)), paired)


@dataclass(frozen=True)
class Row:
    """One method over some cases."""

    method: str
    cases: int
    budget: int  # trainings
    needs: dict[tuple[str, float], Need]  # (unit, distance) -> need

    @property
    def label(self) -> str:
        return METHODS[self.method].label


def summarise(curves: Sequence[Curve], best: dict[tuple[str, int], float]) -> list[Row]:
    """A row for each method that is there, in the order of METHODS, over the cases that it did; it is compared with
    the reference method only where that did them all. ``best``: (problem, seed) -> lowest error anyone found."""
    by_method = {method: [curve for curve in curves if curve.method == method] for method in METHODS}
    reference = {curve.case: curve for curve in by_method[REFERENCE]}
    rows = []
    for method, own in by_method.items():
        if not own:
            continue
        compared = [reference[curve.case] for curve in own if curve.case in reference]
        needs = {}
        for near in NEAR:
            goals = [best[curve.case] * (1 + near) for curve in own]
            values = _until(own, goals)
            if len(compared) == len(own):
                others, spent = _until(compared, goals), np.array([curve.spent for curve in compared])
            for index, unit in enumerate(UNITS):
                if len(compared) == len(own):
                    needs[unit, near] = Need.of(values[:, index], others[:, index], spent[:, index])
                else:
                    needs[unit, near] = Need.of(values[:, index])
        rows.append(Row(method, len(own), max(len(curve.errors) for curve in own), needs))
    return rows


def cost_on_the_fly(curves: Sequence[Curve]) -> float:
    """Median over cases of the gradient evaluations of the training on the fly that a method begins with, relative to
    the median training of the reference method; NaN where there is nothing to compare."""
    plain = {curve.case: np.median(np.diff(curve.costs, prepend=0)) for curve in curves if curve.method == REFERENCE}
    shares = [curve.costs[0] / plain[curve.case] for curve in curves if curve.starts_on_the_fly and curve.case in plain]
    return float(np.median(shares)) if shares else np.nan


def _until(curves: Sequence[Curve], goals: Sequence[float]) -> np.ndarray:
    """(trainings, gradient evaluations) [n, 2] that each curve needs to its goal."""
    return np.array([curve.until(goal) for curve, goal in zip(curves, goals, strict=True)])
