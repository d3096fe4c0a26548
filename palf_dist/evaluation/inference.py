"""What a mean over the tasks of several datasets is worth: errors, tests and intervals with the dataset as the unit."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from palf_dist.randomness import random_generator

RESAMPLES = 2000
"""Bootstrap samples of one interval: its ends vary by about 2 % of its width from one draw to another."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its uncertainty. ``se``, ``low``, ``high`` and ``p`` are NaN with one cluster."""

    mean: float
    se: float
    low: float  # 95 % confidence interval, Student's t with clusters - 1 degrees of freedom
    high: float
    p: float  # of the two-sided t test of a mean of zero, with the same degrees of freedom
    tasks: int
    clusters: int


def clustered_mean(values: ArrayLike, clusters: Sequence[Hashable]) -> Estimate:
    """Mean of ``values`` [N] with its cluster-robust standard error; ``clusters`` [N] names each value's cluster.

    SE = sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / N for G clusters: the sandwich estimator of a mean with
    the usual small-sample factor. With one value per cluster it is the ordinary standard error.
    """
    values = np.asarray(values, dtype=np.float64)
    assert values.ndim == 1 and len(values) == len(clusters) and np.isfinite(values).all()
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)
    mean = float(values.mean())
    sums, _ = _by_cluster(values - mean, clusters)
    count = len(sums)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, math.nan, len(values), 1)
    se = math.sqrt(count / (count - 1) * float(sums @ sums)) / len(values)
    # Student's t by its special functions: scipy.stats' own checks take a hundred times as long.
    half_width = float(special.stdtrit(count - 1, 0.975)) * se
    p = float(mean == 0) if se == 0 else float(2 * special.stdtr(count - 1, -abs(mean) / se))
    return Estimate(mean, se, mean - half_width, mean + half_width, p, len(values), count)


def bootstrap_interval(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` [N] when whole clusters are drawn anew, as many as there are.

    The same draws for every call with as many clusters. NaN with fewer than two. It assumes no distribution, but with
    few clusters it is too narrow: about four fifths of the t interval with ten, half of it with four.
    """
    values = np.asarray(values, dtype=np.float64)
    sums, sizes = _by_cluster(values, clusters)
    if len(sums) < 2:
        return math.nan, math.nan

    def mean(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(sums.sum(axis) / sizes.sum(axis))

    drawn = stats.bootstrap(
        (sums, sizes),
        mean,
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=random_generator("bootstrap"),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values of a family of tests, by name; a test without a p-value (NaN) is not in it."""
    adjusted, largest = dict.fromkeys(p_values, math.nan), 0.0
    family = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    for rank, (p, name) in enumerate(family):
        largest = max(largest, min(1.0, (len(family) - rank) * p))
        adjusted[name] = largest
    return adjusted


def _by_cluster(values: np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster [G]."""
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([codes[cluster] for cluster in clusters], dtype=np.intp)
    return np.bincount(places, weights=values), np.bincount(places)
