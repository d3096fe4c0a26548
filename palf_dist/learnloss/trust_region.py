"""One step of the loss weights by implicit Gauss-Newton (IGN): a trust region in u = log lambda."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from palf_dist.learnloss.records import Sensitivity
from palf_dist.learnloss.space import WeightSpace

SMALLEST_STEP = 0.03  # in log units: below it a step is not worth a training
LARGEST_RADIUS = 6.0


@dataclass(frozen=True)
class Step:
    """Where the model leads from its centre."""

    u: np.ndarray  # [k]
    gain: float  # decrease of the error that the model predicts


@dataclass(frozen=True)
class LocalModel:
    """e(u + s) ~ error + slope . s + s . bend s / 2 around u = log lambda."""

    u: np.ndarray  # [k]
    error: float
    slope: np.ndarray  # [k] d e / d u
    bend: np.ndarray  # [k, k]

    @classmethod
    def of(cls, u: np.ndarray, error: float, sensitivity: Sensitivity) -> LocalModel:
        """Derivatives with respect to u = log lambda from those with respect to lambda.

        d2e / du2 = lambda_i lambda_j d2e / dlambda_i dlambda_j + [i = j] d e / d u_i; of the second part only what
        keeps the model convex is taken.
        """
        assert sensitivity.curvature is not None
        weights = np.exp(u)
        slope = sensitivity.gradient * weights
        bend = sensitivity.curvature * np.outer(weights, weights) + np.diag(np.maximum(slope, 0))
        return cls(u, error, slope, bend)

    def step(self, space: WeightSpace, radius: float) -> Step:
        """The best point of the model within ``radius`` (largest coordinate) and the box."""
        low = np.maximum(space.log_low - self.u, -radius)
        high = np.minimum(space.log_high - self.u, radius)
        s = self._minimiser(low, high)
        return Step(space.clip(self.u + s), -self.change(s))

    def change(self, s: np.ndarray) -> float:
        """Of the error, as the model sees it."""
        return float(self.slope @ s + 0.5 * s @ self.bend @ s)

    def _minimiser(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        ridge = 1e-6 * np.trace(self.bend) / len(self.bend) + 1e-12
        values, vectors = np.linalg.eigh(self.bend + ridge * np.eye(len(self.bend)))
        roots = np.sqrt(np.maximum(values, 1e-10))
        high = np.maximum(high, low + 1e-9)
        return lsq_linear((vectors * roots).T, -(vectors / roots).T @ self.slope, bounds=(low, high)).x
