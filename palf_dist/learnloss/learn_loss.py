"""LearnLoss: the best that any loss weights could do on the snapshots seen so far, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from palf_dist.learnloss import choice
from palf_dist.learnloss.cone import TOLERANCE, Cone, Witness
from palf_dist.learnloss.linear_program import LinearProgram, minimise
from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.space import WeightSpace

_WITNESSES = 256  # how many proofs are kept to settle new observations with


@dataclass(frozen=True)
class Solution:
    """The observation with the least error that is the minimiser of lambda . phi over all observations for some lambda
    in F, and such a lambda."""

    winner: int | None  # its index; None without observations
    weights: np.ndarray  # [k] the centre of the winner's cone: the lambda with the largest least margin
    lower_bound: float  # the winner's error: no lambda in F makes a better one of these observations the minimiser
    active: list[int]  # observations that bound the cone there
    solves: int  # linear programs solved


class LearnLoss:
    """Finds, among growing observations, the best one that some lambda in F supports (METHODS part 2; Streeter 2019),
    by constraint generation with a warm-started linear program for each candidate in the order of the errors.

    A candidate that no lambda supports is dead for ever, since more observations only add constraints: which ones are
    dead is kept between calls, and so are the combinations that prove it, which settle most new observations without a
    linear program. None of this changes an answer: a search may continue with a new LearnLoss.
    """

    def __init__(self, space: WeightSpace) -> None:
        self.space = space
        self.dead = np.zeros(0, bool)  # [N] of the observations of the last call
        self._scale = np.r_[1.0, space.high]
        self._low = space.low / space.high
        self._cost = np.r_[np.zeros(space.size), -1.0]  # over x = lambda / high and the margin t, which is maximised
        self._box = np.r_[self._low, -2.0], np.r_[np.ones(space.size), 2.0]
        self._program = LinearProgram(self._cost, *self._box)
        self._x = np.sqrt(self._low)
        self._active: list[int] = []
        self._witnesses: list[Witness] = []

    def solve(self, observations: Observations) -> Solution:
        """The winner among ``observations``, which are those of the last call and perhaps more (the errors of the
        earlier ones may have changed, not their features)."""
        if not len(observations):
            return Solution(None, self.space.weights(self.space.centre), -np.inf, [], 0)
        scaled = observations.features * self._scale
        known = len(self.dead)
        assert len(scaled) >= known, "the observations may only grow"
        self.dead = np.concatenate([self.dead, np.zeros(len(scaled) - known, bool)])
        for witness in self._witnesses:
            self.dead[known:] |= witness.beats(scaled[known:], self._low)
        solves = 0
        for i in np.argsort(observations.errors, kind="stable").tolist():
            if not self.dead[i]:
                solves += self._test(scaled, i)
            if not self.dead[i]:
                return self._solution(scaled, i, float(observations.errors[i]), solves)
        raise AssertionError("some observation is always supported")

    def _test(self, scaled: np.ndarray, i: int) -> int:
        """Whether some lambda supports i; if not, i is dead, and so is whatever the same proof covers. Returns how many
        linear programs it took. The rows of dead observations follow from the others and are left out."""
        alive = np.flatnonzero(~self.dead)
        cone = Cone(scaled[alive], int(np.searchsorted(alive, i)))
        slopes = np.ones(len(alive))
        kept = np.searchsorted(alive, [j for j in self._active if not self.dead[j]])
        active = kept[cone.norms[kept] > 0].tolist()
        self._program.replace(*cone.rows(slopes, active))
        solves = 0
        while True:
            margins = cone.margins(self._x)
            worst = int(margins.argmin())
            known = worst in active
            if margins[worst] >= -TOLERANCE or (known and solves):  # the latter: violated by rounding alone
                break
            if not known:
                active.append(worst)
                self._program.add(*cone.rows(slopes, [worst]))
            optimum = self._program.solve()
            assert optimum is not None, "the margin is free: there is always a solution"
            solves += 1
            self._x = np.clip(optimum.point[:-1], self._low, 1.0)
            if optimum.point[-1] < -TOLERANCE:
                self._bury(scaled, i, alive[active], optimum.multipliers / cone.norms[active])
                break
        self._active = alive[active].tolist()
        return solves

    def _bury(self, scaled: np.ndarray, i: int, beating: np.ndarray, shares: np.ndarray) -> None:
        """i is dead: the multipliers of the linear program combine observations to one that beats it everywhere."""
        witness = Witness.of(scaled[beating], shares)
        alive = np.flatnonzero(~self.dead)
        self.dead[alive] = witness.beats(scaled[alive], self._low)
        self.dead[i] = True
        self._witnesses = [*self._witnesses[1 - _WITNESSES :], witness]

    def _solution(self, scaled: np.ndarray, i: int, error: float, solves: int) -> Solution:
        """The centre of i's cone, found afresh from all observations, so that it does not depend on earlier calls."""
        cone = Cone(scaled, i)
        slopes = (cone.norms > 0).astype(float)
        found = minimise(self._cost, self._box, *cone.rows(slopes), [], TOLERANCE)
        assert found is not None, "the margin is free: there is always a solution"
        weights = np.clip(found.point[:-1] * self.space.high, self.space.low, self.space.high)
        return Solution(i, weights, error, found.active, solves + found.solves)


def choose_weights(
    space: WeightSpace, observations: Observations, solution: Solution, kind: Literal["margin", "slack", "nnls"]
) -> np.ndarray:
    """Weights lambda [k] in F to train with, given the winner among ``observations`` (at least one).

    ``margin``: in the winner's cone, the largest t with lambda . (phi_j - phi_i) >= t max(e_j - e_i, 0) for all j: the
    loss grows at least like the error. ``slack``: in the cone, the best fit of the loss to the error from above,
    min sum_j w_j (lambda . phi_j - c - alpha e_j) with no term negative, w_j falling with the error. ``nnls``: the best
    fit of the error by the loss in least squares, e = c + a lambda . phi with a > 0, anywhere in F: for a noisy error,
    which makes the winner a matter of luck. Where the observations cannot tell, the centre of the cone. The error may
    have any sign, scale and offset.
    """
    winner = solution.winner
    assert winner is not None, "there is nothing to choose by"
    features, errors = observations.features, observations.errors
    if kind == "nnls":
        weights = choice.least_squares(features, errors, space)
    else:
        cone, low = Cone(features * np.r_[1.0, space.high], winner), space.low / space.high
        if kind == "margin":
            x = choice.margin(cone, np.maximum(errors - errors[winner], 0.0), low, solution.active)
        else:
            x = choice.slack(cone, errors, low, solution.active)
        weights = None if x is None else np.clip(x * space.high, space.low, space.high)
    return solution.weights if weights is None else weights
