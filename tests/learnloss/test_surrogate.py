from __future__ import annotations

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from palf_dist.learnloss import surrogate as module
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.surrogate import Points, Surrogate
from palf_dist.randomness import random_generator

SPACE = WeightSpace.of({"a": (1e-3, 1e2), "b": (1e-3, 1e2)}, "ce")


def bowl(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] and slopes [n, 2] of a smooth function with its minimum 0.5 at (1, -2)."""
    centred = (u - [1.0, -2.0]) / [2.0, 3.0]
    return 0.5 + 0.5 * (centred**2).sum(1), centred / [2.0, 3.0]


def points(count: int, with_slopes: bool) -> Points:
    u = SPACE.sample(random_generator("points", count), count)
    errors, slopes = bowl(u)
    return Points(u, errors, slopes if with_slopes else np.full_like(slopes, np.nan))


def test_posterior_is_scikit_learns() -> None:
    data = points(12, with_slopes=False)
    fitted = Surrogate(data)
    length, noise = np.exp(fitted.hyperparameters[:2]), np.exp(fitted.hyperparameters[2])
    compressed = np.log1p((data.errors - data.errors.min()) / fitted._bend) / fitted.scale
    peer = GaussianProcessRegressor(RBF(length), alpha=noise**2 + 1e-8, optimizer=None)
    peer.fit(data.u, compressed - fitted._mean)
    u = SPACE.sample(random_generator("queries"), 20)
    expected, deviation = peer.predict(u, return_std=True)
    mean, ours = fitted.predict(u)
    np.testing.assert_allclose(mean, expected + fitted._mean, atol=1e-8)
    np.testing.assert_allclose(ours, deviation * np.sqrt(fitted._variance), atol=1e-6)


def test_covariance_of_slopes_is_the_derivative_of_that_of_values() -> None:
    fitted = Surrogate(points(4, with_slopes=True))
    u, step = np.array([[0.3, -0.7]]), 1e-6
    for axis in range(2):
        shift = step * np.eye(2)[axis]
        moved = (fitted._kernel(u + shift, None) - fitted._kernel(u - shift, None)) / (2 * step)
        whole = fitted._kernel(u, np.array([0]))
        np.testing.assert_allclose(whole[1 + axis], moved[0], atol=1e-8)


def test_slopes_tell_as_much_as_many_values() -> None:
    queries = SPACE.sample(random_generator("held out"), 200)
    truth, _ = bowl(queries)

    def misfit(data: Points) -> float:
        fitted = Surrogate(data)
        return float(np.mean([abs(fitted.error(u) - e) for u, e in zip(queries, truth, strict=True)]))

    assert misfit(points(6, with_slopes=True)) < 0.5 * misfit(points(6, with_slopes=False))


def test_proposes_the_minimum_of_a_bowl() -> None:
    generator = random_generator("propose")
    data = points(4, with_slopes=True)
    for _ in range(4):
        u = Surrogate(data).propose(SPACE, generator)
        errors, slopes = bowl(u[None])
        data = Points(np.vstack([data.u, u]), np.append(data.errors, errors), np.vstack([data.slopes, slopes]))
    assert data.errors.min() < 0.505


def test_improvement_falls_smoothly_far_from_the_best() -> None:
    fitted = Surrogate(points(12, with_slopes=True))
    line = np.linspace(SPACE.log_low, SPACE.log_high, 400)
    values = fitted.log_improvement(line)
    assert np.isfinite(values).all()
    assert np.abs(np.diff(values)).max() < 0.1 * np.ptp(values)


@pytest.mark.parametrize("with_slopes", [False, True])
def test_one_training_and_equal_errors_are_no_trouble(with_slopes: bool) -> None:
    one = points(1, with_slopes)
    assert np.isfinite(Surrogate(one).propose(SPACE, random_generator(0))).all()
    equal = Points(points(5, with_slopes).u, np.full(5, 0.3), np.full((5, 2), 0.0 if with_slopes else np.nan))
    assert np.isfinite(Surrogate(equal).propose(SPACE, random_generator(0))).all()


def test_only_the_best_slopes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOPES_KEPT", 3)
    data = points(9, with_slopes=True)
    assert set(Surrogate(data)._sloped) == set(np.argsort(data.errors)[:3])
