from __future__ import annotations

import numpy as np
import pytest

from palf_dist.learnloss.on_the_fly import ROUNDS, ROUNDS_WITH_SLOPES, STRIDE, OnTheFly
from palf_dist.learnloss.records import Outcome, Sensitivity
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator

SPACE = WeightSpace.of({"a": (1e-3, 1e2), "b": (1e-3, 1e2), "c": (1e-3, 1e2)}, "ce")
GOAL = np.array([1.5, -3.0, 2.0])


def bowl(weights: np.ndarray, slopes: bool) -> Outcome:
    away = (np.log(weights) - GOAL) / [1.0, 2.0, 4.0]
    gradient = away / [1.0, 2.0, 4.0] / weights
    return Outcome(
        np.ones((1, 4)), np.array([1 + 0.5 * away @ away]), Sensitivity(gradient, cost=1) if slopes else None
    )


def settle(guide: OnTheFly, slopes: bool) -> list[np.ndarray]:
    """The weights that the guide leads to, one after the other, from the centre."""
    weights, more, seen = SPACE.weights(SPACE.centre), True, []
    while more:
        weights, more = guide.refine(bowl(weights, slopes))
        seen.append(weights)
    return seen


@pytest.mark.parametrize(("slopes", "rounds"), [(True, ROUNDS_WITH_SLOPES), (False, ROUNDS)])
def test_it_leads_to_the_optimum_within_its_rounds(slopes: bool, rounds: int) -> None:
    guide = OnTheFly(SPACE, seed=1)
    seen = settle(guide, slopes)
    assert len(seen) == len(guide.waypoints) == rounds
    assert all((SPACE.low <= weights).all() and (weights <= SPACE.high).all() for weights in seen)
    assert bowl(seen[-1], slopes).error < 1.03 < 1.2 < bowl(SPACE.weights(SPACE.centre), slopes).error
    np.testing.assert_array_equal(seen, settle(OnTheFly(SPACE, seed=1), slopes))


def test_useless_snapshots_change_nothing_and_others_no_more_than_a_stride() -> None:
    guide, generator = OnTheFly(SPACE), random_generator("snapshots")
    centre = SPACE.weights(SPACE.centre)
    np.testing.assert_allclose(guide.choose(np.full((3, 4), np.nan), np.full(3, np.nan)), centre)
    features, errors = generator.random((30, 4)), generator.random(30)
    first, second = guide.choose(features, errors), guide.choose(features, errors)
    assert 0 < np.abs(np.log(first / centre)).max() < STRIDE * (1 + 1e-9)
    assert 0 < np.abs(np.log(second / first)).max() < STRIDE * (1 + 1e-9)


def test_failures_end_too_and_are_no_waypoints() -> None:
    guide = OnTheFly(SPACE)
    failed = Outcome(np.ones((1, 4)), np.array([np.nan]))
    answers = [guide.refine(failed) for _ in range(ROUNDS)]
    assert [more for _, more in answers] == [True] * (ROUNDS - 1) + [False]
    assert not guide.waypoints and all((weights == answers[0][0]).all() for weights, _ in answers)
    guide = OnTheFly(SPACE)
    weights, _ = guide.refine(bowl(SPACE.weights(SPACE.centre), slopes=True))
    assert guide.refine(failed)[0].shape == weights.shape and len(guide.waypoints) == 1
