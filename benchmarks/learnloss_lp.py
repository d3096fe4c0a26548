"""What a LearnLoss proposal costs on a growing stream of snapshots: one LearnLoss that is kept, against a new one each
time, and the ratio of the two in the same run. ``python -m benchmarks.learnloss_lp``"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from palf_dist.learnloss.learn_loss import LearnLoss, Solution, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator

FEATURES, PARAMETERS = 8, 24
SNAPSHOTS = 60  # of each training
COUNTS = (1_000, 10_000)
REPEATS = 5  # trainings at which both are timed, the last ones
SPACE = WeightSpace.of({f"w{k}": (1e-5, 10.0) for k in range(1, FEATURES)}, "w0")


class Trainings:
    """Gradient flow on random quadratics phi_k with random weights: features [n, K] and errors [n] of its snapshots.
    The error, a quadratic too, is least between where it starts and where it ends: the best snapshots are dead."""

    def __init__(self) -> None:
        self.generator = random_generator("learnloss_lp")
        factors = self.generator.normal(size=(FEATURES, PARAMETERS, PARAMETERS))
        factors *= np.exp(self.generator.normal(size=(FEATURES, PARAMETERS, 1)))
        hessians = factors @ factors.transpose(0, 2, 1) / PARAMETERS + 0.01 * np.eye(PARAMETERS)
        centres = 2 * self.generator.normal(size=(FEATURES, PARAMETERS))
        mixture = np.tensordot(self.generator.random(FEATURES) ** 3, hessians, 1)
        self.hessians = np.concatenate([hessians, mixture[None]])
        self.centres = np.vstack([centres, centres.mean(0) + 0.5 * self.generator.normal(size=PARAMETERS)])

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        weights = np.r_[1.0, SPACE.weights(SPACE.sample(self.generator, 1)[0])]
        hessian = np.tensordot(weights, self.hessians[:-1], 1)
        best = np.linalg.solve(hessian, np.einsum("k,kpq,kq->p", weights, self.hessians[:-1], self.centres[:-1]))
        values, vectors = np.linalg.eigh(hessian)
        steps = np.geomspace(0.3, 3000, SNAPSHOTS) / values[-1]
        away = (best - np.exp(-np.outer(steps, values)) * (vectors.T @ best) @ vectors.T)[:, None] - self.centres
        phi = 0.5 * np.einsum("nkp,kpq,nkq->nk", away, self.hessians, away)
        return phi[:, :-1], phi[:, -1]


def proposal(learner: LearnLoss, observations: Observations) -> tuple[float, Solution]:
    """CPU seconds, and what it found."""
    start = time.process_time()
    solution = learner.solve(observations)
    choose_weights(SPACE, observations, solution, "slack")
    return time.process_time() - start, solution


def main() -> None:
    table = Table("observations", "cold ms", "LPs", "warm ms", "LPs", "cold / warm", "dead")
    train, observations, warm = Trainings(), Observations(), LearnLoss(SPACE)
    times: list[tuple[float, float]] = []
    training = 0
    while len(observations) < max(COUNTS):
        observations.add(*train(), training, final_last=True)
        training += 1
        seconds, solution = proposal(warm, observations)
        due = [count for count in COUNTS if count <= len(observations) + (REPEATS - 1) * SNAPSHOTS]
        if due and len(observations) < due[-1] + SNAPSHOTS:
            cold, fresh = proposal(LearnLoss(SPACE), observations)
            assert fresh.winner == solution.winner
            times.append((cold, seconds))
            if len(observations) >= due[-1]:
                cold, seconds = (median(column) for column in zip(*times, strict=True))
                counts = (f"{len(observations):,}", f"{1e3 * cold:.0f}", str(fresh.solves), f"{1e3 * seconds:.0f}")
                table.add_row(*counts, str(solution.solves), f"{cold / seconds:.1f}", f"{warm.dead.sum():,}")
                times.clear()
    Console().print(table)


if __name__ == "__main__":
    main()
