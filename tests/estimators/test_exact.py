"""The estimators that differentiate: adjoint = unroll = finite differences, in float64."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.estimators import Estimate, make_estimator
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.outer_loss import validation_loss
from palf_dist.policies import LearnedPolicy, make_policy, policy_spec
from palf_dist.rehearsal import Meter
from palf_dist.shield import least_mixing
from palf_dist.types import BASIS_LOSSES, CONTROLS, FIRST_HYPERPARAMETERS, HYPERPARAMETERS
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


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "resnet", "transformer", "module"])
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


ALONG_THE_RUN: dict[str, Any] = {"entropy": -0.3, "total_variation": 0.2, "stability": 2.0}
"""Weights of the terms that belong to no single checkpoint."""
RUN = OuterLossConfig(every=1, **ALONG_THE_RUN)


def as_written(loop: InnerLoop, phi: torch.Tensor, outer: OuterLossConfig) -> tuple[float, np.ndarray]:
    """J and its gradient by autograd through the run, its terms step by step as their formulas say."""
    leaf, state, rows = phi.clone().requires_grad_(True), loop.start(), loop.group.meta_validation
    state.theta = state.theta.clone().requires_grad_(True)
    entropies, changes, rises, validation, before = [], [], [], [], None

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of each task's real rows and classes, and V of each task."""
        z = loop.group.model.apply(state.theta, rows.inputs)[0]
        real, classes = rows.mask.bool(), loop.group.class_mask
        parts = [z[g][real[g]][:, classes[g]] for g in range(len(z))]
        labels = [rows.labels[g][real[g]] for g in range(len(z))]
        return z, torch.stack([cross_entropy(part, y) for part, y in zip(parts, labels, strict=True)])

    v = reference()[1].detach()
    for step in range(loop.steps):
        loop.step(state, leaf, differentiable=True)
        assert state.controls is not None
        alpha = state.controls[:, [BASIS_LOSSES.index(name) for name in loop.policy.active_basis]]
        entropies.append(-(alpha * alpha.log()).sum(1))
        changes.append(torch.zeros(len(alpha)).double() if before is None else (alpha - before).abs().sum(1))
        before = alpha
        if (step + 1) % outer.every == 0 or step + 1 == loop.steps:
            (z, after), earlier = reference(), v
            rises.append(torch.where(after > earlier, after - earlier, 0.0))
            v = after
            validation.append(validation_loss(outer, z, rows.labels, rows.mask, loop.group.class_mask))
    entropy, variation = torch.stack(entropies).mean(0), torch.stack(changes).sum(0)
    objective = torch.stack(validation).mean(0) + outer.entropy * entropy
    objective = (objective + outer.total_variation * variation + outer.stability * torch.stack(rises).sum(0)).mean()
    (gradient,) = torch.autograd.grad(objective, leaf)
    return float(objective.detach()), gradient.numpy()


@pytest.mark.parametrize("weights", [{name: value} for name, value in ALONG_THE_RUN.items()] + [ALONG_THE_RUN], ids=str)
@pytest.mark.parametrize("kind", ["adjoint", "unroll"])
def test_terms_along_the_run_are_as_written(kind: str, weights: dict[str, float]) -> None:
    policy, phi = full_policy(refresh=2)
    loop = InnerLoop(make_group(learning_rate=0.3), policy, InnerConfig())
    outer = OuterLossConfig(every=1, **weights)
    value, gradient = as_written(loop, phi, outer)
    got = estimate(kind, loop, phi, outer)
    assert got.outer_loss == pytest.approx(value, rel=1e-12)
    assert relative(got.gradient, gradient) <= 1e-10
    plain = estimate(kind, loop, phi, OuterLossConfig(every=1)).gradient
    assert relative(plain, gradient) > 1e-2, "the term matters"


