"""What a policy is said to do is what it does."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from palf_dist import AdaptiveLoss
from palf_dist.config import PolicyConfig
from palf_dist.explanation import HELD, RANGES, Explanation, explain
from palf_dist.policies.policy_file import PolicyArtefact
from palf_dist.types import CONTROL_INDEX
from tests.adaptive_cases import artefact


def explained(policy: PolicyArtefact) -> Explanation:
    return explain(policy.policy(), torch.from_numpy(policy.phi))


def asked(policy: PolicyArtefact, state: np.ndarray) -> np.ndarray:
    """The controls in a raw state [S], in the order of ``CONTROLS``."""
    given = torch.from_numpy(state).float()[None]
    return policy.policy().controls(torch.from_numpy(policy.phi), given)[0].numpy()


def test_each_point_is_what_the_policy_says_there() -> None:
    policy = artefact(kind="informed")
    size = len(policy.mean)
    policy = replace(policy, mean=np.linspace(0.2, 0.7, size, dtype="f4"), std=np.full(size, 0.1, "f4"))
    item = explained(policy)
    columns = [CONTROL_INDEX[name] for name in item.controls]
    assert item.controls == (*policy.spec.basis, *policy.spec.hyperparameters)
    assert np.allclose(asked(policy, item.usual_state)[columns], item.usual, atol=1e-5)
    for row in (0, 4, size - 1):
        for point in (0, 7, 20):
            state = item.usual_state.copy()
            state[row] = item.values[row, point]
            assert np.allclose(asked(policy, state)[columns], item.curves[row, point], rtol=1e-4, atol=1e-5)
    weights = item.curves[..., : len(policy.spec.basis)]
    assert np.allclose(weights.sum(-1), 1)


def test_values_stay_within_what_a_feature_can_be() -> None:
    policy = artefact(kind="informed")
    item = explained(replace(policy, mean=policy.mean + 0.9, std=policy.std * 5))
    assert [name for name in item.features if name not in RANGES] == ["loss_gap", "accuracy_gap"]
    for name, values in zip(item.features, item.values, strict=True):
        low, high = RANGES.get(name, (-np.inf, np.inf))
        assert low <= values.min() < values.max() <= high and (np.diff(values) > 0).all()
    time = item.features.index("time")
    assert item.values[time, [0, -1]].tolist() == [0, 1]
    gap = item.features.index("loss_gap")
    assert item.values[gap, [0, -1]] == pytest.approx([0.9 - 10, 0.9 + 10])


def test_the_order_is_by_how_far_the_controls_go() -> None:
    """A policy that is deaf to a feature has it last."""
    policy = artefact()
    first_layer = len(policy.spec.features) * policy.spec.hidden
    phi = policy.phi.copy()
    deaf, loud = 2, 5
    layer = phi[:first_layer].reshape(-1, policy.spec.hidden)
    layer[deaf] = 0
    layer[loud] *= 5
    item = explained(replace(policy, phi=phi))
    assert item.order[-1] == deaf and item.order[0] == loud
    assert item.reach[deaf].max() < 1e-9 < item.reach[loud].max()


def test_a_policy_that_remembers_has_been_in_the_state_for_a_while() -> None:
    policy = artefact(kind="recurrent", hidden=4)
    item = explained(policy)
    history = torch.from_numpy(item.usual_state).float().expand(1, HELD, -1)
    last = policy.policy().controls(torch.from_numpy(policy.phi), history)[0].numpy()
    assert np.allclose(last[[CONTROL_INDEX[name] for name in item.controls]], item.usual, atol=1e-5)


@pytest.mark.parametrize("kind", get_args(PolicyConfig.model_fields["kind"].annotation))
def test_every_kind_is_explained(kind: str) -> None:
    policy = artefact(kind=kind, hidden=4)
    item = explained(policy)
    assert (
        item.curves.shape
        == (*item.values.shape, len(item.controls))
        == (len(policy.spec.features), 21, item.usual.size)
    )
    assert np.isfinite(item.curves).all() and np.isfinite(item.usual).all()
    if kind == "constant":
        assert item.order == []


def test_a_loss_explains_its_policy_and_is_not_changed() -> None:
    policy = artefact()
    criterion = AdaptiveLoss(policy, total_steps=10)
    before = {name: value.clone() for name, value in criterion.state_dict().items() if isinstance(value, torch.Tensor)}
    item = criterion.explain()
    assert np.array_equal(item.curves, explained(policy).curves)
    after = criterion.state_dict()
    assert all(torch.equal(value, after[name]) or value.isnan().all() for name, value in before.items())
