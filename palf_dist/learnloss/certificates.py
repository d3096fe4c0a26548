"""How far from the best possible the best weights found can be: bounds that are proven, or words why there is none."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.interpolate import RBFInterpolator

from palf_dist.learnloss.learn_loss import LearnLoss
from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.space import WeightSpace

_SAME = 1e-6  # weights that differ by less than this in log count as the same
_NEAR = 0.5  # trainings with weights this near in log converge alike


@dataclass(frozen=True)
class Certificate:
    """No weights in F train a model whose error is below ``lower_bound``; ``upper_bound`` is the best error in hand."""

    lower_bound: float
    upper_bound: float
    closed: bool  # the gap is within the target
    reason: str  # what is proven and by what means, or why nothing is

    @property
    def gap(self) -> float:
        """The most that better weights could still gain, in units of the error."""
        return max(self.upper_bound - self.lower_bound, 0.0)

    @classmethod
    def of(cls, lower_bound: float, upper_bound: float, target: float, means: str) -> Certificate:
        """``target`` is the gap aimed at, relative to the size of the upper bound."""
        gap, size = max(upper_bound - lower_bound, 0.0), abs(upper_bound)
        closed = bool(np.isfinite(gap) and gap <= target * size)
        share = f"{100 * gap / size:.3g} %" if 0 < size < np.inf else f"{gap:.3g}"
        verdict = "proven" if closed else f"the target of {100 * target:.3g} % is not proven"
        reason = f"{verdict}: no weights lower the best error by more than {share} ({means})"
        return cls(lower_bound, upper_bound, closed, reason)


_UNBOUNDED = 1e99  # stands for infinity where observations must be finite


def finite_certificate(
    space: WeightSpace, features: np.ndarray, lower_bounds: np.ndarray, upper_bound: float, target: float = 0.0
) -> Certificate:
    """For a finite set of models with known features [N, K] and valid lower bounds [N] of their errors (the error
    itself where it is known, -inf where nothing is). Training with some lambda gives a model that lambda supports, so
    that the least bound of those that can be supported holds for every training. ``upper_bound`` is the best error in
    hand."""
    models = Observations()
    models.add(features, np.maximum(lower_bounds, -_UNBOUNDED), training=0, final_last=False)
    assert not models.dropped, "the features must be finite, and the bounds numbers"
    found = LearnLoss(space).solve(models).lower_bound
    lowest = found if found > -_UNBOUNDED else -np.inf
    return Certificate.of(lowest, upper_bound, target, f"{len(models)} models in all")


class ConvexProblem(Protocol):
    """What the ball certificate asks of a problem, e.g. of ``SoftmaxRegression``. Each phi_k and e must be convex and
    differentiable in theta, an array of any shape."""

    space: WeightSpace

    def fit(self, weights: np.ndarray) -> np.ndarray:
        """theta trained with weights [k]."""
        ...

    def loss(self, weights: np.ndarray, theta: np.ndarray, /) -> tuple[float, np.ndarray]:
        """lambda . phi(theta) and its gradient."""
        ...

    def feature_gradients(self, theta: np.ndarray, /) -> np.ndarray:
        """Gradients of the tuned features [k, ...]."""
        ...

    def error(self, theta: np.ndarray, /) -> float:
        """e(theta)."""
        ...

    def error_gradient(self, theta: np.ndarray, /) -> np.ndarray:
        """Gradient of e."""
        ...


@dataclass(frozen=True)
class _Model:
    """A model, trained or not, and what its ball needs; all gradients flat [P]."""

    theta: np.ndarray
    gradients: np.ndarray  # [K, P] of phi
    error: float
    slope: np.ndarray  # gradient of the error


@dataclass(order=True)
class _Cell:
    """A box of weights and a lower bound on the error of every model trained with weights in it."""

    bound: float
    low: np.ndarray = field(compare=False)  # [k]
    high: np.ndarray = field(compare=False)
    model: _Model = field(compare=False)  # the bound rests on it
    reach: float = field(compare=False)  # the bound for the centre alone: smaller boxes around it cannot do better
    trained: int = field(compare=False)  # how many models had been trained then

    @property
    def centre(self) -> np.ndarray:
        return np.sqrt(self.low * self.high)


class BallCertificate:
    """A lower bound on e(theta*(lambda)), theta*(lambda) = argmin lambda . phi, for all lambda in F at once, where
    lambda . phi is mu(lambda)-strongly convex with mu = moduli . lambda > 0.

    Any theta with residual r(lambda) = sum_k lambda_k grad phi_k(theta) obeys r . d >= mu |d|^2, d = theta - theta*:
    theta* lies in the ball with centre theta - q and radius |q|, q = r / (2 mu) (METHODS part 2). As e is convex,
        e(theta*) >= e - grad e . q - |grad e| |q|,   with e and its gradient taken at theta.
    Over a box of lambda, q(lambda) stays in the convex hull of its values at the corners (numerator and denominator are
    affine), and the bound is concave in q: the least over the box is at a corner. So one gradient evaluation bounds a
    whole box, whether theta was trained or not, and branch and bound over boxes does the rest. Between trained models
    theta is interpolated in log lambda, which makes r small of higher order without a training.
    """

    def __init__(self, problem: ConvexProblem, moduli: np.ndarray, target: float = 0.1) -> None:
        """``moduli`` [K] >= 0: phi_k is moduli[k]-strongly convex (1 for half the squared norm of *all* parameters, 0
        where it is merely convex). ``target`` is the gap aimed at, relative to the best error."""
        self.problem, self.target = problem, target
        self.moduli = np.asarray(moduli, float)
        assert len(self.moduli) == problem.space.size + 1 and (self.moduli >= 0).all(), "one modulus >= 0 per feature"
        self.upper_bound = np.inf
        self.evaluations = 0  # of the gradients of the features and of the error, both together
        self._weights: list[np.ndarray] = []
        self._models: list[_Model] = []
        self._shape: tuple[int, ...] = ()
        self._between: Callable[[np.ndarray], np.ndarray] | None = None
        self._open: list[_Cell] = []  # a heap
        self._settled = np.inf  # least bound of the boxes that have reached the target
        self._aside: list[_Cell] = []  # near trained models that are too rough for it
        self._aim = target  # grows when only such boxes are left

    def add(self, weights: np.ndarray, theta: np.ndarray) -> None:
        """A model trained with weights [k]. The bounds are valid however well it has converged; one that is not finite
        is left out."""
        self._shape = theta.shape
        model = self._model(theta.ravel())
        if not np.isfinite([model.error, model.gradients.sum(), model.slope.sum()]).all():
            return
        self.upper_bound = min(self.upper_bound, model.error)
        self._open, self._aside, self._aim = [*self._open, *self._aside], [], self.target
        heapq.heapify(self._open)
        if self._weights and self._distance(weights).min() < _SAME:
            self._models[int(self._distance(weights).argmin())] = model
        else:
            self._weights.append(np.array(weights, float))
            self._models.append(model)
        size, places = self.problem.space.size, np.log(self._weights)
        if np.linalg.matrix_rank(places - places[0], tol=1e-3) == size:
            self._between = RBFInterpolator(places, np.array([m.theta for m in self._models]), kernel="cubic")

    def refine(self, evaluations: int = 1000) -> np.ndarray | None:
        """Tighten the bound with at most so many more gradient evaluations. Returns the weights [k] to train with next
        where only another trained model can help; None when the target is reached, or what the trained models are good
        for, or the evaluations are used up."""
        if not self.moduli.any() or not self._models:
            return None
        most = self.evaluations + evaluations
        if not self._open and not self._aside and self._settled == np.inf:
            self._open.append(self._cell(self.problem.space.low, self.problem.space.high))
        while self.evaluations < most:
            if not self._open:
                if all(cell.bound >= self._goal for cell in self._aside):
                    return None
                self._aim = 2 * max(self._aim, 1e-3)
                self._open, self._aside = self._aside, []
                heapq.heapify(self._open)
            cell = heapq.heappop(self._open)
            if cell.bound >= self._goal and self._aim == self.target:
                self._settled = min(self._settled, cell.bound)
            elif cell.bound >= self._goal:
                self._aside.append(cell)
            elif cell.trained < len(self._models):
                heapq.heappush(self._open, self._cell(cell.low, cell.high, cell))
            elif cell.reach >= self._goal:
                for low, high in _halves(cell):
                    heapq.heappush(self._open, self._cell(low, high, cell))
            elif self._is_rough_near(cell.centre):
                self._aside.append(cell)
            else:
                heapq.heappush(self._open, cell)
                return cell.centre
        return None

    def certificate(self) -> Certificate:
        """What is proven so far."""
        if not self.moduli.any():
            reason = "no bound: the loss is not known to be strongly convex (no feature penalises all parameters)"
            return Certificate(-np.inf, self.upper_bound, False, reason)
        lower = min([self._settled, *(cell.bound for cell in (*self._open, *self._aside))])
        if lower == np.inf:
            return Certificate(-np.inf, self.upper_bound, False, "no bound: nothing has been refined yet")
        means = f"{len(self._models)} trainings, {self.evaluations} gradient evaluations"
        if self._aim > self.target:
            means += "; trainings that converge further could prove more"
        elif self.problem.space.size > 2 and lower < self._goal:
            means += "; with more than two weights there are too many boxes to bound for a useful certificate"
        return Certificate.of(lower, self.upper_bound, self.target, means)

    @property
    def _goal(self) -> float:
        return self.upper_bound - self._aim * abs(self.upper_bound)

    def _is_rough_near(self, weights: np.ndarray) -> bool:
        """Whether a model trained nearby proves too little even for its own weights: so would another one here."""
        away = self._distance(weights)
        nearest, own = self._models[int(away.argmin())], self._weights[int(away.argmin())]
        return bool(away.min() < _NEAR) and self._bound(nearest, own, own) < self._goal

    def _distance(self, weights: np.ndarray) -> np.ndarray:
        return np.abs(np.log(self._weights) - np.log(weights)).max(1)

    def _model(self, theta: np.ndarray) -> _Model:
        self.evaluations += 1
        shaped, weights = theta.reshape(self._shape), self.problem.space.low
        tuned = self.problem.feature_gradients(shaped).reshape(len(weights), -1)
        reference = self.problem.loss(weights, shaped)[1].ravel() - weights @ tuned
        slope = self.problem.error_gradient(shaped).ravel()
        return _Model(theta, np.vstack([reference, tuned]), self.problem.error(shaped), slope)

    def _cell(self, low: np.ndarray, high: np.ndarray, parent: _Cell | None = None) -> _Cell:
        """The box with the best of: the nearest trained model, the one interpolated at its centre, its parent's."""
        centre = np.sqrt(low * high)
        away = self._distance(centre)
        models = [self._models[int(away.argmin())]]
        if self._between is not None and away.min() >= _SAME:
            models.append(self._model(self._between(np.log(centre)[None])[0]))
        if parent is not None:
            models.append(parent.model)
        bounds = [self._bound(model, low, high) for model in models]
        best = int(np.argmax(bounds))
        reach = max(self._bound(model, centre, centre) for model in models)
        return _Cell(bounds[best], low, high, models[best], reach, len(self._models))

    def _bound(self, model: _Model, low: np.ndarray, high: np.ndarray) -> float:
        corners = np.array([(1.0, *corner) for corner in itertools.product(*zip(low, high, strict=True))])
        q = corners @ model.gradients / (2.0 * (corners @ self.moduli))[:, None]
        falls = q @ model.slope + np.linalg.norm(model.slope) * np.linalg.norm(q, axis=1)
        bound = model.error - float(falls.max())
        return bound if np.isfinite(bound) else -np.inf


def _halves(cell: _Cell) -> list[tuple[np.ndarray, np.ndarray]]:
    """The box cut at its centre, across the weight along which the residual changes most."""
    cut = int(((cell.high - cell.low) * np.linalg.norm(cell.model.gradients[1:], axis=1)).argmax())
    upper, lower = cell.high.copy(), cell.low.copy()
    upper[cut] = lower[cut] = cell.centre[cut]
    return [(cell.low, upper), (lower, cell.high)]


def certify(
    problem: ConvexProblem, moduli: np.ndarray, trainings: int = 60, target: float = 0.1, evaluations: int = 1000
) -> Certificate:
    """The ball certificate with at most so many trainings of its own, and gradient evaluations between two of them."""
    ball = BallCertificate(problem, moduli, target)
    weights: np.ndarray | None = problem.space.weights(problem.space.centre)
    for _ in range(trainings):
        if weights is None:
            break
        ball.add(weights, problem.fit(weights))
        weights = ball.refine(evaluations)
    return ball.certificate()
