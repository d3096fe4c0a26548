from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.learnloss.records import Sensitivity
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.trust_region import LocalModel
from palf_dist.randomness import random_generator

SPACE = WeightSpace.of({"a": (1e-2, 1e2), "b": (1e-2, 1e2)}, "ce")


def model(seed: int) -> LocalModel:
    generator = random_generator("local model", seed)
    root = generator.normal(size=(2, 2))
    return LocalModel(SPACE.sample(generator, 1)[0], 1.0, generator.normal(size=2), root @ root.T)


@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_quadratic_step_is_the_best_of_a_grid(seed: int, radius: float) -> None:
    local = model(seed)
    step = local.step(SPACE, radius)
    moved = step.u - local.u
    assert (np.abs(moved) <= radius + 1e-6).all() and (SPACE.clip(step.u) == step.u).all()
    assert step.gain == pytest.approx(-local.change(moved), abs=1e-6)
    low = np.maximum(SPACE.log_low - local.u, -radius)
    high = np.minimum(SPACE.log_high - local.u, radius)
    grid = [np.array(s) for s in itertools.product(*np.linspace(low, high, 31).T)]
    assert step.gain >= max(-local.change(s) for s in grid) - 1e-4


def test_derivatives_are_those_with_respect_to_log_lambda() -> None:
    """e(lambda) = sum (lambda - target)^2, whose Hessian in lambda is 2 I."""
    u, target = np.array([0.4, -0.3]), np.array([3.0, 0.2])

    def error(v: np.ndarray) -> float:
        return float(((np.exp(v) - target) ** 2).sum())

    weights = np.exp(u)
    local = LocalModel.of(u, error(u), Sensitivity(2 * (weights - target), 2 * np.eye(2)))
    for axis in np.eye(2):
        numeric = (error(u + 1e-6 * axis) - error(u - 1e-6 * axis)) / 2e-6
        assert local.slope @ axis == pytest.approx(numeric, rel=1e-6)
        second = (error(u + 1e-4 * axis) - 2 * error(u) + error(u - 1e-4 * axis)) / 1e-8
        kept = 2 * (weights @ axis) ** 2 + max(float(local.slope @ axis), 0.0)  # the convex part
        assert axis @ local.bend @ axis == pytest.approx(kept)
        if local.slope @ axis > 0:
            assert kept == pytest.approx(second, rel=1e-4)
