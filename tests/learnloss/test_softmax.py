from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.special import log_softmax

from palf_dist.learnloss import softmax
from palf_dist.learnloss.records import Outcome
from palf_dist.learnloss.softmax import SMOOTHING, LabelledRows, SoftmaxRegression
from palf_dist.randomness import random_generator

CLASSES, COLUMNS = 3, 7  # the last column is the intercept
FIRST, SECOND = np.arange(COLUMNS) < 3, (np.arange(COLUMNS) >= 3) & (np.arange(COLUMNS) < COLUMNS - 1)
RANGES = dict.fromkeys(("l1", "l2_first", "l2_second", "label_smoothing", "logit_penalty"), (1e-4, 1.0))
WEIGHTS = np.array([0.02, 0.03, 0.05, 0.1, 0.04])


def rows(count: int, seed: int) -> LabelledRows:
    """Classes that overlap."""
    generator = random_generator("softmax test", seed)
    labels = np.arange(count) % CLASSES
    centres = random_generator("softmax test centres").normal(size=(CLASSES, COLUMNS - 1))
    inputs = centres[labels] + 1.5 * generator.normal(size=(count, COLUMNS - 1))
    return LabelledRows(np.column_stack([inputs, np.ones(count)]), labels)


def problem(**options: object) -> SoftmaxRegression:
    return SoftmaxRegression(
        rows(60, 0), rows(45, 1), CLASSES, {"l2_first": FIRST, "l2_second": SECOND}, RANGES, **options
    )


def coefficients(seed: int) -> np.ndarray:
    return 0.5 * random_generator("softmax test coefficients", seed).normal(size=(COLUMNS, CLASSES))


def minimiser(regression: SoftmaxRegression, weights: np.ndarray) -> np.ndarray:
    """By damped Newton steps to machine precision: independent of L-BFGS and of conjugate gradients."""
    found = regression.fit(weights)
    identity = np.eye(found.size).reshape(-1, *found.shape)
    for _ in range(50):
        value, gradient = regression.loss(weights, found)
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = regression.hessian_products(weights, found, identity).reshape(found.size, found.size)
        step = np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-10)[0].reshape(found.shape)
        scale = 1.0
        while scale > 1e-6 and regression.loss(weights, found - scale * step)[0] > value + 1e-15:
            scale /= 2
        found = found - scale * step
    assert np.abs(regression.loss(weights, found)[1]).max() < 1e-9
    return found


def test_features_are_those_of_the_definition() -> None:
    regression, w = problem(), coefficients(0)
    train = regression.train_rows
    per_row = [
        (-log_p[label], -log_p.mean(), 0.5 * (logits**2).sum())
        for logits, label in zip(train.inputs @ w, train.labels, strict=True)
        for log_p in [log_softmax(logits)]
    ]
    ce, smoothing, penalty = np.mean(per_row, axis=0)
    l1 = np.abs(w[:-1]).sum()
    expected = [ce, l1, 0.5 * (w[:3] ** 2).sum(), 0.5 * (w[3:-1] ** 2).sum(), smoothing, penalty]
    found = regression.features(w)
    np.testing.assert_allclose(np.delete(found, 1), np.delete(expected, 1), rtol=1e-12)
    assert l1 - SMOOTHING * w[:-1].size <= found[1] <= l1
    assert regression.features(np.zeros_like(w)) == pytest.approx([np.log(3), 0, 0, 0, np.log(3), 0], abs=1e-12)


def test_the_loss_is_linear_in_the_features() -> None:
    regression, w = problem(), coefficients(1)
    value, _ = regression.loss(WEIGHTS, w)
    assert value == pytest.approx(np.r_[1.0, WEIGHTS] @ regression.features(w), rel=1e-12)


def test_the_error_is_the_cross_entropy_of_the_validation_rows() -> None:
    regression, w = problem(), coefficients(2)
    held = regression.validation
    own = [log_softmax(x @ w)[label] for x, label in zip(held.inputs, held.labels, strict=True)]
    assert regression.error(w) == pytest.approx(-np.mean(own), rel=1e-12)


def slope(function: object, at: np.ndarray, direction: np.ndarray, by: float = 1e-5) -> np.ndarray:
    return (function(at + by * direction) - function(at - by * direction)) / (2 * by)


def test_gradients_and_hessian_products_are_those_of_finite_differences() -> None:
    regression, w, v = problem(), coefficients(3), coefficients(4)
    gradient = regression.loss(WEIGHTS, w)[1]
    assert (gradient * v).sum() == pytest.approx(slope(lambda x: regression.loss(WEIGHTS, x)[0], w, v), rel=1e-6)
    assert (regression.error_gradient(w) * v).sum() == pytest.approx(slope(regression.error, w, v), rel=1e-6)
    moved = (regression.feature_gradients(w) * v).sum((1, 2))
    np.testing.assert_allclose(moved, slope(regression.features, w, v)[1:], rtol=1e-5, atol=1e-9)
    product = regression.hessian_products(WEIGHTS, w, np.stack([v, w]))
    for found, direction in zip(product, (v, w), strict=True):
        expected = slope(lambda x: regression.loss(WEIGHTS, x)[1], w, direction)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.fixture
def exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "SOLVER_TOLERANCE", 1e-9)
    monkeypatch.setattr(softmax, "SOLVER_ITERATIONS", 3000)


