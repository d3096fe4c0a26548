"""The guide of one training whose weights change while it runs: LearnLoss on its raw snapshots at first, then a local
search in which the models it settles down to count as trainings do."""

from __future__ import annotations

import numpy as np

from palf_dist.learnloss.learn_loss import LearnLoss, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.records import Outcome, Waypoint
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.surrogate import Points, Surrogate
from palf_dist.randomness import random_generator

STRIDE = 1.0  # log units: raw snapshots may move the weights that far at once, or they would send them to a corner
ROUNDS, ROUNDS_WITH_SLOPES = 20, 8  # how many models to settle down to
FIRST_RADIUS, LEAST_RADIUS, LARGEST_RADIUS = 1.0, 0.3, 3.0  # log units: where the surrogate is believed
WIDER, NARROWER = 1.5, 0.85  # the radius, after a promise that was kept or not


class OnTheFly:
    """``choose`` and ``refine`` are for Problem.train_on_the_fly; ``waypoints`` for TuneLoss.tell. For one training."""

    def __init__(self, space: WeightSpace, seed: int = 0) -> None:
        self.space = space
        self.waypoints: list[Waypoint] = []
        self._u = space.centre  # log of the weights in force
        self._rounds = 0
        self._radius = FIRST_RADIUS
        self._promised: float | None = None  # error that the surrogate expects at u
        self._hyperparameters: np.ndarray | None = None
        self._generator = random_generator("on the fly", seed)
        turned = np.linalg.qr(self._generator.normal(size=(space.size, space.size)))[0]
        self._directions = turned * np.sqrt(space.size) / 2  # [k, k], about as long as a random point of the cube is

    def choose(self, features: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Weights [k] by LearnLoss, towards which the last ones move by STRIDE at most."""
        known = np.isfinite(np.column_stack([features, errors])).all(1)
        if known.any():
            towards = np.log(learn_weights(self.space, features[known], errors[known]))
            self._u = self._u + np.clip(towards - self._u, -STRIDE, STRIDE)
        return self.space.weights(self._u)

    def refine(self, settled: Outcome) -> tuple[np.ndarray, bool]:
        """The next weights [k], and whether more are to follow: the least mean of the surrogate not far from the best
        waypoint. Without slopes the first k + 1 waypoints are apart in directions orthogonal to one another."""
        self._rounds += 1
        if np.isfinite(settled.error):
            self._learn_from(settled)
        else:
            self._radius = max(NARROWER * self._radius, LEAST_RADIUS)
        if self.waypoints:
            self._u = self._next()
        sloped = any(waypoint.gradient is not None for waypoint in self.waypoints)
        return self.space.weights(self._u), self._rounds < (ROUNDS_WITH_SLOPES if sloped else ROUNDS)

    def _learn_from(self, settled: Outcome) -> None:
        if self._promised is not None:
            before = min(waypoint.error for waypoint in self.waypoints)
            kept = (before - settled.error) / max(before - self._promised, 1e-12)
            if kept > 0.5:
                self._radius = min(WIDER * self._radius, LARGEST_RADIUS)
            elif kept < 0.25:
                self._radius = max(NARROWER * self._radius, LEAST_RADIUS)
        sensitivity = settled.derivatives()
        gradient = None if sensitivity is None else sensitivity.gradient
        self.waypoints.append(Waypoint(self.space.weights(self._u), settled.error, gradient))

    def _next(self) -> np.ndarray:
        points = Points.of([(w.weights, w.error, w.gradient) for w in self.waypoints], self.space.size)
        best, done = points.u[points.errors.argmin()], len(self.waypoints)
        if not np.isfinite(points.slopes).any() and done <= self.space.size:
            side = self._generator.choice([-1.0, 1.0])
            return self.space.clip(best + FIRST_RADIUS * side * self._directions[done - 1])
        surrogate = Surrogate(points, self._hyperparameters)
        self._hyperparameters = surrogate.hyperparameters
        region = self.space.clip(best - self._radius), self.space.clip(best + self._radius)
        u = surrogate.minimise(*region, self._generator)
        self._promised = surrogate.error(u)
        return u


def learn_weights(space: WeightSpace, features: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Weights [k] by LearnLoss from the snapshots, features [n, K] and errors [n], of one training that goes on. From
    scratch, so that they depend on the snapshots alone; with the tens of a training that takes milliseconds."""
    observations = Observations()
    observations.add(features, errors, training=0, final_last=False)
    return choose_weights(space, observations, LearnLoss(space).solve(observations), "margin")
