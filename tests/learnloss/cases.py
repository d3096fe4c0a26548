"""A small strongly convex problem in closed form, and random finite sets, for the tests of LearnLoss."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator


def box(size: int, decades: float = 6.0) -> WeightSpace:
    half = 10 ** (decades / 2)
    return WeightSpace("reference", tuple(f"w{k}" for k in range(size)), np.full(size, 1 / half), np.full(size, half))


def observed(features: np.ndarray, errors: np.ndarray) -> Observations:
    observations = Observations()
    observations.add(features, errors, training=0, final_last=True)
    return observations


def finite_set(seed: int, size: int, count: int, spread: float, grid: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, size + 1] and errors [count]: near the lower side of a sphere, so that many are supported, or on
    a coarse grid with ties and repeated rows; the units of the features over twice ``spread`` decades."""
    generator = random_generator("finite_set", seed)
    features = np.abs(generator.normal(size=(count, size + 1)))
    features = 2 - features / np.linalg.norm(features, axis=1, keepdims=True) * generator.uniform(0.8, 1, (count, 1))
    if grid:
        features = np.round(features * 4)
    features *= 10 ** generator.uniform(-spread, spread, size + 1)
    errors = generator.normal(size=count)
    return features, np.round(errors, 1) if grid else errors


def margin_by_one_program(space: WeightSpace, features: np.ndarray, i: int) -> float:
    """The largest t with lambda . (phi_j - phi_i) / n_j >= t for all j, with all rows at once."""
    scaled = features * np.r_[1.0, space.high]
    rows = np.delete(scaled - scaled[i], i, 0)
    norms = np.abs(rows).sum(1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    if not len(rows):
        return 1.0
    answer = linprog(
        np.r_[np.zeros(space.size), -1.0],
        A_ub=np.column_stack([-rows[:, 1:], np.ones(len(rows))]),
        b_ub=rows[:, 0],
        bounds=[*((low / high, 1.0) for low, high in zip(space.low, space.high, strict=True)), (-2.0, 2.0)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert answer.success
    return -answer.fun


class Quadratics:
    """phi_k(theta) = 1/2 (theta - a_k)' H_k (theta - a_k), trained by gradient flow from 0."""

    def __init__(self, seed: int, size: int, parameters: int = 12) -> None:
        generator = random_generator("quadratics", seed)
        factors = generator.normal(size=(size + 1, parameters, parameters))
        self.hessians = factors @ factors.transpose(0, 2, 1) / parameters + 0.05 * np.eye(parameters)
        self.centres = generator.normal(size=(size + 1, parameters))
        self.space = box(size, decades=4.0)

    def features(self, theta: np.ndarray) -> np.ndarray:
        """phi [n, K] of theta [n, P]."""
        away = theta[:, None] - self.centres
        return 0.5 * np.einsum("nkp,kpq,nkq->nk", away, self.hessians, away)

    def train(self, weights: np.ndarray, snapshots: int = 30) -> np.ndarray:
        """theta [snapshots, P] on the way; the last is the minimiser of lambda . phi."""
        full = np.r_[1.0, weights]
        hessian = np.tensordot(full, self.hessians, 1)
        best = np.linalg.solve(hessian, np.einsum("k,kpq,kq->p", full, self.hessians, self.centres))
        values, vectors = np.linalg.eigh(hessian)
        times = np.geomspace(0.1, 300, snapshots - 1) / values[-1]
        path = best - np.exp(-np.outer(times, values)) * (vectors.T @ best) @ vectors.T
        return np.vstack([path, best])