@pytest.mark.parametrize("kind", ["adjoint", "unroll", "es", "pes"])
@pytest.mark.parametrize(("refresh", "window"), [(2, 2), (3, 2), (4, 3)])
def test_windows_share_out_the_terms_along_the_run(kind: str, refresh: int, window: int) -> None:
    """Whether or not a window begins with a refresh, their values average to those of the run. Each is blind to how its
    start came about, but alpha depends on phi directly: for the complexity the gradients average to that of the run."""
    policy, phi = full_policy(refresh)
    loop = InnerLoop(make_group(steps=6, learning_rate=0.3), policy, InnerConfig())
    outer = OuterLossConfig(every=1, **ALONG_THE_RUN)
    estimator = make_estimator(EstimatorConfig(kind=kind, window=window, pairs=1), outer)
    blind = make_estimator(EstimatorConfig(kind=kind, window=window, pairs=1), OuterLossConfig(every=1, stability=2.0))
    state, other, carried, parts, gradients = loop.start(), loop.start(), None, [], []
    for stop in range(window, 7, window):
        state, other = (InnerState.from_arrays(each.to_arrays(), CPU) for each in (state, other))
        part = estimator.estimate(loop, phi, state, stop, (0,), carried)
        carried = part.carried or None
        parts.append(part.metrics)
        gradients.append(part.gradient - blind.estimate(loop, phi, other, stop, (0,), None).gradient)
    whole = estimate("adjoint", loop, phi, outer)
    for name in ALONG_THE_RUN:
        mean = np.mean([part[f"outer_{name}"] for part in parts])
        assert mean == pytest.approx(whole.metrics[f"outer_{name}"], rel=1e-9) and mean > 0
    if kind in ("adjoint", "unroll"):
        want = whole.gradient - estimate("adjoint", loop, phi, OuterLossConfig(every=1, stability=2.0)).gradient
        assert relative(np.mean(gradients, 0), want) <= 1e-9


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "resnet", "transformer", "module"])
def test_adjoint_equals_unroll_for_the_information_objective(name: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name), policy, InnerConfig())
    adjoint, unroll = estimate("adjoint", loop, phi, INFORMATION), estimate("unroll", loop, phi, INFORMATION)
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert adjoint.outer_loss == pytest.approx(unroll.outer_loss, rel=1e-12)
    assert adjoint.metrics == pytest.approx(unroll.metrics, rel=1e-12)


@pytest.mark.parametrize("kind", ["adjoint", "unroll", "one_step", "es", "pes"])
def test_terms_add_up_to_the_outer_loss(kind: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(), policy, InnerConfig())
    got = estimate(kind, loop, phi, INFORMATION.model_copy(update=ALONG_THE_RUN))
    terms = {name.removeprefix("outer_"): value for name, value in got.metrics.items()}
    objective = terms["information"] - 0.5 * terms["cross_entropy"] - 0.2 * terms["gradient_variance"]
    total = terms["validation"] - 0.6 * objective + 0.3 * terms["running_sum"]
    total += -0.3 * terms["entropy"] + 0.2 * terms["total_variation"] + 2.0 * terms["stability"]
    assert got.outer_loss == pytest.approx(total, rel=1e-12)
    assert min(terms[name] for name in ("entropy", "total_variation", "stability")) > 0
    assert estimate(kind, loop, phi).metrics == {}, "there is nothing to tell apart"


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


def test_what_a_recurrent_policy_needs_of_memory_grows_by_the_refresh() -> None:
    """Not by its square, as the memory estimate goes on from a few refreshes to all."""
    policy, phi = random_policy(PolicyConfig(kind="recurrent", refresh=1, hidden=16))
    peaks = []
    for steps in (10, 20, 40):
        loop = InnerLoop(make_group(steps=steps), policy, InnerConfig())
        with Meter() as meter:
            estimate("adjoint", loop, phi)
        peaks.append(meter.peak)
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.1)


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
@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "transformer"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_both_equal_finite_differences(name: str, optimiser: str, outer: OuterLossConfig) -> None:
    """Without robust_ce, elr and bootstrap nothing is stopped, and the gradient is that of the outer loss itself."""
    hyper = tuple(h for h in HYPERPARAMETERS if h not in ("e", "la", "ew", "lam", "beta"))
    policy, phi = stopped_policy((*BASIS_LOSSES[:5], "generalised_ce", "mae"), hyper)
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


@pytest.mark.parametrize("shield", [None, 0.7])
@pytest.mark.parametrize(("kind", "refresh"), [("full", 2), ("full", 3), ("recurrent", 3), ("maml", 3)])
def test_windows_chain_the_inner_state_and_use_the_present_policy(
    kind: str, refresh: int, shield: float | None
) -> None:
    """Adjoint = unroll on a window that starts with a refresh or between two, under a policy that has changed."""
    policy, phi = full_policy(refresh)
    if kind != "full":
        policy, phi = random_policy(PolicyConfig(kind=kind, refresh=refresh, hidden=4))
    policy.shield = shield
    loop = InnerLoop(make_group(), policy, InnerConfig())
    first = loop.start()
    loop.run(first, phi, 4)
    arrays = {name: np.array(value) for name, value in first.to_arrays().items()}
    moved = phi + 0.1
    got, want = (
        estimate(kind, loop, moved, RUN, InnerState.from_arrays(arrays, CPU)) for kind in ("adjoint", "unroll")
    )
    assert relative(got.gradient, want.gradient) <= 1e-10
    if shield is not None:
        share = got.metrics["shield_share"]
        assert 0 < share < 1 or (kind == "full" and share == 1)


