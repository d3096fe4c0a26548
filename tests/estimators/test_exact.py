"""The estimators that differentiate: adjoint = unroll = finite differences, in float64."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.estimators import Estimate, make_estimator
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.policies import LearnedPolicy, make_policy, policy_spec
from palf_dist.types import BASIS_LOSSES, HYPERPARAMETERS
from tests.groups import make_group
from tests.test_inner_loop import full_policy

OUTER = OuterLossConfig(every=3)

CPU = torch.device("cpu")


def estimate(
    kind: str, loop: InnerLoop, phi: torch.Tensor, outer: OuterLossConfig = OUTER, state: InnerState | None = None
) -> Estimate:
    estimator = make_estimator(EstimatorConfig(kind=kind), outer)
    return estimator.estimate(loop, phi, state or loop.start(), loop.steps, (0,))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "transformer", "module"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_adjoint_equals_unroll(name: str, optimiser: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name, optimiser), policy, InnerConfig())
    adjoint, unroll = estimate("adjoint", loop, phi), estimate("unroll", loop, phi)
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert adjoint.outer_loss == pytest.approx(unroll.outer_loss, rel=1e-12)
    for name_, value in unroll.records.items():
        np.testing.assert_allclose(adjoint.records[name_], value, rtol=1e-5, atol=1e-6, err_msg=name_)


@pytest.mark.parametrize("kind", ["soft_error", "one_minus_p", "cross_entropy"])
def test_adjoint_equals_unroll_for_every_outer_loss_and_the_running_sum(kind: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(), policy, InnerConfig())
    outer = OuterLossConfig(kind=kind, every=2, running_sum=0.7)
    adjoint, unroll = estimate("adjoint", loop, phi, outer), estimate("unroll", loop, phi, outer)
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert adjoint.outer_loss == pytest.approx(unroll.outer_loss, rel=1e-12)


INFORMATION = OuterLossConfig(every=2, information=0.6, beta=0.5, gamma=0.2, running_sum=0.3)


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "transformer", "module"])
def test_adjoint_equals_unroll_for_the_information_objective(name: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name), policy, InnerConfig())
    adjoint, unroll = estimate("adjoint", loop, phi, INFORMATION), estimate("unroll", loop, phi, INFORMATION)
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert adjoint.outer_loss == pytest.approx(unroll.outer_loss, rel=1e-12)
    assert adjoint.terms == pytest.approx(unroll.terms, rel=1e-12)


@pytest.mark.parametrize("kind", ["adjoint", "unroll", "one_step", "es", "pes"])
def test_terms_add_up_to_the_outer_loss(kind: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(), policy, InnerConfig())
    got = estimate(kind, loop, phi, INFORMATION)
    terms = got.terms
    objective = terms["information"] - 0.5 * terms["cross_entropy"] - 0.2 * terms["gradient_variance"]
    total = terms["validation"] - 0.6 * objective + 0.3 * terms["running_sum"]
    assert got.outer_loss == pytest.approx(total, rel=1e-12)
    assert estimate(kind, loop, phi).terms == {}, "there is nothing to tell apart"


def random_policy(config: PolicyConfig) -> tuple[LearnedPolicy, torch.Tensor]:
    """A policy with random parameters, in float64."""
    spec = policy_spec(config)
    policy = make_policy(spec, [0.5] * len(spec.features), [0.3] * len(spec.features))
    torch.manual_seed(1)
    phi = torch.from_numpy(policy.initial()).double()
    return policy, phi + 0.2 * torch.randn_like(phi)


def stopped_policy(
    basis: tuple[str, ...], hyperparameters: tuple[str, ...], **others: str
) -> tuple[LearnedPolicy, torch.Tensor]:
    """A policy that sees the clock alone, so that nothing is stopped between phi and the outer loss but the averaged
    predictions, which only the posterior weights (ew) read."""
    settings = {"features": ("time",), "basis": basis, "hyperparameters": hyperparameters, "refresh": 2, "hidden": 3}
    return random_policy(PolicyConfig.model_validate(settings | others))


KINDS = get_args(PolicyConfig.model_fields["kind"].annotation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", [OUTER, INFORMATION], ids=["validation", "information"])
def test_adjoint_equals_unroll_for_every_kind_of_policy(kind: str, outer: OuterLossConfig) -> None:
    policy, phi = random_policy(PolicyConfig(kind=kind, refresh=2, hidden=4))
    loop = InnerLoop(make_group(), policy, InnerConfig())
    adjoint, unroll = (estimate(estimator, loop, phi, outer) for estimator in ("adjoint", "unroll"))
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert np.linalg.norm(unroll.gradient) > 1e-6
    np.testing.assert_allclose(adjoint.records["state"], unroll.records["state"], rtol=1e-5, atol=1e-6)
    assert adjoint.records["state"].shape[1:] == (3, len(policy.features))
    if "time" in policy.features:
        time = adjoint.records["state"][:, 0, policy.features.index("time")]
        at_refresh = np.isnan(adjoint.records["outer_loss"][:, 0])
        np.testing.assert_allclose(time[at_refresh], np.arange(0, 7, 2) / 7, rtol=1e-6)


@pytest.mark.parametrize("kind", ["recurrent", "schedule", "constant"])
def test_kinds_equal_finite_differences(kind: str) -> None:
    """As the test below, for parameters of the policy that it does not have: of the recurrent one those that act by
    what it remembers."""
    hyper = tuple(h for h in HYPERPARAMETERS if h not in ("e", "la", "ew"))
    features = {"features": ()} if kind == "constant" else {}
    policy, phi = stopped_policy(BASIS_LOSSES[:5], hyper, kind=kind, **features)
    loop = InnerLoop(make_group(steps=5), policy, InnerConfig())
    adjoint, unroll = (estimate(estimator, loop, phi).gradient for estimator in ("adjoint", "unroll"))
    memory = slice(9, 9 + 27)  # of the recurrent one: [3, 9] after [1, 9] for the state
    assert kind != "recurrent" or np.abs(adjoint[memory]).max() > 1e-6
    torch.manual_seed(2)
    directions = [torch.randn_like(phi) for _ in range(3)]
    if kind == "recurrent":
        directions.append(torch.zeros_like(phi))
        directions[-1][memory] = 1.0
    for direction in directions:
        h = 1e-7
        up, down = (estimate("adjoint", loop, phi + sign * h * direction).outer_loss for sign in (1, -1))
        slope = (up - down) / (2 * h)
        assert adjoint @ direction.numpy() == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert unroll @ direction.numpy() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("outer", [OUTER, INFORMATION], ids=["validation", "information"])
@pytest.mark.parametrize("name", ["mlp", "conv", "transformer"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_both_equal_finite_differences(name: str, optimiser: str, outer: OuterLossConfig) -> None:
    """Without robust_ce nothing is stopped, and the gradient is that of the outer loss itself."""
    hyper = tuple(h for h in HYPERPARAMETERS if h not in ("e", "la", "ew"))
    policy, phi = stopped_policy(BASIS_LOSSES[:5], hyper)
    loop = InnerLoop(make_group(name, optimiser, steps=5), policy, InnerConfig())
    torch.manual_seed(2)
    adjoint, unroll = (estimate(kind, loop, phi, outer).gradient for kind in ("adjoint", "unroll"))
    for _ in range(3):
        direction = torch.randn_like(phi)
        h = 1e-7  # larger steps cross kinks of ReLU and Adam's near-zero second moments
        up, down = (estimate("adjoint", loop, phi + sign * h * direction, outer).outer_loss for sign in (1, -1))
        slope = (up - down) / (2 * h)
        assert adjoint @ direction.numpy() == pytest.approx(slope, rel=1e-5, abs=1e-8)
        assert unroll @ direction.numpy() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_float32_is_close_to_float64() -> None:
    policy, phi = full_policy()
    want = estimate("adjoint", InnerLoop(make_group(steps=20), policy, InnerConfig()), phi).gradient
    single = InnerLoop(make_group(steps=20, dtype=torch.float32), policy, InnerConfig())
    got = estimate("adjoint", single, phi.float()).gradient
    assert relative(got, want) <= 1e-3


@pytest.mark.parametrize("kind", ["full", "recurrent"])
def test_windows_chain_the_inner_state_and_use_the_present_policy(kind: str) -> None:
    """Adjoint = unroll on a window that starts between two refreshes, under a policy that has changed meanwhile."""
    policy, phi = full_policy(refresh=3)
    if kind == "recurrent":
        policy, phi = random_policy(PolicyConfig(kind=kind, refresh=3, hidden=4))
    loop = InnerLoop(make_group(), policy, InnerConfig())
    first = loop.start()
    loop.run(first, phi, 4)
    arrays = {name: np.array(value) for name, value in first.to_arrays().items()}
    moved = phi + 0.1
    got, want = (
        estimate(kind, loop, moved, state=InnerState.from_arrays(arrays, CPU)) for kind in ("adjoint", "unroll")
    )
    assert relative(got.gradient, want.gradient) <= 1e-10


@pytest.mark.parametrize("outer", [OUTER, INFORMATION], ids=["validation", "information"])
def test_one_step_is_the_mean_of_single_step_gradients(outer: OuterLossConfig) -> None:
    policy, phi = full_policy(refresh=1)
    loop = InnerLoop(make_group(), policy, InnerConfig())
    got = estimate("one_step", loop, phi, outer)
    state, parts = loop.start(), []
    unroll = make_estimator(EstimatorConfig(kind="unroll"), outer)
    for step in range(loop.steps):
        parts.append(unroll.estimate(loop, phi, state, step + 1, (0,)).gradient)
    assert relative(got.gradient, np.mean(parts, 0)) <= 1e-10


def test_a_static_policy_has_an_empty_gradient() -> None:
    loop = InnerLoop(make_group(), baseline_policy(METHODS["uniform"]), InnerConfig())
    assert estimate("adjoint", loop, torch.zeros(0).double()).gradient.shape == (0,)


def test_records_have_a_row_per_refresh_and_checkpoint() -> None:
    policy, phi = full_policy(refresh=3)
    loop = InnerLoop(make_group(), policy, InnerConfig())
    records = estimate("adjoint", loop, phi, OuterLossConfig(every=5)).records
    assert records["inner_step"].tolist() == [0, 3, 5, 6, 7]
    read = ~np.isnan(records["outer_loss"]).any(1)
    assert read.tolist() == [False, False, True, False, True]
    assert records["controls"].shape == (5, 3, 15) and records["state"].shape[:2] == (5, 3)
