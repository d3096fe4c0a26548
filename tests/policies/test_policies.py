from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.config import PolicyConfig, PolicyStart
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.policies import CurriculumPolicy, LearnedPolicy, Policy, policy_spec
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, CONTROLS, DEFAULT_HYPERPARAMETERS, HYPERPARAMETERS, NUM_BASIS

ALL = PolicyConfig(basis=BASIS_LOSSES, hyperparameters=HYPERPARAMETERS)
START = {"e": 0.94, "la": 0.3, "ew": 0.01, "wd": 5.0, "gamma": 4.0, "eps": 0.49, "a": 0.1, "b": 3.0, "tau": 0.07}


def learned(config: PolicyConfig) -> LearnedPolicy:
    spec = policy_spec(config)
    return LearnedPolicy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))


POLICIES: dict[str, Policy] = {
    "robust": learned(PolicyConfig()),
    "palf": learned(PolicyConfig(kind="palf")),
    "all": learned(ALL),
    "elsewhere": learned(ALL.model_copy(update={"start": PolicyStart(**START)})),
    "static": baseline_policy(METHODS["s5"]),
    "uniform": baseline_policy(METHODS["uniform"]),
    "curriculum": CurriculumPolicy(),
}


@pytest.mark.parametrize("name", POLICIES)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 0.3, 3.0, 100.0]))
def test_controls_are_a_mixture_and_in_bounds(name: str, seed: int, scale: float) -> None:
    policy = POLICIES[name]
    torch.manual_seed(seed)
    phi = torch.from_numpy(policy.initial()) + scale * torch.randn(policy.num_parameters)
    state = 3 * torch.randn(4, len(policy.features))
    state[0] = float("nan")
    if name == "curriculum":
        state = torch.rand(4, 1)
    controls = policy.controls(phi, state)
    alpha = controls[:, :NUM_BASIS]
    assert controls.shape == (4, len(CONTROLS)) and controls.isfinite().all()
    torch.testing.assert_close(alpha.sum(1), torch.ones(4))
    inactive = [BASIS_LOSSES.index(b) for b in BASIS_LOSSES if b not in policy.active_basis]
    assert (alpha >= 0).all() and (alpha[:, inactive] == 0).all()
    hyper = {h: controls[:, CONTROL_INDEX[h]] for h in HYPERPARAMETERS}
    assert all(((hyper[h] >= 0) & (hyper[h] <= 1)).all() for h in ("e", "ew", "eps")) and (hyper["e"] <= 0.95).all()
    assert all((hyper[h] > 0).all() for h in ("la", "wd", "gamma", "a", "b", "tau"))


def test_untrained_robust_policy_is_nearly_s5_and_ignores_the_state() -> None:
    policy = POLICIES["robust"]
    phi = torch.from_numpy(policy.initial())
    controls = policy.controls(phi, torch.randn(5, len(policy.features)))
    s5 = POLICIES["static"].controls(torch.zeros(0), torch.zeros(1, 0))[0]
    assert torch.equal(controls, controls[:1].expand_as(controls))
    torch.testing.assert_close(controls[0, NUM_BASIS:], s5[NUM_BASIS:])
    assert controls[0, CONTROL_INDEX["robust_ce"]] >= 0.95


def test_palf_preset_starts_uniform_over_the_papers_five_and_sets_alpha_only() -> None:
    policy = POLICIES["palf"]
    assert policy.active_basis == BASIS_LOSSES[:5] and len(policy.features) == 6
    phi = torch.from_numpy(policy.initial())
    torch.testing.assert_close(policy.controls(phi, torch.randn(2, 6))[:, :5], torch.full((2, 5), 0.2))
    moved = policy.controls(torch.randn(policy.num_parameters), torch.randn(2, 6))
    assert moved[0, NUM_BASIS:].tolist() == pytest.approx([DEFAULT_HYPERPARAMETERS[h] for h in HYPERPARAMETERS])


@pytest.mark.parametrize("hyperparameters", [(), ("gamma", "e"), HYPERPARAMETERS])
def test_an_untrained_policy_is_at_its_start_and_stays_where_it_sets_nothing(
    hyperparameters: tuple[str, ...],
) -> None:
    policy = learned(PolicyConfig(hyperparameters=hyperparameters, start=PolicyStart(**START)))
    state = torch.randn(2, len(policy.features))
    untrained = policy.controls(torch.from_numpy(policy.initial()), state)
    assert untrained[0, NUM_BASIS:].tolist() == pytest.approx([START[h] for h in HYPERPARAMETERS], rel=1e-5)
    moved = policy.controls(torch.randn(policy.num_parameters), state)[0, NUM_BASIS:].tolist()
    stays = {h for h, value in zip(HYPERPARAMETERS, moved, strict=True) if value == pytest.approx(START[h], rel=1e-6)}
    assert stays == {*HYPERPARAMETERS} - {*hyperparameters}


def test_the_usual_start_is_no_start() -> None:
    assert policy_spec(PolicyConfig(start=PolicyStart(**DEFAULT_HYPERPARAMETERS))) == policy_spec(PolicyConfig())
    assert policy_spec(PolicyConfig(start=PolicyStart(tau=0.3))).start == {"tau": 0.3}


def test_a_policy_per_task_equals_each_alone() -> None:
    policy = POLICIES["all"]
    phi = torch.randn(3, policy.num_parameters)
    state = torch.randn(3, len(policy.features))
    together = policy.controls(phi, state)
    for task in range(3):
        torch.testing.assert_close(together[task], policy.controls(phi[task], state[task : task + 1])[0])


def test_every_output_learns() -> None:
    policy = POLICIES["all"]
    phi = (torch.from_numpy(policy.initial()) + 0.01 * torch.randn(policy.num_parameters)).requires_grad_(True)
    controls = policy.controls(phi, torch.randn(8, len(policy.features)))
    for column in range(len(CONTROLS)):
        (gradient,) = torch.autograd.grad(controls[:, column].square().sum(), phi, retain_graph=True)
        assert gradient.abs().max() > 0, CONTROLS[column]


def test_curriculum_goes_from_easy_to_hard() -> None:
    controls = CurriculumPolicy().controls(torch.zeros(0), torch.tensor([[0.0], [0.25], [0.5], [1.0]]))
    names = ("label_smoothing", "ce", "focal")
    weights = controls[:, [CONTROL_INDEX[name] for name in names]].tolist()
    assert weights == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]
