from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palf_dist.config import InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.inner_loop import InnerLoop, InnerState, task_facts
from palf_dist.inner_optimisers import cosine_rate
from palf_dist.losses import LossContext, reference_mixture
from palf_dist.outer_loss import accuracy, validation_loss
from palf_dist.policies import LearnedPolicy, make_policy, policy_spec
from palf_dist.training_state import HUTCHINSON_ROWS, hessian_trace, hutchinson_probes
from palf_dist.types import BASIS_LOSSES, HYPERPARAMETERS
from tests.groups import make_group

CPU = torch.device("cpu")


def full_policy(refresh: int = 3) -> tuple[LearnedPolicy, torch.Tensor]:
    """All basis losses and hyper-parameters, all features, random parameters."""
    from palf_dist.training_state import FEATURES

    config = PolicyConfig(features=FEATURES, basis=BASIS_LOSSES, hyperparameters=HYPERPARAMETERS, refresh=refresh)
    spec = policy_spec(config)
    policy = LearnedPolicy(spec, torch.zeros(len(FEATURES)), torch.full((len(FEATURES),), 2.0))
    torch.manual_seed(0)
    phi = torch.from_numpy(policy.initial()).double()
    return policy, phi + 0.2 * torch.randn_like(phi)


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "resnet", "transformer", "module"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_closed_form_step_equals_the_autograd_step(name: str, optimiser: str) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name, optimiser), policy, InnerConfig())
    ours, plain = loop.start(), loop.start()
    for _ in range(loop.steps):
        with torch.no_grad():
            mine = loop.step(ours, phi)
        plain.theta = plain.theta.detach().requires_grad_(True)
        plain.slots = tuple(slot.detach() for slot in plain.slots)
        plain.controls = None if plain.controls is None else plain.controls.detach()
        other = loop.step(plain, phi, differentiable=True)
        # adam divides by its root: rounding of a gradient that is zero in exact arithmetic shows at 1e-6 times itself
        torch.testing.assert_close(ours.theta, plain.theta, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(mine.adaptive_loss(), other.adaptive_loss().detach(), rtol=1e-9, atol=1e-11)
    assert ours.features is not None and plain.features is not None
    torch.testing.assert_close(ours.features, plain.features, rtol=1e-6, atol=1e-8, equal_nan=True)


def test_plain_cross_entropy_is_ordinary_training() -> None:
    """Under the static CE policy each task trains as a torch module with torch's own SGD would."""
    group = make_group("mlp", "sgd", steps=9)
    loop = InnerLoop(group, baseline_policy(METHODS["ce"]), InnerConfig())
    state = loop.start()
    loop.run(state, torch.zeros(0), loop.steps)
    for task in range(group.size):
        theta = torch.nn.Parameter(group.theta0[task].clone())
        sgd = torch.optim.SGD(
            [theta], lr=1.0, weight_decay=float(group.weight_decay[task])
        )  # for SGD the same as decoupled
        for step in range(loop.steps):
            inputs, labels = group.train.batch(group.batches[step])
            logits = group.model.apply(theta.expand_as(group.theta0), inputs)[0][task][:, group.class_mask[task]]
            sgd.param_groups[0]["lr"] = float(group.learning_rate[task]) * cosine_rate(step, loop.steps)
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[task]).backward()
            sgd.step()
        torch.testing.assert_close(state.theta[task], theta.detach(), rtol=1e-9, atol=1e-11)


def test_averaged_predictions_follow_their_definition() -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(steps=1), policy, InnerConfig(ema=0.7))
    state = loop.start()
    before = state.averaged.clone()
    with torch.no_grad():
        result = loop.step(state, phi)
    index = loop.group.batches[0]
    for task in range(3):
        k = int(loop.group.num_classes[task])
        p = torch.softmax(result.logits[task, :, :k], -1)
        for place, row in enumerate(index[task].tolist()):
            want = 0.7 * before[task, row, :k] + 0.3 * p[place]
            torch.testing.assert_close(state.averaged[task, row, :k], want)
            recalled = result.batch.recalled
            assert recalled.own_probability[task, place] == pytest.approx(1 / k) and not recalled.seen[task, place]
        untouched = sorted(set(range(14)) - set(index[task].tolist()))
        assert torch.equal(state.averaged[task, untouched], before[task, untouched])
        assert state.seen[task].nonzero()[:, 0].tolist() == sorted(set(index[task].tolist()))


@pytest.mark.parametrize("kind", ["full", "recurrent", "maml"])
def test_carried_state_continues_exactly(kind: str) -> None:
    policy, phi = full_policy(refresh=3)
    if kind != "full":
        spec = policy_spec(PolicyConfig(kind=kind, refresh=3))
        policy = make_policy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))
        phi = torch.from_numpy(policy.initial()).double() + 0.2
    whole, parts = (InnerLoop(make_group(), policy, InnerConfig()) for _ in range(2))
    straight = whole.start()
    whole.run(straight, phi, 7)
    state = parts.start()
    for stop in (2, 3, 7):
        parts.run(state, phi, stop)
        arrays = {name: np.array(value) for name, value in state.to_arrays().items()}
        state = InnerState.from_arrays(arrays, CPU)
    assert torch.equal(state.theta, straight.theta) and torch.equal(state.averaged, straight.averaged)


