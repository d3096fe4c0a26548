"""The policy that learns from its own run: what it learns, and that the inner loop gives it its memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.config import InnerConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.learnloss.learn_loss import LearnLoss, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.losses import LossContext, reference_losses
from palf_dist.policies import OnlineLearnLoss
from palf_dist.policies.static import control_vector
from palf_dist.randomness import random_generator
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, CONTROLS, NUM_BASIS, Rows, TaskGroup
from tests.groups import alone, make_group

NOTHING = torch.zeros(0)


def some_snapshots(*keys: int | str, count: int = 8, width: int = 5) -> np.ndarray:
    """A run whose losses fall at their own pace, with noise, and whose error falls and rises again: [n, 1 + K]."""
    draw = random_generator("snapshots", *keys)
    time = np.linspace(0, 1, count)[:, None]
    phi = np.exp(-time * draw.uniform(0.5, 3, width - 1)) + 0.1 * draw.random((count, width - 1))
    return np.hstack([(time - 0.6) ** 2 + 0.1, phi])


def test_it_is_learnloss_over_the_snapshots_normalised() -> None:
    policy = OnlineLearnLoss()
    snapshots = some_snapshots("by hand")
    observations = Observations()
    observations.add(snapshots[:, 1:], snapshots[:, 0], training=0, final_last=False)
    weights = choose_weights(policy.space, observations, LearnLoss(policy.space).solve(observations), "margin")
    want = np.array([1.0, *weights]) / (1 + weights.sum())
    assert np.ptp(weights) > 0, "the case is not the start"
    np.testing.assert_array_equal(policy.mixture(snapshots), want)
    controls = policy.controls(NOTHING, torch.from_numpy(snapshots)[None])[0]
    for name, share in zip(policy.active_basis, want, strict=True):
        assert controls[CONTROL_INDEX[name]].item() == share
    assert torch.equal(controls[NUM_BASIS:], control_vector({})[NUM_BASIS:].double())


def test_where_the_error_is_a_mixture_the_best_snapshot_becomes_the_minimum() -> None:
    """The easy case: e = c + a lambda* . phi with lambda* in the box."""
    policy = OnlineLearnLoss(low=0.05, high=20)
    for seed in range(5):
        draw = random_generator("easy", seed)
        phi = draw.random((12, 4))
        error = 0.3 + 0.1 * phi @ np.array([1, *np.exp(draw.uniform(-1.5, 1.5, 3))])
        mixture = policy.mixture(np.column_stack([error, phi]))
        assert np.argmin(phi @ mixture) == np.argmin(error)


NUMBER = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-12, 1e9, np.nan, np.inf]))


@settings(max_examples=40)
@given(st.lists(st.lists(NUMBER, min_size=4, max_size=4), max_size=7))
def test_any_history_gives_a_mixture_within_the_box(history: list[list[float]]) -> None:
    policy = OnlineLearnLoss(("ce", "focal", "symmetric_ce"), low=0.1, high=5)
    state = torch.tensor(history, dtype=torch.float64).view(1, -1, 4)
    controls = policy.controls(NOTHING, state)
    assert controls.shape == (1, len(CONTROLS)) and controls.dtype == torch.float64
    alpha = dict(zip(BASIS_LOSSES, controls[0, :NUM_BASIS].tolist(), strict=True))
    assert sum(alpha.values()) == pytest.approx(1)
    assert {name for name, share in alpha.items() if share} == set(policy.active_basis)
    for name in ("focal", "symmetric_ce"):
        assert 0.1 * (1 - 1e-9) <= alpha[name] / alpha["ce"] <= 5 * (1 + 1e-9)


def test_snapshots_that_are_not_finite_are_left_out() -> None:
    policy = OnlineLearnLoss()
    good = some_snapshots("finite")
    with_bad = np.insert(good, 3, good[3], axis=0)
    for place, value in ((0, np.nan), (0, np.inf), (2, np.nan)):
        with_bad[3, place] = value
        np.testing.assert_array_equal(policy.mixture(with_bad), policy.mixture(good))
    np.testing.assert_allclose(policy.mixture(with_bad[3:4]), 0.25), "nothing is known: the middle of the box"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(basis=("focal", "symmetric_ce")), "basis: focal, symmetric_ce given; needs ce"),
        (dict(basis=("ce", "info_nce")), "basis: .*needs ce and at least one more of focal"),
        (dict(basis=("ce",)), "basis: ce given; .*at least one more"),
        (dict(basis=("ce", "focal", "focal")), "each once"),
        (dict(basis=("ce", "ce", "focal")), "each once"),
        (dict(low=2.0, high=1.0), r"weights\.focal: \[2, 1\] is no interval"),
        (dict(low=0.0), "no interval"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineLearnLoss(**arguments)


def run(group: TaskGroup, stop: int | None = None) -> InnerState:
    loop = InnerLoop(group, OnlineLearnLoss(refresh=3), InnerConfig())
    state = loop.start()
    loop.run(state, NOTHING, loop.steps if stop is None else stop)
    return state


def test_a_group_learns_for_each_task_what_that_task_would_learn_alone() -> None:
    group = make_group(steps=14)
    together = run(group)
    assert together.controls is not None and together.features is not None
    assert together.features.shape == (3, 5, 5)
    assert len({tuple(row.tolist()) for row in together.controls}) == 3, "every task has weights of its own"
    for task in range(group.size):
        single = run(alone(group, task))
        torch.testing.assert_close(single.features, together.features[task : task + 1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(single.controls, together.controls[task : task + 1], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(single.theta, together.theta[task : task + 1], rtol=1e-6, atol=1e-8)


def test_a_carried_state_continues_bit_for_bit() -> None:
    group = make_group(steps=14)
    straight = run(group)
    loop = InnerLoop(group, OnlineLearnLoss(refresh=3), InnerConfig())
    state = loop.start()
    for stop in (2, 3, 8, 14):
        loop.run(state, NOTHING, stop)
        state = InnerState.from_arrays({n: np.array(a) for n, a in state.to_arrays().items()}, torch.device("cpu"))
    assert torch.equal(state.theta, straight.theta)
    assert state.features is not None and torch.equal(state.features, straight.features)


def test_a_snapshot_is_the_validation_loss_and_the_mean_of_each_basis_loss() -> None:
    """The snapshot at step 6 against the plain formulas over each task's real rows."""
    group = make_group(steps=14)
    theta = run(group, stop=6).theta
    snapshots = run(group, stop=7).features
    assert snapshots is not None and snapshots.shape[1] == 3
    controls = control_vector({}).double()[None]
    for task in range(group.size):
        one, here = alone(group, task), theta[task : task + 1]
        context = LossContext.create(one.class_mask, one.log_prior_ratio)
        want = []
        for rows, active in ((one.validation, ("ce",)), (one.train, OnlineLearnLoss().active_basis)):
            logits = one.model.apply(here, rows.inputs)[0]
            losses = reference_losses(logits, rows.labels, None, controls, context, active).mean(-1)[:, 0]
            want += [losses[BASIS_LOSSES.index(name)] for name in active]
        torch.testing.assert_close(snapshots[task, -1], torch.stack(want))


def test_without_validation_rows_the_weights_stay_as_they_began() -> None:
    group = make_group(steps=7)
    rows = group.validation
    empty = Rows(tuple(column[:, :0] for column in rows.inputs), rows.labels[:, :0], rows.mask[:, :0])
    state = run(replace(group, validation=empty))
    assert state.controls is not None and state.features is not None
    assert state.features[:, :, 0].isnan().all()
    torch.testing.assert_close(state.controls[:, :4], torch.full((3, 4), 0.25).double())
