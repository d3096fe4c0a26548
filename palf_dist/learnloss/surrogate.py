"""A Gaussian process over u = log lambda that also takes slopes, and the point of greatest expected improvement.

Slopes come from implicit differentiation; with k weights one of them says as much as k + 1 trainings without. Errors
are compressed by log1p first, so that bad regions do not set the scale of good ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr

from palf_dist.learnloss.space import WeightSpace

LENGTH = 3.0  # log units: where the length scales are expected, as e folds thrice
LENGTH_SPREAD, NOISE_SPREAD = 0.8, 1.0  # standard deviations of the log-normal priors
VALUE_NOISE, SLOPE_NOISE = 1e-2, 3e-2  # expected, as shares of the process's standard deviation
WAYPOINT_NOISE = 3.0  # times that of a final
COMPRESSION = 2.0  # times the median excess error: below it errors count linearly, above in log
SLOPES_KEPT = 24  # of the best trainings: the others only cost time
WARM = 5
CANDIDATES = 1500
KEPT, OFFSPRING, WIDTHS = 4, 64, (0.3, 0.1, 0.03)  # of each round that refines the best candidates, in log units


@dataclass(frozen=True)
class Points:
    """Trainings as the surrogate sees them."""

    u: np.ndarray  # [n, k]
    errors: np.ndarray  # [n]
    slopes: np.ndarray  # [n, k] d e / d u; NaN where unknown
    waypoints: int = 0  # the last rows, that many, are no finals: models that have but settled down

    @classmethod
    def of(
        cls, trainings: Sequence[tuple[np.ndarray, float, np.ndarray | None]], size: int, waypoints: int = 0
    ) -> Points:
        """From (weights lambda [k], error, d e / d lambda [k] where it is known) of each; ``size`` is k."""
        weights = np.reshape([row for row, _, _ in trainings], (len(trainings), size))
        gradients = np.full(weights.shape, np.nan)
        for row, (_, _, gradient) in zip(gradients, trainings, strict=True):
            if gradient is not None:
                row[:] = gradient
        return cls(np.log(weights), np.array([error for _, error, _ in trainings]), gradients * weights, waypoints)


class Surrogate:
    """Posterior of the compressed error. Squared-exponential kernel with a length scale per weight, fitted by maximum a
    posteriori; constant mean and variance in closed form."""

    def __init__(self, points: Points, start: np.ndarray | None = None) -> None:
        """Fit to at least one training; ``start``: ``hyperparameters`` of an earlier fit, to begin from."""
        n, k = points.u.shape
        least = points.errors.min()
        self._u, self._k = points.u, k
        self._finals = n - points.waypoints
        self._looseness = np.repeat([1.0, WAYPOINT_NOISE**2], [self._finals, points.waypoints])
        excess = points.errors - least
        bend = COMPRESSION * float(np.median(excess)) + 1e-12
        values = np.log1p(excess / bend)
        slopes = points.slopes / (bend + excess)[:, None]
        self.scale = float(values.std()) or 1.0
        self._least, self._bend = float(least), bend
        known = np.flatnonzero(np.isfinite(slopes).all(1))
        self._sloped = known[np.argsort(points.errors[known], kind="stable")[:SLOPES_KEPT]]
        self._data = np.concatenate([values, slopes[self._sloped].ravel()]) / self.scale
        self._ones = np.concatenate([np.ones(n), np.zeros(len(self._sloped) * k)])
        expected = np.log(np.r_[np.full(k, LENGTH), VALUE_NOISE, SLOPE_NOISE])
        spread = np.r_[np.full(k, LENGTH_SPREAD), NOISE_SPREAD, NOISE_SPREAD]

        def objective(h: np.ndarray) -> float:
            return self._misfit(h) + 0.5 * float((((h - expected) / spread) ** 2).sum())

        bounds = [*[(np.log(0.3), np.log(30.0))] * k, *[(np.log(1e-4), np.log(0.3))] * 2]
        begin = expected if start is None else start
        options = {"maxiter": 30 if start is None else WARM}
        self.hyperparameters: np.ndarray = minimize(objective, begin, bounds=bounds, options=options).x
        self._length, covariance = self._covariance(self.hyperparameters)
        self._factor = cho_factor(covariance, lower=True)
        self._mean, self._dual, self._variance = self._solve(self._factor)
        self._inverse = cho_solve(self._factor, np.eye(len(covariance)))

    def predict(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [m] of the compressed error (in its own units) at u [m, k]."""
        cross = self._kernel(u, None)
        mean = self._mean + cross @ self._dual
        share = 1 - ((cross @ self._inverse) * cross).sum(1)
        return mean, np.sqrt(self._variance * np.maximum(share, 1e-10))

    def error(self, u: np.ndarray) -> float:
        """Median prediction of e at u [k]."""
        mean, _ = self.predict(u[None])
        return self._least + self._bend * float(np.expm1(min(self.scale * mean[0], 100.0)))  # far off, any large number

    def log_improvement(self, u: np.ndarray) -> np.ndarray:
        """log of the expected improvement over the best training, at u [m, k]."""
        mean, deviation = self.predict(u)
        z = (self._data[: self._finals].min() - mean) / deviation
        near = np.maximum(z, -5.0)
        exact = np.log(near * ndtr(near) + np.exp(-0.5 * near**2) / np.sqrt(2 * np.pi))
        tail = log_ndtr(z) - np.log(np.maximum(-z, 1.0))  # to first order, where the exact form cancels
        return np.log(deviation) + np.where(z > -5.0, exact, tail)

    def propose(self, space: WeightSpace, generator: np.random.Generator) -> np.ndarray:
        """u [k] of the greatest expected improvement in the box, as found by random search, wide and then narrow."""
        best = self._u[self._data[: self._finals].argmin()]
        widths = generator.choice([0.1, 0.3, 1.0, 2.5], size=(CANDIDATES, 1))
        near = space.clip(best + widths * generator.normal(size=(CANDIDATES, space.size)))
        candidates = np.vstack([space.sample(generator, CANDIDATES), near])
        best_candidates = self._ranked(candidates)
        for width in WIDTHS:
            moved = width * generator.normal(size=(KEPT * OFFSPRING, space.size))
            children = space.clip(np.repeat(best_candidates, OFFSPRING, 0) + moved)
            best_candidates = self._ranked(np.vstack([best_candidates, children]))
        return best_candidates[0]

    def minimise(self, low: np.ndarray, high: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """u [k] of the least mean within [low, high] [k], found by random search likewise."""
        found = generator.uniform(low, high, (CANDIDATES, len(low)))
        for width in WIDTHS:
            found = found[np.argsort(self.predict(found)[0], kind="stable")[:KEPT]]
            moved = width * generator.normal(size=(KEPT * OFFSPRING, len(low)))
            found = np.vstack([found, np.clip(np.repeat(found, OFFSPRING, 0) + moved, low, high)])
        return found[self.predict(found)[0].argmin()]

    def _ranked(self, u: np.ndarray) -> np.ndarray:
        """The KEPT of u [m, k] that promise most, the best first."""
        return u[np.argsort(-self.log_improvement(u), kind="stable")[:KEPT]]

    def _misfit(self, hyperparameters: np.ndarray) -> float:
        """Negative log marginal likelihood, up to a constant."""
        _, covariance = self._covariance(hyperparameters)
        try:
            factor = cho_factor(covariance, lower=True)
        except np.linalg.LinAlgError:
            return 1e10
        _, _, variance = self._solve(factor)
        return 0.5 * len(self._data) * np.log(variance) + float(np.log(np.diag(factor[0])).sum())

    def _solve(self, factor: tuple[np.ndarray, bool]) -> tuple[float, np.ndarray, float]:
        """Mean, dual weights and variance of the process."""
        whitened = cho_solve(factor, self._ones)
        mean = float(whitened @ self._data / (self._ones @ whitened))
        centred = self._data - mean * self._ones
        dual = cho_solve(factor, centred)
        return mean, dual, max(float(centred @ dual) / len(centred), 1e-12)

    def _covariance(self, hyperparameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Length scales [k] and the covariance of the data, in units of the process's variance."""
        length = np.exp(hyperparameters[: self._k])
        value_noise, slope_noise = np.exp(hyperparameters[self._k :])
        self._length = length
        covariance = self._kernel(self._u, self._sloped)
        slopes = slope_noise**2 * np.outer(self._looseness[self._sloped], length**-2).ravel()
        noise = np.concatenate([value_noise**2 * self._looseness, slopes])
        covariance[np.diag_indices(len(covariance))] += noise + 1e-8
        return length, covariance

    def _kernel(self, u: np.ndarray, sloped: np.ndarray | None) -> np.ndarray:
        """Covariance of f at u (then of its slopes at ``u[sloped]``) with the data's values and slopes."""
        length, data, at = self._length, self._u, self._sloped
        difference = (u[:, None] - data[None]) / length**2  # [m, n, k]
        value = np.exp(-0.5 * ((difference * length) ** 2).sum(2))
        rows = len(u)
        top = np.hstack([value, (value[:, at, None] * difference[:, at]).reshape(rows, -1)])
        if sloped is None or not len(sloped):
            return top
        left = -(value[sloped][:, :, None] * difference[sloped]).transpose(0, 2, 1).reshape(-1, len(data))
        cross = difference[np.ix_(sloped, at)]
        second = value[np.ix_(sloped, at)][:, :, None, None] * (
            np.diag(length**-2) - cross[..., :, None] * cross[..., None, :]
        )
        size = len(sloped) * self._k
        return np.vstack([top, np.hstack([left, second.transpose(0, 2, 1, 3).reshape(size, -1)])])
