"""What a training tells the search, and what the search asks of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from palf_dist.learnloss.space import WeightSpace


@dataclass(frozen=True)
class Sensitivity:
    """How the validation error of a trained model changes with the weights, by implicit differentiation at
    theta* = argmin lambda . phi: with V = H^{-1} grad phi [P, k] (H the Hessian of the training loss),
    d e / d lambda = -V^T grad e."""

    gradient: np.ndarray  # [k] d e / d lambda (with respect to lambda, not to log lambda)
    curvature: np.ndarray | None = None  # [k, k] V^T (Hessian of e) V, Gauss-Newton part; None: adjoint only (HOAG)
    cost: int = 0  # gradient evaluations that it took; a Hessian-vector product counts as two


@dataclass(frozen=True)
class Outcome:
    """One training: what was seen on the way (snapshots), and last of all the trained model itself."""

    features: np.ndarray  # [n, K] phi of each snapshot, the reference first; the last row is the trained model
    errors: np.ndarray  # [n] validation error e of each; the last is the trained model's
    sensitivity: Sensitivity | Callable[[], Sensitivity | None] | None = None  # a callable only runs where it is of use
    cost: int = 0  # gradient evaluations of the training
    models: Sequence[np.ndarray] | None = None  # parameters of each snapshot, where the problem gives them

    @property
    def error(self) -> float:
        """e of the trained model; NaN or infinite when the training failed."""
        return float(self.errors[-1])

    def derivatives(self) -> Sensitivity | None:
        """The sensitivity, computed now where it was left for later. Derivatives that are not finite are left out."""
        found = self.sensitivity() if callable(self.sensitivity) else self.sensitivity
        if found is None or not np.isfinite(found.gradient).all():
            return None
        if found.curvature is not None and not np.isfinite(found.curvature).all():
            return replace(found, curvature=None)
        return found


@dataclass(frozen=True)
class Waypoint:
    """A model that a training on the fly had settled down to before its weights changed again."""

    weights: np.ndarray  # [k]
    error: float
    gradient: np.ndarray | None = None  # [k] d e / d lambda

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        gradient = None if self.gradient is None else self.gradient.tolist()
        return {"weights": self.weights.tolist(), "error": self.error, "gradient": gradient}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Waypoint:
        gradient = None if state["gradient"] is None else np.array(state["gradient"], float)
        return cls(np.array(state["weights"], float), state["error"], gradient)


@dataclass(frozen=True)
class Proposal:
    """Weights to train with."""

    identifier: int
    weights: np.ndarray  # [k] of the tuned features
    kind: str  # why: start | on_the_fly | learn_loss | model | surrogate | restart | retest
    predicted: float | None = None  # error that the model of the step promises, where there is one


Choose = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""LearnLoss as a training sees it: (features [n, K], errors [n]) of all its snapshots so far -> weights [k]."""
Refine = Callable[[Outcome], tuple[np.ndarray, bool]]
"""What a training has settled down to (one row; the gradient is enough of a sensitivity) -> weights [k] to settle down
to next, and whether to ask again then: if not, they are the last and the training converges with them."""


class Problem(Protocol):
    """A training problem whose loss weights can be tuned in this process."""

    space: WeightSpace

    def train(self, weights: np.ndarray) -> Outcome:
        """Train to convergence from the same start with the given weights [k]. Raises nothing for bad weights: an
        outcome whose last error is not finite is a failed training."""
        ...

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        """One training that asks ``choose`` for new weights every few iterations, then ``refine`` each time it has
        settled down (where it can settle down early at all), and converges with the last weights, which it returns."""
        ...
