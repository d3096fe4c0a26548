"""Phases of a training run: the two moments at which a piecewise constant curve fits best, how sure they are, and
whether the curve has phases at all rather than a gradual change."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from palf_dist.evaluation.inference import clustered_mean
from palf_dist.randomness import random_generator

PAPER_PHASES = ((0.0, 0.2), (0.2, 0.8), (0.8, 1.0))
"""Shares of the run: exploration, exploitation and refinement, as section 6 of the paper has them."""

FEWEST_REFRESHES = 6
"""Moments of a curve below which anything is three phases."""

RESAMPLES = 500

Interval = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """The best three constants per control, the best two, and the best line with one bend, for one curve."""

    first: int  # the moments at which the second and the third phase begin
    second: int
    only: int  # the moment of the change where there are two constants
    by_phases: float  # share of the variation over time that the fit explains; 0 where there is none
    by_line: float


@dataclass(frozen=True)
class Phases:
    """Two change points of a mean curve, as shares of the run. The 95 % percentile intervals are those of datasets
    drawn anew; NaN with one cluster."""

    boundaries: tuple[float, float]
    intervals: tuple[Interval, Interval]
    resolution: float  # the share of the run between two refreshes
    by_phases: float
    by_line: float
    ahead: Interval  # of by_phases - by_line
    third: Interval  # of what the third constant adds on datasets that it was not found on, see ``_third``
    runs: int
    clusters: int

    @property
    def agree(self) -> tuple[bool, bool]:
        """Whether the paper's boundary lies within the interval of each, and the interval is no wider than a refresh to
        each side: one that holds much of the run agrees with anything. A policy that changes at a boundary is seen to
        do so at its next refresh."""
        claimed = [stop for _, stop in PAPER_PHASES[:-1]]
        first, second = (
            low - self.resolution < boundary <= high + 1e-9 and high - low <= 2 * self.resolution + 1e-9
            for boundary, (low, high) in zip(claimed, self.intervals, strict=True)
        )
        return first, second


def phase_of(times: np.ndarray) -> np.ndarray:
    """Index into ``PAPER_PHASES`` of each share of the run."""
    return np.searchsorted([stop for _, stop in PAPER_PHASES[:-1]], times + 1e-9, side="right")


def find_phases(curves: np.ndarray, clusters: Sequence[Hashable], times: np.ndarray) -> Phases:
    """The phases of the mean of ``curves`` [N, R, C] over N inner runs with R >= FEWEST_REFRESHES moments ``times``
    [R], which are equally far apart; ``clusters`` [N] names the dataset of each.

    The C controls are to have the same scale: the fit adds up their squared errors.
    """
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([[cluster == code for cluster in clusters] for code in codes], np.float64)  # [clusters, N]
    sums, sizes = np.einsum("gn,nrc->grc", member, curves), member.sum(1)
    lines = bent_lines(curves.shape[1])
    found = fit(curves.mean(0), lines)
    ends = np.full((3, 2), math.nan)
    if len(codes) > 1:
        draws = random_generator("phases").multinomial(len(codes), np.full(len(codes), 1 / len(codes)), RESAMPLES)
        drawn = [fit(np.einsum("g,grc->rc", counts, sums) / (counts @ sizes), lines) for counts in draws]
        values = [(times[each.first], times[each.second], each.by_phases - each.by_line) for each in drawn]
        ends = np.percentile(values, [2.5, 97.5], axis=0).T
    third = _third(sums / sizes[:, None, None], sizes)
    first, second, ahead = ((float(low), float(high)) for low, high in ends)
    return Phases(
        boundaries=(float(times[found.first]), float(times[found.second])),
        intervals=(first, second),
        resolution=float(times[1] - times[0]),
        by_phases=found.by_phases,
        by_line=found.by_line,
        ahead=ahead,
        third=third,
        runs=len(curves),
        clusters=len(codes),
    )


def _third(means: np.ndarray, sizes: np.ndarray) -> Interval:
    """95 % t interval, over datasets, of what three constants explain more than two do of the mean curve of a dataset
    (``means`` [clusters, R, C], of ``sizes`` inner runs) when both are taken from the other datasets; as a share of the
    variation over time of the mean of all. On the curves that they are fitted to three are never behind."""
    centred = means - means.mean(1, keepdims=True)
    total = float((np.average(centred, axis=0, weights=sizes) ** 2).sum())
    if len(means) < 2 or not total > 1e-12:
        return math.nan, math.nan
    gains, moments = [], np.arange(means.shape[1])
    for left_out, curve in enumerate(centred):
        others = np.average(np.delete(centred, left_out, 0), axis=0, weights=np.delete(sizes, left_out))
        found = fit(others, bent_lines(len(moments)))

        def error(*boundaries: int, others: np.ndarray = others, curve: np.ndarray = curve) -> float:
            parts = zip(np.split(others, boundaries), np.split(curve, boundaries), strict=True)
            return sum(float(((own - levels.mean(0)) ** 2).sum()) for levels, own in parts)

        gains.append((error(found.only) - error(found.first, found.second)) / total)
    gain = clustered_mean(gains, range(len(gains)))
    return gain.low, gain.high


def fit(curve: np.ndarray, lines: np.ndarray) -> Fit:
    """Exact least squares over all pairs of change points of ``curve`` [R, C], and over all bends of ``lines``."""
    centred = curve - curve.mean(0)
    total = float((centred**2).sum())
    sums = np.concatenate([np.zeros((1, curve.shape[1])), centred.cumsum(0)])[:-1]  # [R, C]; over the whole run it is 0
    # What the three means explain is the sum over the phases of |sum|^2 / length, here for all pairs at once.
    products = sums @ sums.T
    squares, start = np.diag(products), np.arange(len(curve))
    between = squares[:, None] + squares - 2 * products
    lengths = start - start[:, None]
    inside = (start[:, None] > 0) & (lengths > 0)
    explained = np.full(inside.shape, -math.inf)
    explained[inside] = (
        (squares / np.maximum(start, 1))[:, None] + between / np.maximum(lengths, 1) + squares / (len(curve) - start)
    )[inside]
    first, second = np.unravel_index(explained.argmax(), explained.shape)
    only = 1 + int(np.argmax(squares[1:] / start[1:] + squares[1:] / (len(curve) - start[1:])))
    if not total > 1e-12:
        return Fit(int(first), int(second), only, 0.0, 0.0)
    by_line = float(((lines @ centred) ** 2).sum((1, 2)).max())
    return Fit(int(first), int(second), only, float(explained.max()) / total, by_line / total)


def bent_lines(moments: int) -> np.ndarray:
    """Orthonormal bases [bends, 3, moments] of the lines with one bend, at each inner moment: with three numbers per
    control and one place they have as many parameters as three constants, less one."""
    time = np.arange(moments, dtype=np.float64)
    designs = [np.stack([np.ones(moments), time, np.maximum(time - bend, 0)], 1) for bend in time[1:-1]]
    return np.linalg.qr(np.stack(designs))[0].transpose(0, 2, 1)
