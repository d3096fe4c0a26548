"""Hedge: its weights against the definition, its regret against its bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies import HedgePolicy
from palf_dist.policies.hedge import hedge_rate, hedge_weights
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, DEFAULT_HYPERPARAMETERS, NUM_BASIS
from tests.groups import make_group

BASIS = ("ce", "focal", "label_smoothing", "symmetric_ce")
NO_PHI = torch.zeros(0)


def alpha(policy: HedgePolicy, losses: np.ndarray) -> np.ndarray:
    """Mixture weights [K] after the losses [n, K] of one task."""
    snapshots = np.column_stack([np.full(len(losses), np.nan), losses])  # the validation error plays no part
    controls = policy.controls(NO_PHI, torch.from_numpy(snapshots)[None])[0]
    return controls[[CONTROL_INDEX[name] for name in policy.active_basis]].numpy()


@pytest.mark.parametrize("horizon", [None, 15])
def test_the_weights_follow_their_definition(horizon: int | None) -> None:
    losses = np.array([[2.0, 1.0, 4.0, 3.0], [1.0, 0.9, 1.0, 6.0], [0.5, 0.8, 1.2, 1.5]])
    scaled = np.minimum(losses / losses[0], 1)
    eta = math.sqrt(8 * math.log(4) / (horizon or 3))
    want = np.exp(-eta * scaled.sum(0))
    np.testing.assert_allclose(alpha(HedgePolicy(horizon=horizon), losses), want / want.sum(), rtol=1e-6)


def test_no_loss_wins_by_its_scale_and_what_is_not_finite_counts_as_one() -> None:
    losses = np.array([[1.0, 1.0, 1.0, 1.0], [0.5, 0.25, 0.5, np.nan], [0.5, 0.25, 0.5, np.inf]])
    plain = alpha(HedgePolicy(), losses)
    np.testing.assert_allclose(alpha(HedgePolicy(), losses * [1.0, 100.0, 0.01, 1.0]), plain, rtol=1e-6)
    np.testing.assert_allclose(alpha(HedgePolicy(), np.nan_to_num(losses, nan=1.0, posinf=1.0)), plain, rtol=1e-6)
    assert plain[1] > plain[0] == plain[2] > plain[3]


def test_a_first_round_that_is_not_finite_costs_that_round_alone() -> None:
    later = np.array([[2.0, 1.0, 4.0, 3.0], [1.0, 0.9, 1.0, 3.0], [0.5, 0.8, 1.2, 1.5]])
    for first in (np.nan, np.inf):
        got = alpha(HedgePolicy(horizon=4), np.vstack([[2.0, first, 4.0, 3.0], later]))
        want = alpha(HedgePolicy(horizon=4), np.vstack([[2.0, 1.0, 4.0, 3.0], later]))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    never = alpha(HedgePolicy(horizon=4), np.column_stack([later[:, :3], np.full(3, np.nan)]))
    assert np.isfinite(never).all() and never.argmin() == 3


def test_it_begins_uniform() -> None:
    assert alpha(HedgePolicy(), np.zeros((0, 4))).tolist() == [0.25] * 4
    assert alpha(HedgePolicy(("focal", "ce")), np.array([[3.0, 1.0]])).tolist() == [0.5] * 2


@given(
    losses=arrays(float, st.tuples(st.integers(1, 60), st.integers(2, 6)), elements=st.floats(0, 1)),
    anytime=st.booleans(),
)
def test_regret_is_within_the_proven_bound(losses: np.ndarray, anytime: bool) -> None:
    """Cesa-Bianchi and Lugosi 2006, theorems 2.2 and 2.3, for any losses in [0, 1]."""
    rounds, experts = losses.shape
    value = torch.from_numpy(losses)
    before = value.cumsum(0) - value
    eta = hedge_rate(experts, torch.arange(1.0, rounds + 1)[:, None].double() if anytime else rounds)
    paid = (hedge_weights(before, eta) * value).sum().item()
    bound = math.sqrt(rounds * math.log(experts) / 2)
    if anytime:
        bound = 2 * bound + math.sqrt(math.log(experts) / 8)
    assert paid - losses.sum(0).min() <= bound + 1e-9


def test_a_run_under_hedge_reads_its_own_training_losses() -> None:
    """Weights at the last refresh, from the snapshots of the loop; hyper-parameters stay at their defaults."""
    loop = InnerLoop(make_group(steps=7), HedgePolicy(refresh=3), InnerConfig())
    state = loop.start()
    loop.run(state, NO_PHI, loop.steps)
    assert state.features is not None and state.controls is not None and state.features.shape == (3, 3, 5)
    for task in range(3):
        losses = state.features[task, :, 1:].numpy()
        np.testing.assert_allclose(state.controls[task, :4].numpy(), alpha(HedgePolicy(), losses), rtol=1e-6)
        assert np.ptp(losses[-1] / losses[0]) > 1e-3, "the losses fall by different shares"
    default = torch.tensor(list(DEFAULT_HYPERPARAMETERS.values())).double()
    torch.testing.assert_close(state.controls[:, NUM_BASIS:], default.expand(3, -1))
    assert HedgePolicy().active_basis == BASIS == BASIS_LOSSES[:4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": ("ce",)}, "basis: ce given; needs two or more of ce, focal"),
        ({"basis": ("ce", "info_nce")}, "basis: ce, info_nce given"),
        ({"basis": ("ce", "focal", "ce")}, "each once"),
        ({"horizon": 0}, "horizon: 0 given; needs a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HedgePolicy(**settings)