@pytest.mark.usefixtures("exact_solver")
def test_sensitivity_is_that_of_models_trained_again() -> None:
    regression, adjoint = problem(), problem(derivatives="adjoint")
    w = minimiser(regression, WEIGHTS)
    moves, slopes = [], []
    for name in range(len(WEIGHTS)):
        by = 1e-4 * WEIGHTS[name] * np.eye(len(WEIGHTS))[name]
        after, before = minimiser(regression, WEIGHTS + by), minimiser(regression, WEIGHTS - by)
        moves.append((after - before) / (2 * by.sum()))
        slopes.append((regression.error(after) - regression.error(before)) / (2 * by.sum()))
    sensitivity = regression.sensitivity(WEIGHTS, w)
    np.testing.assert_allclose(sensitivity.gradient, slopes, rtol=1e-4)
    cheap = adjoint.sensitivity(WEIGHTS, w)
    np.testing.assert_allclose(cheap.gradient, slopes, rtol=1e-4)
    assert cheap.curvature is None
    assert 0 < cheap.cost < sensitivity.cost
    # d2e / dW2 of softmax regression is its Gauss-Newton part: the curvature is exact up to how V was found
    expected = [[(a * slope(regression.error_gradient, w, b, 1e-6)).sum() for b in moves] for a in moves]
    assert sensitivity.curvature is not None
    np.testing.assert_allclose(sensitivity.curvature, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert (sensitivity.curvature == sensitivity.curvature.T).all()


def test_without_derivatives_an_outcome_offers_none() -> None:
    assert problem(derivatives="none").train(WEIGHTS).sensitivity is None


def test_a_training_ends_at_the_minimiser_with_its_snapshots_in_order() -> None:
    regression = problem()
    outcome = regression.train(WEIGHTS)
    best = minimiser(regression, WEIGHTS)
    assert outcome.models is not None
    losses = outcome.features @ np.r_[1.0, WEIGHTS]
    assert losses[-1] == pytest.approx(regression.loss(WEIGHTS, best)[0], rel=1e-5)
    assert (np.diff(losses) <= 1e-12).all()
    assert outcome.error == pytest.approx(regression.error(best), rel=1e-3)
    assert len(outcome.features) == len(outcome.errors) == len(outcome.models) > 5
    for features, error, model in zip(outcome.features, outcome.errors, outcome.models, strict=True):
        np.testing.assert_array_equal(features, regression.features(model))
        assert error == regression.error(model)
    np.testing.assert_array_equal(outcome.models[-1], regression.fit(WEIGHTS))


def test_a_run_on_the_fly_ends_where_a_fit_with_its_last_weights_does() -> None:
    regression = problem()
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    def choose(features: np.ndarray, errors: np.ndarray) -> np.ndarray:
        asked.append((features, errors))
        return np.full(len(WEIGHTS), 0.1 / len(asked))

    weights, outcome = regression.train_on_the_fly(choose)
    np.testing.assert_array_equal(weights, np.full(len(WEIGHTS), 0.1 / len(asked)))
    assert len(asked) > 5
    for (fewer, _), (more, errors) in pairwise(asked):
        assert len(more) == len(errors) > len(fewer)
        np.testing.assert_array_equal(more[: len(fewer)], fewer)
    last_features, last_errors = asked[-1]
    np.testing.assert_array_equal(outcome.features[: len(last_features)], last_features)
    np.testing.assert_array_equal(outcome.errors[: len(last_errors)], last_errors)
    assert outcome.error == pytest.approx(regression.error(regression.fit(weights)), rel=1e-3)
    np.testing.assert_allclose(outcome.features[-1], regression.features(regression.fit(weights)), rtol=5e-2, atol=1e-3)


def test_costs_are_the_evaluations_made(monkeypatch: pytest.MonkeyPatch) -> None:
    regression, made = problem(), {"loss": 0, "products": 0}
    loss, products = regression.loss, regression.hessian_products

    def counted_loss(weights: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
        made["loss"] += 1
        return loss(weights, w)

    def counted_products(weights: np.ndarray, w: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        made["products"] += len(vectors)
        return products(weights, w, vectors)

    monkeypatch.setattr(regression, "loss", counted_loss)
    monkeypatch.setattr(regression, "hessian_products", counted_products)
    outcome = regression.train(WEIGHTS)
    assert outcome.cost == made["loss"] > 0
    assert made["products"] == 0, "the sensitivity was taken before anybody asked"
    assert callable(outcome.sensitivity)
    assert outcome.sensitivity().cost == 2 * made["products"] > 0
    made["loss"] = 0
    _, outcome = regression.train_on_the_fly(lambda features, errors: WEIGHTS)
    assert outcome.cost == made["loss"]
    made["loss"], made["products"], rounds = 0, 0, 0

    def refine(settled: Outcome) -> tuple[np.ndarray, bool]:
        nonlocal rounds
        rounds += 1
        assert rounds == 2 or settled.derivatives() is not None, "the cost of what is not asked for does not count"
        return WEIGHTS, rounds < 2

    _, outcome = regression.train_on_the_fly(lambda features, errors: WEIGHTS, refine)
    assert outcome.cost == made["loss"] + 2 * made["products"] and made["products"] > 0 and rounds == 2


def test_what_has_settled_down_is_among_the_snapshots_and_has_the_gradient_of_the_error() -> None:
    regression = problem()
    other, asked = 3 * WEIGHTS, []

    def refine(settled: Outcome) -> tuple[np.ndarray, bool]:
        asked.append(settled)
        return other, len(asked) < 3

    weights, outcome = regression.train_on_the_fly(lambda features, errors: WEIGHTS, refine)
    np.testing.assert_array_equal(weights, other)
    for settled, expected in zip(asked, (WEIGHTS, other, other), strict=True):
        assert (outcome.features == settled.features).all(1).any()
        exact = regression.sensitivity(expected, regression.fit(expected))
        sensitivity = settled.derivatives()
        assert sensitivity is not None and sensitivity.curvature is None
        scale = np.abs(exact.gradient * expected).max()
        np.testing.assert_allclose(sensitivity.gradient * expected, exact.gradient * expected, atol=0.2 * scale)
