"""Softmax regression whose loss is linear in features: the convex problem on which TuneLoss has all its tiers.

Derivatives are in closed form; the implicit ones come from preconditioned conjugate gradients on the training Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize

from palf_dist.learnloss.records import Choose, Outcome, Refine, Sensitivity
from palf_dist.learnloss.space import WeightSpace

SMOOTHING = 1e-3
"""|w| is smoothed to sqrt(w^2 + SMOOTHING^2) - SMOOTHING, so that the l1 feature has derivatives."""
DENSE_SNAPSHOTS, SPARSE_EVERY = 30, 5  # every iterate at first, later each fifth one
CHUNK, CHOICES, SEGMENT = 10, 8, 20  # on the fly: iterations to a choice, how many of these, iterations to settle down
SOLVER_TOLERANCE, SOLVER_ITERATIONS = 3e-2, 60


@dataclass(frozen=True)
class LabelledRows:
    """Inputs [n, d] and labels [n] in 0 .. C - 1."""

    inputs: np.ndarray
    labels: np.ndarray


class SoftmaxRegression:
    """Logits z = x W, W [d, C], loss lambda . phi(W) with the reference feature ``ce`` and any of

    - l1: smoothed sum of |w|, over all rows of W that belong to a group
    - the name of a group: half the sum of w^2 over the group's rows of W (group-wise L2)
    - label_smoothing: mean over rows and classes of -log p
    - logit_penalty: half the mean over rows of |z|^2

    e is the mean cross-entropy of the validation rows. Rows of W in no group (an intercept) are free of l1 and L2.
    """

    def __init__(
        self,
        train: LabelledRows,
        validation: LabelledRows,
        classes: int,
        groups: Mapping[str, np.ndarray],
        ranges: Mapping[str, Sequence[float]],
        *,
        derivatives: Literal["none", "adjoint", "curvature"] = "curvature",
        max_iterations: int = 250,
    ) -> None:
        """
        Args:
            groups: name -> bool [d], the rows of W with that L2 weight; they must not overlap.
            ranges: tuned feature -> (low, high) of its weight, see WeightSpace.
            derivatives: what outcomes offer: nothing, d e / d lambda by one linear solve, or also its curvature by k.
        """
        self.space = WeightSpace.of(ranges, "ce")
        unknown = set(self.space.names) - {"l1", "label_smoothing", "logit_penalty", *groups}
        assert not unknown, f"no such features: {unknown}"
        self.train_rows, self.validation = train, validation
        self.classes, self.derivatives, self.max_iterations = classes, derivatives, max_iterations
        self._targets = np.eye(classes)[train.labels]
        self._squared = train.inputs**2
        self._masks = {name: np.asarray(mask, float)[:, None] for name, mask in groups.items()}
        self._penalised = sum(self._masks.values(), np.zeros((train.inputs.shape[1], 1)))
        assert self._penalised.max(initial=0) <= 1, "groups overlap"

    @property
    def shape(self) -> tuple[int, int]:
        """(d, C) of the coefficients."""
        return self.train_rows.inputs.shape[1], self.classes

    def train(self, weights: np.ndarray) -> Outcome:
        snapshots, cost = self._minimise(weights, np.zeros(self.shape), self.max_iterations)
        return self._outcome(weights, snapshots, cost)

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        weights, snapshots, cost = self.space.weights(self.space.centre), [np.zeros(self.shape)], 0
        features, errors = np.zeros((0, self.space.size + 1)), np.zeros(0)
        for _ in range(CHOICES):
            new, spent = self._minimise(weights, snapshots[-1], CHUNK)
            snapshots, cost = snapshots + new, cost + spent
            features = np.vstack([features, [self.features(w) for w in new]])
            errors = np.append(errors, [self.error(w) for w in new])
            weights = choose(features, errors)
        more = refine is not None
        while more:
            assert refine is not None
            new, spent = self._minimise(weights, snapshots[-1], SEGMENT)
            snapshots, cost = [*snapshots, new[-1]], cost + spent
            weights, more, spent = self._refined(refine, weights, new[-1])
            cost += spent
        new, spent = self._minimise(weights, snapshots[-1], self.max_iterations)
        return weights, self._outcome(weights, [*snapshots[1:], new[-1]], cost + spent)

    def fit(self, weights: np.ndarray) -> np.ndarray:
        """Coefficients [d, C] trained with the given weights [k]."""
        return self._minimise(weights, np.zeros(self.shape), self.max_iterations)[0][-1]

    def features(self, coefficients: np.ndarray) -> np.ndarray:
        """phi [K] of coefficients [d, C], the reference first."""
        logits = self.train_rows.inputs @ coefficients
        log_p = _log_softmax(logits)
        rows = len(logits)
        values = {name: 0.5 * float((mask * coefficients**2).sum()) for name, mask in self._masks.items()}
        values["ce"] = -float((self._targets * log_p).sum()) / rows
        values["l1"] = float((self._penalised * (_smooth(coefficients) - SMOOTHING)).sum())
        values["label_smoothing"] = -float(log_p.mean())
        values["logit_penalty"] = 0.5 * float((logits**2).sum()) / rows
        return np.array([values[name] for name in ("ce", *self.space.names)])

    def error(self, coefficients: np.ndarray) -> float:
        """Validation cross-entropy, in nats."""
        rows = self.validation
        log_p = _log_softmax(rows.inputs @ coefficients)
        return -float(log_p[np.arange(len(log_p)), rows.labels].mean())

    def error_gradient(self, coefficients: np.ndarray) -> np.ndarray:
        """d e / d W [d, C]."""
        rows = self.validation
        p = np.exp(_log_softmax(rows.inputs @ coefficients))
        p[np.arange(len(p)), rows.labels] -= 1
        return rows.inputs.T @ p / len(p)

    def loss(self, weights: np.ndarray, coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        """lambda . phi(W) and its gradient [d, C]."""
        tuned = self.space.named(weights)
        smoothing, penalty, l1 = (tuned.get(name, 0.0) for name in ("label_smoothing", "logit_penalty", "l1"))
        inputs, rows = self.train_rows.inputs, len(self._targets)
        logits = inputs @ coefficients
        log_p = _log_softmax(logits)
        value = -float((self._targets * log_p).sum()) / rows
        back = ((1 + smoothing) * np.exp(log_p) - self._targets - smoothing / self.classes) / rows
        if smoothing:
            value -= smoothing * float(log_p.mean())
        if penalty:
            value += 0.5 * penalty * float((logits**2).sum()) / rows
            back += penalty / rows * logits
        gradient = inputs.T @ back
        l2 = self._l2(tuned)
        value += 0.5 * float((l2 * coefficients**2).sum())
        gradient += l2 * coefficients
        if l1:
            smooth = _smooth(coefficients)
            value += l1 * float((self._penalised * (smooth - SMOOTHING)).sum())
            gradient += l1 * self._penalised * coefficients / smooth
        return value, gradient

    def feature_gradients(self, coefficients: np.ndarray) -> np.ndarray:
        """d phi / d W of the tuned features, [k, d, C]."""
        inputs = self.train_rows.inputs
        logits = inputs @ coefficients
        rows = len(logits)
        values = {name: mask * coefficients for name, mask in self._masks.items()}
        if "l1" in self.space.names:
            values["l1"] = self._penalised * coefficients / _smooth(coefficients)
        if "label_smoothing" in self.space.names:
            values["label_smoothing"] = inputs.T @ (np.exp(_log_softmax(logits)) - 1 / self.classes) / rows
        if "logit_penalty" in self.space.names:
            values["logit_penalty"] = inputs.T @ logits / rows
        return np.stack([values[name] for name in self.space.names])

    def hessian_products(self, weights: np.ndarray, coefficients: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """H V of the training loss for vectors [k, d, C]."""
        tuned = self.space.named(weights)
        smoothing, penalty = tuned.get("label_smoothing", 0.0), tuned.get("logit_penalty", 0.0)
        inputs = self.train_rows.inputs
        p = np.exp(_log_softmax(inputs @ coefficients))
        moved = inputs @ vectors
        back = (1 + smoothing) * _fisher(p, moved) + penalty * moved
        return inputs.T @ back / len(p) + self._diagonal(tuned, coefficients) * vectors

    def sensitivity(self, weights: np.ndarray, coefficients: np.ndarray) -> Sensitivity:
        """d e / d lambda at a minimiser, and with ``derivatives="curvature"`` also V^T (d2e / dW2) V."""
        if self.derivatives == "adjoint":
            return self._adjoint(weights, coefficients)
        gradients, validation = self.feature_gradients(coefficients), self.error_gradient(coefficients)
        solved, products = self._solve(weights, coefficients, gradients)
        rows = self.validation.inputs
        moved = rows @ solved
        p = np.exp(_log_softmax(rows @ coefficients))
        curvature = np.einsum("inc,jnc->ij", moved, _fisher(p, moved)) / len(p)
        gradient = -np.einsum("kdc,dc->k", solved, validation)
        return Sensitivity(gradient, 0.5 * (curvature + curvature.T), cost=2 * products)

    def _adjoint(self, weights: np.ndarray, coefficients: np.ndarray) -> Sensitivity:
        """d e / d lambda alone, by one solve."""
        solved, products = self._solve(weights, coefficients, self.error_gradient(coefficients)[None])
        gradient = -(self.feature_gradients(coefficients) * solved).sum((1, 2))
        return Sensitivity(gradient, None, cost=2 * products)

    def _outcome(self, weights: np.ndarray, snapshots: list[np.ndarray], cost: int) -> Outcome:
        last = snapshots[-1]
        return Outcome(
            features=np.array([self.features(w) for w in snapshots]),
            errors=np.array([self.error(w) for w in snapshots]),
            sensitivity=None if self.derivatives == "none" else lambda: self.sensitivity(weights, last),
            cost=cost,
            models=snapshots,
        )

    def _refined(self, refine: Refine, weights: np.ndarray, model: np.ndarray) -> tuple[np.ndarray, bool, int]:
        """The answer of ``refine`` to a model with these weights, and the gradient evaluations that its derivatives
        took: the gradient alone, since k solves would cost more than it takes to settle down."""
        cost = 0

        def derivatives() -> Sensitivity:
            nonlocal cost
            sensitivity = self._adjoint(weights, model)
            cost += sensitivity.cost
            return sensitivity

        offered = None if self.derivatives == "none" else derivatives
        settled = Outcome(np.array([self.features(model)]), np.array([self.error(model)]), offered)
        following, more = refine(settled)
        return following, more, cost

    def _minimise(self, weights: np.ndarray, start: np.ndarray, iterations: int) -> tuple[list[np.ndarray], int]:
        """Snapshots from ``start`` (left out) to the minimiser, and the gradient evaluations taken."""
        snapshots: list[np.ndarray] = []
        count = 0

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self.loss(weights, flat.reshape(self.shape))
            return value, gradient.ravel()

        def keep(flat: np.ndarray) -> None:
            nonlocal count
            count += 1
            if count <= DENSE_SNAPSHOTS or count % SPARSE_EVERY == 0:
                snapshots.append(flat.reshape(self.shape).copy())

        options = {"maxiter": iterations, "maxcor": 20, "gtol": 1e-5, "ftol": 1e-9}
        result = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", callback=keep, options=options)
        snapshots.append(result.x.reshape(self.shape))
        return snapshots, int(result.nfev)

    def _solve(self, weights: np.ndarray, coefficients: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, int]:
        """H^{-1} of each of ``sides`` [k, d, C] by conjugate gradients with a diagonal preconditioner, and the products
        of H with one vector that it took."""
        tuned = self.space.named(weights)
        p = np.exp(_log_softmax(self.train_rows.inputs @ coefficients))
        smoothing, penalty = tuned.get("label_smoothing", 0.0), tuned.get("logit_penalty", 0.0)
        diagonal = (1 + smoothing) * (self._squared.T @ (p * (1 - p))) + penalty * self._squared.sum(0)[:, None]
        inverse = 1 / (diagonal / len(p) + self._diagonal(tuned, coefficients) + 1e-12)
        solved, residual = np.zeros_like(sides), sides.copy()
        direction = inverse * residual
        product = (residual * direction).sum((1, 2), keepdims=True)
        target = SOLVER_TOLERANCE * np.sqrt((sides**2).sum((1, 2)))
        products = 0
        for _ in range(SOLVER_ITERATIONS):
            going = np.flatnonzero(np.sqrt((residual**2).sum((1, 2))) > target)
            if not len(going):
                break
            along = direction[going]
            moved = self.hessian_products(weights, coefficients, along)
            step = product[going] / ((along * moved).sum((1, 2), keepdims=True) + 1e-300)
            solved[going] += step * along
            residual[going] -= step * moved
            scaled = inverse * residual[going]
            before, product[going] = product[going], (residual[going] * scaled).sum((1, 2), keepdims=True)
            direction[going] = scaled + product[going] / (before + 1e-300) * along
            products += len(going)
        return solved, products

    def _l2(self, tuned: Mapping[str, float]) -> np.ndarray:
        zero = np.zeros_like(self._penalised)
        return sum((tuned.get(name, 0.0) * mask for name, mask in self._masks.items()), zero)

    def _diagonal(self, tuned: Mapping[str, float], coefficients: np.ndarray) -> np.ndarray:
        """The part of the Hessian that is diagonal, [d, C]."""
        l1 = tuned.get("l1", 0.0) * self._penalised * SMOOTHING**2 / _smooth(coefficients) ** 3
        return self._l2(tuned) + l1


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _smooth(values: np.ndarray) -> np.ndarray:
    return np.sqrt(values**2 + SMOOTHING**2)


def _fisher(p: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """(diag(p) - p p^T) applied to moved [k, n, C], row by row."""
    weighted = p * moved
    return weighted - p * weighted.sum(-1, keepdims=True)
