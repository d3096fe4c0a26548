"""Permutation importance of policies whose importance is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palf_dist.config import PolicyConfig
from palf_dist.evaluation.importance import Importance, permutation_importance
from palf_dist.policies import make_policy, policy_spec
from palf_dist.policies.base import WithoutParameters
from palf_dist.randomness import random_generator
from palf_dist.types import CONTROL_INDEX, CONTROLS

NOTHING = torch.zeros(0)


class LinearPolicy(WithoutParameters):
    """Controls e and la are linear in the state."""

    refresh = 10
    active_basis = ("ce",)

    def __init__(self, *weights: tuple[float, ...]) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float64)  # [2, S]
        self.features = tuple(f"feature_{index}" for index in range(self.weights.shape[1]))

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        columns = torch.zeros(len(state), len(CONTROLS), dtype=state.dtype)
        columns[:, [CONTROL_INDEX["e"], CONTROL_INDEX["la"]]] = state @ self.weights.T
        return columns


def importance(states: np.ndarray, *weights: tuple[float, ...]) -> Importance:
    return permutation_importance(LinearPolicy(*weights), NOTHING, states, ("e", "la"), 0)


def normal(*shape: int) -> np.ndarray:
    return random_generator("states").normal(size=shape)


def test_what_is_ignored_has_none_and_what_is_read_most_has_the_largest() -> None:
    found = importance(normal(40, 6, 4), (0.0, 1.0, 3.0, 0.0), (0.0, 0.0, 0.0, 2.0))
    assert found.among.shape == found.along.shape == (10, 4, 2) and found.by_run.shape == (40, 4)
    for draws in (found.among, found.along):
        of_e, of_la = draws.mean(0).T
        assert (draws[:, 0] == 0).all() and of_e.argmax() == 2 and of_e[3] == 0
        assert of_la.tolist() == [0, 0, 0, of_la[3]] and of_la[3] > 0.5
    assert found.by_run.mean(0) == pytest.approx((found.among + found.along).mean((0, 2)))


@settings(max_examples=15, deadline=None)
@given(weights=st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=3, max_size=5), seed=st.integers(0, 10**6))
def test_equal_columns_are_as_important_as_their_weights(weights: list[float], seed: int) -> None:
    """All features have the same values, so that the changes are in the ratio of the weights."""
    values = random_generator("columns", seed).normal(size=(12, 4, 1))
    found = importance(np.repeat(values, len(weights), 2), tuple(weights), (1.0,) * len(weights))
    for draws in (found.among, found.along):
        changes, alike = draws.mean(0).T
        if abs(sum(weights)) < 1e-9:
            assert not changes.any(), "the control does not move"
        else:
            assert changes == pytest.approx(np.abs(weights) / abs(sum(weights)) * len(weights) * alike[0])


def test_the_size_is_that_of_a_normal_feature() -> None:
    """E |x - x'| = 2 / sqrt(pi) of a standard normal x, in units of the control's spread w."""
    found = importance(normal(2000, 2, 2), (5.0, 0.0), (0.3, 0.0))
    assert found.among[:, 0].mean(0) == pytest.approx([2 / math.sqrt(math.pi)] * 2, rel=0.02)
    # Along a run of two refreshes every second order is the one it had.
    assert found.along[:, 0].mean(0) == pytest.approx([1 / math.sqrt(math.pi)] * 2, rel=0.05)


def test_time_moves_along_the_run_and_a_constant_of_the_task_among_tasks() -> None:
    time = np.repeat(np.arange(6.0)[None], 20, 0)
    constant = np.repeat(normal(20, 1), 6, 1)
    found = importance(np.stack([time, constant], 2), (1.0, 1.0), (1.0, 1.0))
    assert not found.among[:, 0].any() and not found.along[:, 1].any()
    assert found.along[:, 0].all() and found.among[:, 1].all()


def test_a_control_that_stays_where_it_is_has_none() -> None:
    found = importance(normal(10, 3, 2), (1.0, 1.0), (0.0, 0.0))
    assert found.among[:, :, 0].all() and not found.among[:, :, 1].any()


@pytest.mark.parametrize("kind", ["robust", "recurrent"])
def test_learned_policies(kind: str) -> None:
    """One whose input weights of a feature are 0 ignores it; unknown values are the mean."""
    spec = policy_spec(PolicyConfig(kind=kind, features=("time", "loss", "entropy"), hidden=5))
    policy = make_policy(spec, [0.0] * 3, [1.0] * 3)
    phi = torch.from_numpy(random_generator("phi").normal(size=policy.num_parameters)).float()
    width = 15 if kind == "recurrent" else 5
    phi[width : 2 * width] = 0  # the row of "loss"
    states = normal(12, 4, 3)
    states[:3, 0, 2] = np.nan
    found = permutation_importance(policy, phi, states, ("robust_ce", "e", "wd"), "learned")
    for draws in (found.among, found.along):
        assert not draws[:, 1].any() and draws[:, [0, 2]].all() and np.isfinite(draws).all()


def test_a_recurrent_policy_is_given_its_whole_history() -> None:
    """As its own ``controls`` on everything up to each refresh."""
    spec = policy_spec(PolicyConfig(kind="recurrent", features=("time", "loss"), hidden=4))
    policy = make_policy(spec, [0.0] * 2, [1.0] * 2)
    phi = torch.from_numpy(random_generator("phi").normal(size=policy.num_parameters))
    states = torch.from_numpy(normal(6, 3, 2))
    states[:, 1:] = 0.5  # what differs among tasks is the past alone
    found = permutation_importance(policy, phi.float(), states.numpy(), ("e",), 1)

    def asked(given: Tensor) -> np.ndarray:
        prefixes = [policy.controls(phi.float().double(), given[:, :stop])[:, CONTROL_INDEX["e"]] for stop in (1, 2, 3)]
        return torch.stack(prefixes, 1).numpy()

    for seed in range(3):
        others = random_generator("importance", 1, seed).permutation(6)
        changed = states.clone()
        changed[:, :, 1] = states[others][:, :, 1]
        base = asked(states)
        expected = np.abs(asked(changed) - base).mean() / base.std()
        assert found.among[seed, 1, 0] == pytest.approx(expected) and expected > 0
