"""Controls adapted to a task's own validation loss: against autograd, finite differences, and what it is for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from palf_dist.adaptation import _validation_gradient, look_ahead_slope
from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.estimators import make_estimator
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.losses import reference_mixture
from palf_dist.policies import AdaptingPolicy, LearnedPolicy, make_policy, policy_spec
from palf_dist.types import CONTROLS, WD, TaskGroup
from tests.groups import make_group
from tests.test_inner_loop import full_policy

PAPER = {
    "basis": ("ce", "focal", "label_smoothing", "symmetric_ce"),
    "hyperparameters": ("gamma", "eps", "a", "b", "wd"),
}


def adapting(std: float = 1.0, **settings: Any) -> tuple[AdaptingPolicy, Tensor]:
    """A policy that has not been trained, at a point where every control matters."""
    spec = policy_spec(PolicyConfig(kind="maml", **settings))
    policy = make_policy(spec, np.zeros(len(spec.features)), np.full(len(spec.features), std))
    assert isinstance(policy, AdaptingPolicy)
    torch.manual_seed(4)
    phi = torch.from_numpy(policy.initial()).double()
    phi[:-1] += 0.3 * torch.randn(len(phi) - 1).double()
    return policy, phi


def at_rest(**settings: Any) -> LearnedPolicy:
    """The policy that stays at the initial point; its phi is that point."""
    spec = policy_spec(PolicyConfig(kind="constant", **settings))
    return make_policy(spec, [], [])


def validation_loss(group: TaskGroup, theta: Tensor) -> Tensor:
    """Mean cross-entropy [G] on the real validation rows, by torch's own."""
    z, rows = group.model.apply(theta, group.validation.inputs)[0], group.validation
    real, classes = rows.mask.bool(), group.class_mask
    parts = [(z[g][real[g]][:, classes[g]], rows.labels[g][real[g]]) for g in range(len(z))]
    return torch.stack([cross_entropy(logits, labels) for logits, labels in parts])


def after(loop: InnerLoop, phi: Tensor, steps: int) -> InnerState:
    state = loop.start()
    loop.run(state, phi, steps)
    return state


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "resnet", "transformer", "module"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_the_slope_is_autograds(name: str, optimiser: str) -> None:
    """In the middle of a run, for all controls, with averaged predictions and the optimiser's memory."""
    policy, phi = full_policy()
    group = make_group(name, optimiser)
    loop = InnerLoop(group, policy, InnerConfig())
    state = after(loop, phi, 4)
    assert state.controls is not None
    inputs, labels = loop.minibatch(4)
    outputs = group.model.forward(state.theta, inputs)
    context = loop.parts.context_of(loop._recall(state, labels)[0])
    at, pace = (state.theta, state.slots), loop.pace(4)
    got = look_ahead_slope(group, loop.head, loop.optimiser, at, outputs, labels, state.controls, context, pace)

    theta, controls = (each.detach().clone().requires_grad_(True) for each in (state.theta, state.controls))
    logits, features = group.model.apply(theta, inputs)
    loss = reference_mixture(logits, labels, features, controls, context, policy.active_basis)
    (gradient,) = torch.autograd.grad(loss.sum(), theta, create_graph=True)
    moved, _ = loop.optimiser.update(theta, state.slots, gradient, pace)
    ahead = moved - pace.rate * group.weight_decay * controls[:, WD : WD + 1] * theta
    (want,) = torch.autograd.grad(validation_loss(group, ahead).sum(), controls)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    still = {CONTROLS[index] for index in (want == 0).all(0).nonzero()[:, 0].tolist()}
    assert still <= {"e", "la", "ew", "tau"} - {"e"}, "all controls take part, as far as their losses can"


