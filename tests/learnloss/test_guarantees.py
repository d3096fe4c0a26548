"""What LearnLoss promises (METHODS part 2), each promise checked against brute force or a closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.learnloss.certificates import finite_certificate
from palf_dist.learnloss.learn_loss import LearnLoss, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.randomness import random_generator
from tests.learnloss.cases import Quadratics, box, finite_set, margin_by_one_program, observed

BORDERLINE = 1e-8  # margins nearer to 0 than that may be called either way
FINITE_SETS = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(1, 6),
    "count": st.integers(1, 25),
    "spread": st.sampled_from([0.0, 1.0, 4.0]),
    "grid": st.booleans(),
}


@settings(max_examples=40, deadline=None)
@given(**FINITE_SETS)
def test_exact_on_a_finite_set(seed: int, size: int, count: int, spread: float, grid: bool) -> None:
    """The winner is that of a loop over all candidates, each with its own linear program with all rows."""
    space, (features, errors) = box(size), finite_set(seed, size, count, spread, grid)
    learner = LearnLoss(space)
    solution = learner.solve(observed(features, errors))
    margins = np.array([margin_by_one_program(space, features, i) for i in range(count)])
    assert solution.winner is not None
    assert margins[solution.winner] >= -BORDERLINE
    assert solution.lower_bound == errors[solution.winner] <= errors[margins > BORDERLINE].min(initial=np.inf)
    assert (margins[learner.dead] < BORDERLINE).all()


@settings(max_examples=20, deadline=None)
@given(**FINITE_SETS)
def test_the_dead_set_only_grows_and_is_right(seed: int, size: int, count: int, spread: float, grid: bool) -> None:
    """Errors are lowest where no lambda supports the observation, so that each of these must be found to be dead: by a
    linear program, by the proof of another one, or on arrival by an earlier proof."""
    space, (features, _) = box(size), finite_set(seed, size, count, spread, grid)
    margins = np.array([margin_by_one_program(space, features, i) for i in range(count)])
    errors = np.where(margins > -BORDERLINE, 1.0, -random_generator("dead", seed).exponential(size=count))
    learner, observations, before = LearnLoss(space), Observations(), np.zeros(0, bool)
    for training, rows in enumerate(np.array_split(np.arange(count), 4)):
        observations.add(features[rows], errors[rows], training, final_last=False)
        learner.solve(observations)
        assert learner.dead[: len(before)][before].all()
        before = learner.dead.copy()
    assert (margins[before] < BORDERLINE).all()
    assert before[margins < -BORDERLINE].all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 4), count=st.integers(1, 25))
def test_optimism_brackets_the_best_on_a_finite_set(seed: int, size: int, count: int) -> None:
    """Training with the weights of the optimistic winner: LB <= OPT <= UB throughout, and in the end all are equal."""
    space, (features, errors) = box(size), finite_set(seed, size, count, 0.0, grid=False)
    supported = [margin_by_one_program(space, features, i) >= 0 for i in range(count)]
    best = errors[supported].min()
    optimistic = errors - random_generator("optimism", seed).exponential(size=count)
    upper, bounds = np.inf, []
    for _ in range(count):
        solution = LearnLoss(space).solve(observed(features, optimistic))
        trained = int((features @ np.r_[1.0, solution.weights]).argmin())
        optimistic[trained] = errors[trained]
        upper = min(upper, errors[trained])
        certificate = finite_certificate(space, features, optimistic, upper)
        assert certificate.lower_bound <= best <= certificate.upper_bound
        bounds.append(certificate.lower_bound)
        if certificate.closed:
            break
    assert certificate.closed
    assert certificate.gap == 0
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["slack", "nnls"])
def test_the_easy_case_is_solved_at_training_2(kind: str, seed: int) -> None:
    """e = c + a lambda* . phi: the snapshots of one training tell lambda* exactly."""
    problem, generator = Quadratics(seed, 4), random_generator("easy", seed)
    true = np.exp(generator.uniform(np.log(0.05), np.log(20), 4))

    def error(features: np.ndarray) -> np.ndarray:
        return -3.0 + 0.2 * features @ np.r_[1.0, true]

    features = problem.features(problem.train(np.ones(4)))
    observations = observed(features, error(features))
    weights = choose_weights(problem.space, observations, LearnLoss(problem.space).solve(observations), kind)
    np.testing.assert_allclose(weights, true, rtol=1e-4)
    reached, best = (error(problem.features(problem.train(w)[-1:]))[0] for w in (weights, true))
    assert reached == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_easy_case_with_noise_is_solved_by_training_4(seed: int) -> None:
    """With 1 % noise on e, least squares over all snapshots comes within 1 % of what training 1 left to gain."""
    problem, generator = Quadratics(seed, 4), random_generator("noisy", seed)
    true = np.exp(generator.uniform(np.log(0.05), np.log(20), 4))

    def error(features: np.ndarray) -> np.ndarray:
        return 0.2 * features @ np.r_[1.0, true]

    best = error(problem.features(problem.train(true)[-1:]))[0]
    observations, weights, reached = Observations(), np.ones(4), []
    for training in range(4):
        features = problem.features(problem.train(weights))
        reached.append(error(features)[-1] - best)
        noise = 1 + 0.01 * generator.normal(size=len(features))
        observations.add(features, error(features) * noise, training, final_last=True)
        weights = choose_weights(problem.space, observations, LearnLoss(problem.space).solve(observations), "nnls")
    assert reached[-1] <= 0.01 * best


def test_a_model_with_no_bound_leaves_the_certificate_open() -> None:
    """-inf is a valid bound: it must not be dropped as if the model did not exist."""
    space = box(1)
    features = np.array([[0.0, 1.0], [1.0, 0.0]])
    certificate = finite_certificate(space, features, np.array([-np.inf, 1.0]), upper_bound=1.0)
    assert certificate.lower_bound == -np.inf and not certificate.closed
