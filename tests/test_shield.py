from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from palf_dist.config import InnerConfig, PolicyConfig
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.inner_loop import InnerLoop, InnerState
from palf_dist.inner_steps import Recalled
from palf_dist.losses import reference_losses
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.shield import REFERENCE, least_mixing, mix, reference_products
from palf_dist.types import CONTROL_INDEX, NUM_BASIS
from tests.groups import ARCHITECTURES, make_group
from tests.test_inner_loop import full_policy

seeds = st.integers(0, 10**6)
kappas = st.floats(0.01, 1)


def gradients(seed: int, tasks: int, parameters: int) -> Tensor:
    """Random gradients [G, K, P] of the basis losses."""
    torch.manual_seed(seed)
    return torch.randn(tasks, NUM_BASIS, parameters, dtype=torch.float64)


def random_alpha(tasks: int) -> Tensor:
    return torch.softmax(2 * torch.randn(tasks, NUM_BASIS, dtype=torch.float64), 1)


@settings(max_examples=40)
@given(seed=seeds, kappa=kappas, parameters=st.integers(1, 6))
def test_mixing_is_the_least_that_meets_the_condition(seed: int, kappa: float, parameters: int) -> None:
    """Against bisection over m with the gradient of the mixture itself."""
    each = gradients(seed, 5, parameters)
    alpha, reference = random_alpha(5), each[:, REFERENCE]
    got = least_mixing(alpha, torch.einsum("gkp,gp->gk", each, reference), kappa)
    vertex = torch.eye(NUM_BASIS, dtype=torch.float64)[REFERENCE]
    for task in range(5):
        wanted = kappa * float(reference[task] @ reference[task])

        def holds(m: float, task: int = task, wanted: float = wanted) -> bool:
            gradient = ((1 - m) * alpha[task] + m * vertex) @ each[task]
            return float(gradient @ reference[task]) >= wanted * (1 - 1e-12)

        low, high = 0.0, 1.0
        if holds(0.0):
            assert got[task] == 0
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        assert got[task].item() == pytest.approx(high, abs=1e-9) and 0 < got[task] <= 1


def test_what_diverged_or_has_no_reference_gradient_is_left_alone() -> None:
    products = torch.zeros(4, NUM_BASIS)
    products[1, REFERENCE] = torch.nan
    products[2, REFERENCE + 1] = -torch.inf
    products[3, REFERENCE] = torch.inf
    assert least_mixing(torch.full((4, NUM_BASIS), 1 / NUM_BASIS), products, 0.5).tolist() == [0] * 4


def test_basis_losses_that_came_later_do_not_change_the_bits_where_they_weigh_nothing() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        alpha, products = torch.softmax(torch.randn(200, 6, dtype=dtype), 1), torch.randn(200, NUM_BASIS, dtype=dtype)
        products[:, REFERENCE] = products[:, REFERENCE].abs() + 1
        padded = torch.cat([alpha, torch.zeros(200, NUM_BASIS - 6, dtype=dtype)], 1)
        mixing = least_mixing(padded, products, 0.9)
        missing = 0.9 * products[:, REFERENCE] - (alpha * products[:, :6].contiguous()).sum(1)
        own = (alpha * products[:, :6].contiguous()).sum(1)
        want = torch.where(missing > 0, missing / (products[:, REFERENCE] - own), 0.0).clamp(max=1.0)
        assert torch.equal(mixing, want) and 0 < (mixing > 0).sum() < 200


