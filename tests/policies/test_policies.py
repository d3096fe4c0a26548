from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from palf_dist.config import PolicyConfig, PolicyStart
from palf_dist.errors import ConfigError
from palf_dist.evaluation.methods import METHODS, baseline_policy
from palf_dist.policies import (
    AdaptingPolicy,
    CurriculumPolicy,
    HedgePolicy,
    LearnedPolicy,
    OnlineLearnLoss,
    Policy,
    RecurrentPolicy,
    make_policy,
    policy_spec,
)
from palf_dist.testing import check_policy
from palf_dist.training_state import FEATURES, PAPER_FEATURES, VALIDATION_FEATURES
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, CONTROLS, DEFAULT_HYPERPARAMETERS, HYPERPARAMETERS, NUM_BASIS

ALL = PolicyConfig(basis=BASIS_LOSSES, hyperparameters=HYPERPARAMETERS)
START = {"e": 0.94, "la": 0.3, "ew": 0.01, "wd": 5.0, "gamma": 4.0, "eps": 0.49, "a": 0.1, "b": 3.0, "tau": 0.07}
START |= {"q": 0.99, "lam": 0.2, "beta": 0.3}


def learned(config: PolicyConfig) -> LearnedPolicy:
    spec = policy_spec(config)
    return make_policy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))


KINDS = get_args(PolicyConfig.model_fields["kind"].annotation)
POLICIES: dict[str, Policy] = {
    **{kind: learned(PolicyConfig(kind=kind)) for kind in KINDS},
    "all": learned(ALL),
    "elsewhere": learned(ALL.model_copy(update={"start": PolicyStart(**START)})),
    "static": baseline_policy(METHODS["s5"]),
    "uniform": baseline_policy(METHODS["uniform"]),
    "curriculum": CurriculumPolicy(),
    "hedge": HedgePolicy(),
    "horizon": HedgePolicy(("ce", "focal"), horizon=3),
    "online_learnloss": OnlineLearnLoss(),
    "shielded": learned(PolicyConfig(shield=0.5)),
}


def states(policy: Policy, size: int) -> torch.Tensor:
    """Random states of as many tasks; of three refreshes where the policy reads them all."""
    return torch.randn(size, *([3] if policy.reads_history else []), len(policy.features))


@pytest.mark.parametrize("name", POLICIES)
def test_it_passes_the_suite_that_users_get(name: str) -> None:
    check_policy(POLICIES[name])


@pytest.mark.parametrize("kind", ["robust", "validation_free", "recurrent", "schedule", "constant"])
def test_an_untrained_policy_is_nearly_s5_and_ignores_the_state(kind: str) -> None:
    policy = POLICIES[kind]
    phi = torch.from_numpy(policy.initial())
    controls = policy.controls(phi, states(policy, 5))
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


def test_the_table_of_the_docs_says_who_reads_what() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    names: list[str] = []
    for line in page[page.index("| feature |") :].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]):
            names.append(name)
            for column, kinds in ((2, ("robust", "validation_free", "recurrent")), (3, ("palf", "widened"))):
                assert {name in POLICIES[kind].features for kind in kinds} == {cells[column] == "x"}, name
    assert tuple(names) == FEATURES


def test_the_widened_preset_is_palf_and_four_hyperparameters() -> None:
    policy, palf = POLICIES["widened"], POLICIES["palf"]
    assert (
        (policy.active_basis, policy.features)
        == (palf.active_basis, palf.features)
        == (BASIS_LOSSES[:5], PAPER_FEATURES)
    )
    state = torch.randn(2, 6)
    start = [p.controls(torch.from_numpy(p.initial()), state) for p in (policy, palf)]
    torch.testing.assert_close(*start)
    moved = policy.controls(torch.randn(policy.num_parameters), state)[0, NUM_BASIS:] != start[0][0, NUM_BASIS:]
    assert [h for h, did in zip(HYPERPARAMETERS, moved.tolist(), strict=True) if did] == ["gamma", "eps", "a", "b"]