def test_task_facts_count_real_rows_only() -> None:
    group = make_group()
    facts = task_facts(group)
    assert facts.train_sizes.tolist() == [14, 14, 12]
    labels = group.train.labels[2, :12]
    want = torch.bincount(labels, minlength=4).double() / 12
    torch.testing.assert_close(facts.class_frequencies[2], want)


def test_tasks_do_not_interact() -> None:
    policy, phi = full_policy()
    group = make_group()
    loop = InnerLoop(group, policy, InnerConfig())
    state = loop.start()
    loop.run(state, phi, loop.steps)
    disturbed = replace(group, theta0=torch.cat([group.theta0[:1] * 3, group.theta0[1:]]))
    other_loop = InnerLoop(disturbed, policy, InnerConfig())
    other = other_loop.start()
    other_loop.run(other, phi, loop.steps)
    torch.testing.assert_close(state.theta[1:], other.theta[1:], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(state.theta[0], other.theta[0])


def test_the_loop_feeds_the_state_what_it_says() -> None:
    """Features of the loop at its second refresh against the same ones read from quantities computed here."""
    names = ("gradient_norm", "hessian_trace", "validation_accuracy", "validation_loss", "disagreement", "time")
    spec = policy_spec(PolicyConfig(features=names, basis=BASIS_LOSSES[:5], refresh=4))
    policy = LearnedPolicy(spec, torch.zeros(len(names)), torch.ones(len(names)))
    group = make_group(steps=8)
    loop = InnerLoop(group, policy, InnerConfig())
    phi = torch.from_numpy(policy.initial()).double()
    state = loop.start()
    loop.run(state, phi, 3)
    before, controls = state.theta, state.controls
    loop.run(state, phi, 4)
    theta, averaged, seen = state.theta, state.averaged.clone(), state.seen.clone()
    loop.run(state, phi, 5)
    assert state.features is not None and controls is not None
    got = dict(zip(names, state.features.unbind(1), strict=True))

    leaf = before.clone().requires_grad_(True)
    inputs, labels = group.train.batch(group.batches[3])
    logits, features = group.model.apply(leaf, inputs)
    context = LossContext.create(group.class_mask, group.log_prior_ratio)
    loss = reference_mixture(logits, labels, features, controls, context, policy.active_basis)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(got["gradient_norm"], gradient.square().sum(1).log(), rtol=1e-6, atol=1e-8)

    inputs, labels = group.train.batch(group.batches[4])
    few = tuple(column[:, :HUTCHINSON_ROWS] for column in inputs)
    probes = hutchinson_probes(theta.shape[1], theta.dtype)
    trace = hessian_trace(group.model, theta, few, labels[:, :HUTCHINSON_ROWS], group.class_mask, probes)
    torch.testing.assert_close(got["hessian_trace"], trace.sign() * trace.abs().log1p())
    assert (trace != 0).all()

    rows = group.validation
    logits = group.model.apply(theta, rows.inputs)[0]
    right = accuracy(logits, rows.labels, rows.mask, group.class_mask)
    torch.testing.assert_close(got["validation_accuracy"], right)
    ce = validation_loss(OuterLossConfig(kind="cross_entropy"), logits, rows.labels, rows.mask, group.class_mask)
    torch.testing.assert_close(got["validation_loss"], (ce / group.num_classes.log()).log1p())

    wrong = (averaged.argmax(-1) != group.train.labels) & seen
    torch.testing.assert_close(got["disagreement"], wrong.sum(1).double() / seen.sum(1))
    assert got["time"].tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["mlp_deep_categorical", "resnet"])
def test_a_large_model_reads_a_split_piece_by_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = full_policy()
    loop = InnerLoop(make_group(name), policy, InnerConfig())
    whole, theta, model = loop.evaluate(loop.group.theta0, loop.group.train), loop.group.theta0, loop.group.model
    sizes: list[int] = []
    forward = model.forward

    def counted(theta: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        sizes.append(inputs[0].shape[1])
        return forward(theta, inputs)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr("palf_dist.adaptation.AT_ONCE", 4 * model.num_parameters + 1)
    torch.testing.assert_close(loop.evaluate(theta, loop.group.train), whole, rtol=1e-12, atol=0)
    assert sizes == [4, 4, 4, 2]
    monkeypatch.setattr("palf_dist.adaptation.AT_ONCE", 1)
    torch.testing.assert_close(loop.evaluate(theta, loop.group.train), whole, rtol=1e-12, atol=0)
    assert sizes[4:] == [1] * 14