def test_mix_moves_alpha_alone_and_linearly() -> None:
    policy, phi = full_policy()
    controls = policy.controls(phi, torch.randn(3, len(policy.features)).double())
    mixed = mix(controls, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.equal(mixed[0], controls[0]) and torch.equal(mixed[:, NUM_BASIS:], controls[:, NUM_BASIS:])
    torch.testing.assert_close(mixed[:, :NUM_BASIS].sum(1), torch.ones(3).double())
    assert mixed[2, :NUM_BASIS].tolist() == [1] + [0] * (NUM_BASIS - 1)
    assert mixed[1, REFERENCE].item() == pytest.approx(0.75 * controls[1, REFERENCE].item() + 0.25)
    torch.testing.assert_close(mixed[1, 1:NUM_BASIS], 0.75 * controls[1, 1:NUM_BASIS])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_those_of_autograds_gradients(name: str) -> None:
    """Of every basis loss at the present hyper-parameters, with prior adjustment, posterior weights and padding."""
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name), policy, InnerConfig())
    state = loop.start()
    loop.run(state, phi, 4)
    assert state.controls is not None
    inputs, labels = loop.minibatch(4)
    own = torch.rand(labels.shape, dtype=torch.float64)
    averaged = torch.rand(*labels.shape, 4, dtype=torch.float64) / 4 * loop.group.class_mask[:, None]
    context = loop.parts.context_of(Recalled(own, own > 0.3, averaged))
    with torch.no_grad():
        outputs = loop.group.model.forward(state.theta, inputs)
    got = reference_products(loop.group.model, loop.head, state.theta, outputs, labels, state.controls, context)

    leaf = state.theta.clone().requires_grad_(True)
    z, h = loop.group.model.apply(leaf, inputs)
    losses = reference_losses(z, labels, h, state.controls, context, policy.active_basis).mean(2)
    each = torch.stack([torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in losses], 1)
    torch.testing.assert_close(got, torch.einsum("gkp,gp->gk", each, each[:, REFERENCE]), rtol=1e-9, atol=1e-12)


class Quadratics:
    """l_k(theta) = (theta - c_k)' A_k (theta - c_k) / 2 with A_k positive definite: smooth, and at odds."""

    def __init__(self, seed: int, parameters: int) -> None:
        torch.manual_seed(seed)
        self.centres = 3 * torch.randn(NUM_BASIS, parameters, dtype=torch.float64)
        root = torch.randn(NUM_BASIS, parameters, parameters, dtype=torch.float64)
        self.curvatures = root @ root.transpose(1, 2) + 0.1 * torch.eye(parameters, dtype=torch.float64)
        self.smoothness = float(torch.linalg.eigvalsh(self.curvatures[REFERENCE])[-1])
        self.theta = torch.randn(parameters, dtype=torch.float64)

    def reference(self, theta: Tensor) -> float:
        away = theta - self.centres[REFERENCE]
        return float(away @ self.curvatures[REFERENCE] @ away) / 2

    def gradients(self, theta: Tensor) -> Tensor:
        return torch.einsum("kpq,kq->kp", self.curvatures, theta - self.centres)


@settings(max_examples=40)
@given(seed=seeds, kappa=kappas, parameters=st.integers(1, 6))
def test_under_the_shield_the_reference_loss_never_rises(seed: int, kappa: float, parameters: int) -> None:
    """Gradient descent on random smooth problems with a random alpha at every step, whose steps are the largest that
    the descent lemma allows."""
    problem = Quadratics(seed, parameters)
    theta, before = problem.theta, problem.reference(problem.theta)
    for _ in range(10):
        each = problem.gradients(theta)
        controls = torch.cat([random_alpha(1), torch.ones(1, 9, dtype=torch.float64)], 1)
        mixing = least_mixing(controls[:, :NUM_BASIS], (each @ each[REFERENCE])[None], kappa)
        gradient = mix(controls, mixing)[0, :NUM_BASIS] @ each
        slope = float(each[REFERENCE] @ each[REFERENCE])
        rate = 2 * kappa * slope / (problem.smoothness * float(gradient @ gradient))
        theta = theta - rate * gradient
        after = problem.reference(theta)
        assert after <= before * (1 + 1e-12) + 1e-12
        before = after