def test_a_constant_has_nothing_but_its_outputs() -> None:
    policy = POLICIES["constant"]
    assert policy.num_parameters == 2 + 4 and policy.features == ()
    controls = policy.controls(torch.randn(policy.num_parameters), torch.zeros(3, 0))
    assert torch.equal(controls, controls[:1].expand_as(controls))


@pytest.mark.parametrize(
    ("kind", "features", "message"),
    [
        ("schedule", ("time", "loss"), "policy.features: time, loss given, but a schedule policy reads time alone"),
        ("schedule", (), "policy.features: none given, but a schedule policy reads time alone; leave it out"),
        ("constant", ("time",), "policy.features: time given, but a constant policy reads no state"),
        ("validation_free", ("time", "loss_gap"), "policy.features: loss_gap read validation rows, which"),
        ("maml", ("time",), "policy.features: a maml policy reads its own validation loss alone; leave it out"),
        ("maml", (), "policy.features: a maml policy reads its own validation loss alone; leave it out"),
    ],
)
def test_features_that_contradict_the_kind_are_refused(kind: str, features: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_spec(PolicyConfig(kind=kind, features=features))


def test_an_adapting_policy_starts_as_s5_and_moves_against_what_it_reads() -> None:
    policy = POLICIES["maml"]
    assert isinstance(policy, AdaptingPolicy) and policy.num_parameters == 2 + 4 + 1
    assert policy.features == tuple(f"descent_{name}" for name in ("ce", "robust_ce", "e", "la", "ew", "wd"))
    phi = torch.from_numpy(policy.initial())
    (untouched,) = policy.controls(phi, torch.zeros(1, 6))
    torch.testing.assert_close(untouched, POLICIES["constant"].controls(torch.zeros(6), torch.zeros(1, 0))[0])
    for index, name in enumerate(policy.features):
        state = torch.zeros(1, 6)
        state[0, index] = 1.0
        column = CONTROL_INDEX[name.removeprefix("descent_")]
        moved = policy.controls(phi, state)[0, column]
        faster = policy.controls(torch.cat([phi[:-1], torch.ones(1)]), state)[0, column]
        assert faster < moved < untouched[column], name


def test_the_validation_free_preset_reads_no_validation_rows() -> None:
    assert not {*POLICIES["validation_free"].features} & {*VALIDATION_FEATURES}


def test_the_recurrent_policy_is_torchs_gru_cell() -> None:
    policy = learned(PolicyConfig(kind="recurrent", hidden=5))
    assert isinstance(policy, LearnedPolicy)
    phi, state = torch.randn(policy.num_parameters).double(), 0.5 * torch.randn(4, 6, len(policy.features)).double()
    w_state, w_memory, bias, w_out, b_out = policy._parts(phi)
    cell = torch.nn.GRUCell(len(policy.features), 5).double()
    with torch.no_grad():
        cell.weight_ih.copy_(w_state.T)
        cell.weight_hh.copy_(w_memory.T)
        cell.bias_ih.copy_(bias)
        cell.bias_hh.zero_()
        memory = torch.zeros(4, 5).double()
        for now in state.unbind(1):
            memory = cell(now, memory)
    torch.testing.assert_close(policy._network(policy._parts(phi), state), memory @ w_out + b_out)


def test_one_pass_over_a_run_gives_the_controls_of_every_refresh() -> None:
    policy = POLICIES["recurrent"]
    assert isinstance(policy, RecurrentPolicy)
    phi, state = torch.randn(policy.num_parameters), torch.randn(4, 6, len(policy.features))
    along = policy.controls_along(phi, state)
    assert along.shape == (6, 4, len(CONTROLS))
    assert all(torch.equal(along[at], policy.controls(phi, state[:, : at + 1])) for at in range(6))


def test_the_recurrent_policy_remembers() -> None:
    """Two runs that look alike now, and did not before."""
    policy = POLICIES["recurrent"]
    phi, state = torch.randn(policy.num_parameters), torch.randn(2, 3, len(policy.features))
    state[1, 1:] = state[0, 1:]
    first, second = policy.controls(phi, state)
    assert not torch.allclose(first, second)


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