def test_a_large_model_reads_the_validation_rows_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same gradient, of tasks with fewer rows than others too."""
    group = make_group("conv")
    policy, phi = full_policy()
    loop = InnerLoop(group, policy, InnerConfig())
    state = after(loop, phi, 1)
    assert state.controls is not None
    controls, context = state.controls, loop.parts.context_of(loop._recall(state, loop.minibatch(1)[1])[0])
    whole = _validation_gradient(group, state.theta, controls, context)
    sizes: list[int] = []
    forward = group.model.forward

    def counted(theta: Tensor, inputs: tuple[Tensor, ...]) -> Any:
        sizes.append(inputs[0].shape[1])
        return forward(theta, inputs)

    monkeypatch.setattr(group.model, "forward", counted)
    monkeypatch.setattr("palf_dist.adaptation.AT_ONCE", 2 * group.model.num_parameters)
    parts = _validation_gradient(group, state.theta, controls, context)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-13)
    assert len(sizes) > 1 and max(sizes) == 2 and sum(sizes) == group.validation.labels.shape[1]


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("settings", [{}, PAPER], ids=["robust", "paper"])
def test_what_the_policy_reads_is_the_slope_in_its_point(settings: dict[str, Any], optimiser: str) -> None:
    """By finite differences, over the point, of the validation loss after one step of a policy that stays there; the
    other way round, the controls move against it."""
    policy, phi = adapting(std=0.5, **settings)
    rest = at_rest(**settings)
    group = make_group("mlp", optimiser)
    state = after(InnerLoop(group, policy, InnerConfig()), phi, 1)
    loop = InnerLoop(group, rest, InnerConfig())
    point, h = phi[:-1], 1e-6
    slopes = []
    for step in h * torch.eye(len(point)).double():
        up, down = (validation_loss(group, after(loop, point + sign * step, 1).theta) for sign in (1, -1))
        slopes.append((up - down) / (2 * h) / group.learning_rate[:, 0])
    assert state.features is not None and state.controls is not None
    torch.testing.assert_close(state.features, torch.stack(slopes, 1), rtol=1e-5, atol=1e-8)
    moved = point - 0.25 * state.features / 0.5
    torch.testing.assert_close(
        state.controls, torch.cat([rest.controls(each, torch.zeros(1, 0).double()) for each in moved])
    )


@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_a_small_adaptation_lowers_the_validation_loss_of_a_convex_problem(optimiser: str) -> None:
    """Of softmax regression, for every task: after the very step that was looked ahead to, and at the end of a run that
    adapts at every step."""
    group = make_group("linear", optimiser, steps=12)
    policy, phi = adapting(**PAPER, refresh=1)
    still = phi.clone()
    still[-1] = -100.0  # at the least rate there is
    for steps, log_rate in ((1, -1.0), (12, 0.0)):
        phi[-1] = log_rate
        adapted, other = (
            validation_loss(group, after(InnerLoop(group, policy, InnerConfig()), each, steps).theta)
            for each in (phi, still)
        )
        assert (adapted < other).all(), steps


def test_at_no_rate_it_is_a_constant() -> None:
    policy, phi = adapting(std=1e12, refresh=2)
    group = make_group()
    want = after(InnerLoop(group, at_rest(refresh=2), InnerConfig()), phi[:-1], 7)
    torch.testing.assert_close(after(InnerLoop(group, policy, InnerConfig()), phi, 7).theta, want.theta)


def test_it_goes_on_from_where_it_was_and_adapts_at_refreshes_only() -> None:
    policy, phi = adapting(refresh=3)
    loop = InnerLoop(make_group(), policy, InnerConfig())
    sums = [after(loop, phi, steps).features for steps in range(1, 8)]
    assert all(each is not None for each in sums)
    changed = [not torch.equal(a, b) for a, b in pairwise(sums)]  # type: ignore[arg-type]
    assert changed == [False, False, True, False, False, True]


def test_a_task_without_validation_rows_stays_where_it_is() -> None:
    policy, phi = adapting(refresh=2)
    group = make_group()
    group.validation.mask[1] = 0
    features = after(InnerLoop(group, policy, InnerConfig()), phi, 7).features
    assert features is not None and (features[1] == 0).all() and (features[[0, 2]] != 0).any(1).all()


def test_the_meta_gradient_is_of_first_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the run with every refresh's descent held as it was, by finite differences; and not that of the run whose
    tasks adapt anew."""
    policy, phi = adapting(std=0.5, refresh=2, **PAPER)
    loop = InnerLoop(make_group("mlp", "sgd", steps=5, learning_rate=0.5), policy, InnerConfig())
    estimator = make_estimator(EstimatorConfig(), OuterLossConfig(every=3))
    direction, h = torch.randn_like(phi), 1e-6

    def slope() -> float:
        up, down = (
            estimator.estimate(loop, phi + sign * h * direction, loop.start(), 5, ()).outer_loss for sign in (1, -1)
        )
        return (up - down) / (2 * h)

    kept: list[Tensor] = []
    descent = AdaptingPolicy.descent

    def noted(*arguments: Any) -> Tensor:
        kept.append(descent(*arguments))
        return kept[-1]

    following = slope()
    monkeypatch.setattr(AdaptingPolicy, "descent", noted)
    gradient = estimator.estimate(loop, phi, loop.start(), 5, ()).gradient
    assert len(kept) == 3
    order = iter(kept + kept)
    monkeypatch.setattr(AdaptingPolicy, "descent", lambda *_: next(order))
    held = slope()
    assert gradient @ direction.numpy() == pytest.approx(held, rel=1e-5)
    assert abs(following - held) > 1e-3 * abs(held), "the case tells the two apart"