@pytest.mark.parametrize("outer", [OUTER, INFORMATION, RUN], ids=["validation", "information", "along the run"])
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
    assert records["controls"].shape == (5, 3, len(CONTROLS)) and records["state"].shape[:2] == (5, 3)


def shielded() -> tuple[InnerLoop, torch.Tensor]:
    """A run in which the shield acts at some refreshes of some tasks."""
    policy, phi = full_policy(refresh=2)
    policy.shield = 0.8
    return InnerLoop(make_group(steps=9), policy, InnerConfig()), phi


@pytest.mark.parametrize("name", ["mlp", "conv", "resnet", "transformer", "module"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_adjoint_equals_unroll_under_the_shield(name: str, optimiser: str) -> None:
    policy, phi = full_policy(refresh=2)
    policy.shield = 0.9 if (name, optimiser) == ("module", "adam") else 1.0  # so that it acts at some, not at all
    loop = InnerLoop(make_group(name, optimiser), policy, InnerConfig())
    adjoint, unroll = (estimate(kind, loop, phi, RUN) for kind in ("adjoint", "unroll"))
    assert relative(adjoint.gradient, unroll.gradient) <= 1e-10
    assert adjoint.metrics == pytest.approx(unroll.metrics, rel=1e-9) and 0 < adjoint.metrics["shield_share"] < 1


def test_the_mixing_of_the_shield_is_a_constant_for_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the run with the mixing of every refresh held as it was, by finite differences; and not
    that of the run whose shield follows phi."""
    hyper = tuple(h for h in FIRST_HYPERPARAMETERS if h not in ("e", "la", "ew"))
    policy, phi = stopped_policy(BASIS_LOSSES[:5], hyper)
    policy.shield = 0.9
    loop = InnerLoop(make_group("mlp", "sgd", steps=5, learning_rate=0.5), policy, InnerConfig())
    seen: list[torch.Tensor] = []

    def noted(*arguments: Any) -> torch.Tensor:
        seen.append(least_mixing(*arguments))
        return seen[-1]

    monkeypatch.setattr("palf_dist.inner_loop.least_mixing", noted)
    gradient = estimate("adjoint", loop, phi).gradient
    kept = list(seen)
    assert len(kept) == 3 and any((mixing > 0).any() for mixing in kept) and any((mixing == 0).any() for mixing in kept)
    torch.manual_seed(3)
    direction, h = torch.randn_like(phi), 1e-6

    def slope() -> float:
        up, down = (estimate("adjoint", loop, phi + sign * h * direction).outer_loss for sign in (1, -1))
        return (up - down) / (2 * h)

    following = slope()
    order = iter(kept + kept)
    monkeypatch.setattr("palf_dist.inner_loop.least_mixing", lambda *_: next(order))
    held = slope()
    assert gradient @ direction.numpy() == pytest.approx(held, rel=1e-5)
    assert abs(following - held) > 1e-3 * abs(held), "the case tells the two apart"


@pytest.mark.parametrize("kind", ["adjoint", "unroll", "one_step", "es", "pes"])
def test_windows_carry_and_count_what_the_shield_did(kind: str) -> None:
    """At a constant phi they see the run that is there without windows."""
    loop, phi = shielded()
    whole = loop.start()
    loop.run(whole, phi, 9)
    share = loop.shield_share(whole)
    state, carried, acted = loop.start(), None, 0.0
    for stop, refreshes in ((3, 2), (6, 1), (9, 2)):
        state = InnerState.from_arrays(state.to_arrays(), CPU)
        estimator = make_estimator(EstimatorConfig(kind=kind, pairs=1), OUTER)
        part = estimator.estimate(loop, phi, state, stop, (0,), carried)
        carried = part.carried or None
        acted += refreshes * part.metrics["shield_share"]
    torch.testing.assert_close(state.theta, whole.theta, rtol=1e-9, atol=1e-11)
    assert share is not None and acted == pytest.approx(5 * float(share.mean())) and 0 < acted < 5
