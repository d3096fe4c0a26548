from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from palf_dist.learnloss.learn_loss import LearnLoss, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.randomness import random_generator
from tests.learnloss.cases import Quadratics, box, finite_set, observed


def stream(seed: int, size: int, trainings: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features [n, K] and errors [n] of trainings with random weights."""
    problem, generator = Quadratics(seed, size), random_generator("stream", seed)
    target = generator.normal(size=problem.centres.shape[1])
    batches = []
    for u in problem.space.sample(generator, trainings):
        theta = problem.train(problem.space.weights(u))
        batches.append((problem.features(theta), np.sum((theta - target) ** 2, axis=1) - 3.0))
    return batches


def test_without_observations_there_is_no_winner() -> None:
    space = box(3)
    solution = LearnLoss(space).solve(Observations())
    assert solution.winner is None
    assert solution.lower_bound == -np.inf
    np.testing.assert_allclose(solution.weights, 1.0)


def test_one_observation_wins() -> None:
    solution = LearnLoss(box(2)).solve(observed(np.ones((1, 3)), np.array([-4.0])))
    assert (solution.winner, solution.lower_bound) == (0, -4.0)


def test_the_least_error_does_not_win_where_no_weights_support_it() -> None:
    features = np.array([[0.0, 1.0], [1.0, 0.0], [0.6, 0.6]])  # the third is above the segment between the others
    learner = LearnLoss(box(1))
    assert learner.solve(observed(features, np.array([3.0, 2.0, 1.0]))).winner == 1
    assert learner.dead.tolist() == [False, False, True]


def test_of_equal_models_the_one_with_less_error_wins() -> None:
    features = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert LearnLoss(box(1)).solve(observed(features, np.array([0.3, 0.2, 0.9]))).winner == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_growing_observations_give_what_all_at_once_give(seed: int) -> None:
    """To the last bit, so that a search that is continued from its observations goes on as it would have."""
    problem, observations = Quadratics(seed, 4), Observations()
    learner, dead = LearnLoss(problem.space), np.zeros(0, bool)
    for training, (features, errors) in enumerate(stream(seed, 4, trainings=12)):
        observations.add(features, errors, training, final_last=True)
        grown, fresh = learner.solve(observations), LearnLoss(problem.space).solve(observations)
        assert grown.winner == fresh.winner
        np.testing.assert_array_equal(grown.weights, fresh.weights)
        assert learner.dead[: len(dead)][dead].all(), "the dead stay dead"
        dead = learner.dead.copy()
    assert dead.sum() > 20


def test_the_errors_may_change() -> None:
    problem = Quadratics(0, 3)
    features = np.vstack([phi for phi, _ in stream(0, 3, trainings=4)])
    learner = LearnLoss(problem.space)
    for seed in range(5):
        observations = observed(features, random_generator("errors", seed).normal(size=len(features)))
        assert learner.solve(observations).winner == LearnLoss(problem.space).solve(observations).winner


@pytest.mark.parametrize("seed", range(4))
def test_the_weights_make_the_winner_the_minimiser_with_the_largest_margin(seed: int) -> None:
    space, (features, errors) = box(4), finite_set(seed, 4, 60, 1.0, grid=False)
    solution = LearnLoss(space).solve(observed(features, errors))
    losses = features @ np.r_[1.0, solution.weights]
    assert losses.argmin() == solution.winner
    scaled = features * np.r_[1.0, space.high]
    norms = np.abs(scaled - scaled[solution.winner]).sum(1)
    others = np.arange(len(features)) != solution.winner

    def least_margin(weights: np.ndarray) -> np.ndarray:
        return (((features - features[solution.winner]) @ np.r_[1.0, weights])[others] / norms[others]).min()

    found = least_margin(solution.weights)
    nearby = solution.weights * np.exp(0.1 * random_generator("nearby", seed).normal(size=(200, 4)))
    assert found >= max(least_margin(weights) for weights in np.clip(nearby, space.low, space.high)) - 1e-9


def cone_rows(features: np.ndarray, high: np.ndarray, winner: int) -> tuple[np.ndarray, np.ndarray]:
    """``A_ub x <= b_ub`` of the winner's cone, over x = lambda / high, rows of norm 1."""
    difference = np.delete(features - features[winner], winner, 0) * np.r_[1.0, high]
    difference = difference / np.abs(difference).sum(1, keepdims=True)
    return -difference[:, 1:], difference[:, 0]


@pytest.mark.parametrize("seed", range(4))
def test_margin_is_the_answer_of_one_program_with_all_rows(seed: int) -> None:
    space, (features, errors) = box(3, decades=4), finite_set(seed, 3, 50, 0.5, grid=False)
    observations = observed(features, errors)
    solution = LearnLoss(space).solve(observations)
    weights = choose_weights(space, observations, solution, "margin")
    rise = np.maximum(errors - errors[solution.winner], 0)

    def slope(weights: np.ndarray) -> float:
        return float((((features - features[solution.winner]) @ np.r_[1.0, weights])[rise > 0] / rise[rise > 0]).min())

    rows = -(features - features[solution.winner])[:, 1:] * space.high
    offsets = (features - features[solution.winner])[:, 0]
    best = linprog(
        [0, 0, 0, -1],
        A_ub=np.column_stack([rows, rise]),
        b_ub=offsets + 1e-9,
        bounds=[*zip(space.low / space.high, np.ones(3), strict=True), (0, None)],
    )
    assert slope(weights) == pytest.approx(-best.fun, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["margin", "slack"])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_stays_in_the_cone(kind: str, seed: int) -> None:
    space, (features, errors) = box(4, decades=5), finite_set(seed, 4, 80, 0.5, grid=False)
    observations = observed(features, errors)
    solution = LearnLoss(space).solve(observations)
    weights = choose_weights(space, observations, solution, kind)
    rows, bounds = cone_rows(features, space.high, solution.winner)
    assert (rows @ (weights / space.high) <= bounds + 1e-8).all()
    assert ((space.low <= weights) & (weights <= space.high)).all()


@pytest.mark.parametrize("kind", ["margin", "slack", "nnls"])
def test_the_choice_does_not_depend_on_the_scale_and_offset_of_the_error(kind: str) -> None:
    problem = Quadratics(3, 4)
    batches = stream(3, 4, trainings=3)
    features, errors = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    chosen = []
    for scale, offset in ((1.0, 0.0), (1e-3, -5.0), (40.0, 1e3)):
        observations = observed(features, scale * errors + offset)
        chosen.append(choose_weights(problem.space, observations, LearnLoss(problem.space).solve(observations), kind))
    np.testing.assert_allclose(chosen[1], chosen[0], rtol=1e-4)
    np.testing.assert_allclose(chosen[2], chosen[0], rtol=1e-4)


@pytest.mark.parametrize("kind", ["margin", "slack", "nnls"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_observations_that_tell_nothing_give_weights_all_the_same(kind: str, count: int) -> None:
    space = box(2)
    for features in (np.ones((count, 3)), np.arange(3.0 * count).reshape(count, 3)):
        observations = observed(features, np.full(count, 0.5))
        weights = choose_weights(space, observations, LearnLoss(space).solve(observations), kind)
        assert ((space.low <= weights) & (weights <= space.high)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 4))
def test_least_squares_is_optimal_within_the_box(seed: int, size: int) -> None:
    """No nearby weights in F fit better: the constraint low <= lambda <= high is kept exactly, not by clipping."""
    space, (features, errors) = box(size, decades=1.0), finite_set(seed, size, 30, 0.0, grid=False)
    observations = observed(features, errors)
    weights = choose_weights(space, observations, LearnLoss(space).solve(observations), "nnls")

    def misfit(weights: np.ndarray) -> float:
        loss = features @ np.r_[1.0, weights]
        loss, e = loss - loss.mean(), errors - errors.mean()
        return float(np.sum((e - max(loss @ e / (loss @ loss), 0.0) * loss) ** 2))

    nearby = weights * np.exp(0.02 * random_generator("nearby", seed).normal(size=(50, size)))
    assert misfit(weights) <= min(misfit(w) for w in np.clip(nearby, space.low, space.high)) * (1 + 1e-9)


def test_snapshots_that_differ_by_rounding_count_as_equal() -> None:
    """The end of a converged training: the same model many times, but for the last bits of its features."""
    problem = Quadratics(0, 3)
    features = problem.features(problem.train(np.ones(3)))
    jitter = 1 + 1e-15 * random_generator("rounding").normal(size=(20, 4))
    errors = features @ np.array([0.2, 0.1, 0.4, 0.6])
    ends = features[-1] * jitter
    observations = observed(np.vstack([features, ends]), np.r_[errors, ends @ np.array([0.2, 0.1, 0.4, 0.6])])
    weights = choose_weights(problem.space, observations, LearnLoss(problem.space).solve(observations), "slack")
    np.testing.assert_allclose(weights, [0.5, 2.0, 3.0], rtol=1e-5)