@given(seed=seeds, parameters=st.integers(1, 6), rate=st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_without_it_some_alpha_makes_the_reference_loss_rise(seed: int, parameters: int, rate: float) -> None:
    """However small the step: where one of the basis losses is at odds with the reference, by its vertex."""
    problem = Quadratics(seed, parameters)
    each = problem.gradients(problem.theta)
    products = each @ each[REFERENCE]
    assume(products.min() < -1e-3)
    before = problem.reference(problem.theta)
    alpha = torch.eye(NUM_BASIS, dtype=torch.float64)[products.argmin()]
    assert problem.reference(problem.theta - rate * alpha @ each) > before
    controls = torch.cat([alpha, torch.ones(9, dtype=torch.float64)])[None]
    shielded = mix(controls, least_mixing(controls[:, :NUM_BASIS], products[None], 0.5))[0, :NUM_BASIS] @ each
    small = min(rate, float(0.5 * products[REFERENCE] / (problem.smoothness * (shielded @ shielded))))
    assert problem.reference(problem.theta - small * shielded) < before


def smoothing_policy(shield: float | None, refresh: int = 1) -> tuple[LearnedPolicy, Tensor]:
    """Nearly all weight on a strong label smoothing, which pulls a confident model back from its labels."""
    config = PolicyConfig(
        features=("time",), basis=("ce", "label_smoothing"), hyperparameters=("eps",), refresh=refresh, shield=shield
    )
    spec = replace(policy_spec(config), initial_weights=(0.01, 0.99), start={"eps": 0.4})
    policy = LearnedPolicy(spec, [0.0], [1.0])
    return policy, torch.from_numpy(policy.initial()).double()


def confident_run(shield: float | None) -> tuple[list[Tensor], InnerState, InnerLoop]:
    """Cross-entropy [G] of a minibatch before and after each of six steps of gradient descent on it, with a model
    that was trained until it was sure."""
    group = make_group("mlp", "sgd", steps=300, learning_rate=0.5)
    group = replace(group, batches=group.batches[:1].expand(300, -1, -1).contiguous())
    sure = InnerLoop(group, baseline_policy(METHODS["ce"]), InnerConfig()).start()
    InnerLoop(group, baseline_policy(METHODS["ce"]), InnerConfig()).run(sure, torch.zeros(0), 299)
    policy, phi = smoothing_policy(shield)
    few = replace(group, theta0=sure.theta, batches=group.batches[:6], weight_decay=0 * group.weight_decay)
    few = replace(few, learning_rate=torch.full_like(group.learning_rate, 1e-3))
    loop = InnerLoop(few, policy, InnerConfig())
    state = loop.start()
    values = []
    for step in range(7):
        inputs, labels = loop.minibatch(0)
        z = few.model.apply(state.theta, inputs)[0].masked_fill(~few.class_mask[:, None], -1e9)
        values.append(-torch.log_softmax(z, -1).gather(2, labels[..., None]).mean((1, 2)))
        loop.run(state, phi, min(step + 1, 6))
    return values, state, loop


def test_in_the_inner_loop_it_keeps_the_reference_loss_from_rising() -> None:
    bare, _, _ = confident_run(None)
    assert all((after > before).all() for before, after in pairwise(bare))
    values, state, loop = confident_run(0.5)
    assert all((after < before).all() for before, after in pairwise(values))
    share = loop.shield_share(state)
    assert share is not None and share.tolist() == [1.0] * 3


def test_it_acts_at_refreshes_by_the_minibatch_of_the_refresh_and_is_counted() -> None:
    """Against a replay of the run with mixing from autograd's gradients."""
    kappa = 0.8
    policy, phi = full_policy(refresh=2)
    policy.shield = kappa
    loop = InnerLoop(make_group(steps=9), policy, InnerConfig())
    state, counts = loop.start(), torch.zeros(3).double()
    for step in range(loop.steps):
        theta = state.theta
        with torch.no_grad():
            result = loop.step(state, phi)
        assert state.controls is not None and state.features is not None and state.mixing is not None
        if not result.refreshed:
            continue
        asked = policy.controls(phi, state.features)
        inputs, labels = loop.minibatch(step)
        leaf = theta.clone().requires_grad_(True)
        z, h = loop.group.model.apply(leaf, inputs)
        context = loop.parts.context_of(result.batch.recalled)
        losses = reference_losses(z, labels, h, asked, context, policy.active_basis).mean(2)
        each = torch.stack([torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in losses], 1)
        reference = each[:, REFERENCE]

        def slope(alpha: Tensor, each: Tensor = each, reference: Tensor = reference) -> Tensor:
            return torch.einsum("gk,gkp,gp->g", alpha, each, reference)

        needed = kappa * reference.square().sum(1)
        acts = slope(asked[:, :NUM_BASIS]) < needed
        counts += acts
        got = slope(state.controls[:, :NUM_BASIS])
        torch.testing.assert_close(got[acts], needed[acts], rtol=1e-8, atol=1e-12)
        assert torch.equal(state.controls[~acts], asked[~acts]) and torch.equal(state.mixing > 0, acts)
        assert torch.equal(state.controls[:, CONTROL_INDEX["e"] :], asked[:, CONTROL_INDEX["e"] :])
    assert 0 < counts.sum() < 15, "the case shows both"
    share = loop.shield_share(state)
    assert share is not None and torch.equal(share, counts / 5)


def test_without_a_shield_there_is_nothing_to_count() -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(), policy, InnerConfig())
    state = loop.start()
    loop.run(state, phi, loop.steps)
    assert state.mixing is None and loop.shield_share(state) is None
