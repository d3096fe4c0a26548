"""Basis losses of a user's own in the mixtures of the drop-in loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist import AdaptiveLoss, basis_loss
from palf_dist.config import InnerConfig, PolicyConfig
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop
from palf_dist.own_losses import own_names
from palf_dist.policies import WithoutParameters, fixed_mixture, mixture_controls
from palf_dist.testing import check_basis_loss, check_policy
from palf_dist.training_state import SNAPSHOTS
from tests.adaptive_cases import batch
from tests.groups import make_group


@basis_loss
def brier(z: Tensor, y: Tensor) -> Tensor:
    return (torch.softmax(z, 1) - functional.one_hot(y, z.shape[1])).square().sum(1)


@basis_loss
def tempered(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits / 2, labels, reduction="none")


@basis_loss
def averaged(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels)


class Handover(WithoutParameters):
    """From one loss of a user's own to the other, by the clock."""

    features = ("time",)
    active_basis = ("tempered", "ce", "brier")
    refresh = 2

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        half = state / 2
        return mixture_controls(torch.cat([0.5 - half, torch.full_like(half, 0.5), half], 1), self.active_basis)


class BySize(WithoutParameters):
    """The losses in proportion to what they were in the last snapshot."""

    features = (SNAPSHOTS,)
    active_basis = ("brier", "mae")
    refresh = 2

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return mixture_controls(torch.softmax(state[:, -1, 1:].nan_to_num(0.0), 1), self.active_basis)


def by_hand(logits: Tensor, y: Tensor, alpha: dict[str, float]) -> Tensor:
    """[n]"""
    values = {"ce": functional.cross_entropy(logits, y, reduction="none")}
    values |= {"brier": brier(logits, y), "tempered": tempered(logits, y)}
    return torch.stack([share * values[name] for name, share in alpha.items()]).sum(0)


@pytest.mark.parametrize(
    "alpha", [{"ce": 0.7, "brier": 0.3}, {"brier": 1.0}, {"tempered": 0.5, "ce": 0.25, "brier": 0.25}], ids=str
)
def test_it_is_part_of_the_mixture_in_value_and_gradient(alpha: dict[str, float]) -> None:
    logits, y, _ = batch(0)
    criterion = AdaptiveLoss(fixed_mixture(alpha), total_steps=10)
    ours, theirs = criterion(logits, y), by_hand(logits, y, alpha).mean()
    assert criterion.alpha == pytest.approx(alpha)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in (ours, theirs)))


def test_it_takes_what_other_losses_take() -> None:
    """Class weights, labels to ignore, dense predictions, probabilities and smoothed labels."""
    alpha = {"ce": 0.4, "brier": 0.6}
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])

    def loss_of(**settings) -> AdaptiveLoss:
        return AdaptiveLoss(fixed_mixture(alpha), total_steps=10, **settings)

    logits, y, _ = batch(0)
    ignored = y.clone()
    ignored[2:4] = -100
    known = ignored >= 0
    values = by_hand(logits, y, alpha)
    want = (values * weight[y])[known].sum() / weight[y][known].sum()
    torch.testing.assert_close(loss_of(weight=weight)(logits, ignored), want)
    torch.testing.assert_close(loss_of(reduction="none")(logits, y), values)
    dense = logits.view(2, 2, 2, 4).movedim(-1, 1)
    torch.testing.assert_close(loss_of(reduction="none")(dense, y.view(2, 2, 2)), values.view(2, 2, 2))
    each = torch.stack([by_hand(logits, torch.full_like(y, label), alpha) for label in range(4)], 1)
    targets = torch.softmax(3 * batch(1)[0], 1).detach()
    torch.testing.assert_close(loss_of()(logits, targets), (targets * each).sum(1).mean())
    smooth = 0.8 * functional.one_hot(y, 4) + 0.05
    torch.testing.assert_close(loss_of(label_smoothing=0.2)(logits, y), (smooth * each).sum(1).mean())
    assert not loss_of()(logits, torch.full_like(y, -100)).isfinite(), "torch's mean of nothing is NaN"


def run(criterion: AdaptiveLoss, steps: range) -> list[float]:
    losses = []
    for step in steps:
        logits, y, _ = batch(step)
        losses.append(criterion(logits, y).item())
        criterion.step(nn.Identity())
    return losses


def test_a_policy_of_ones_own_weighs_losses_of_ones_own() -> None:
    check_policy(Handover())
    criterion = AdaptiveLoss(Handover(), total_steps=8)
    for step in range(8):
        logits, y, _ = batch(step)
        time = step // 2 / 4
        alpha = {"tempered": 0.5 - time / 2, "ce": 0.5, "brier": time / 2}
        torch.testing.assert_close(criterion(logits, y), by_hand(logits, y, alpha).mean())
        assert criterion.alpha == pytest.approx(alpha)
        criterion.step(nn.Identity())


def test_a_snapshot_holds_losses_of_ones_own() -> None:
    check_policy(BySize())
    criterion = AdaptiveLoss(BySize(), total_steps=8)
    logits, y, _ = batch(0)
    criterion(logits, y)
    mae = 2 * (1 - torch.softmax(logits, 1).gather(1, y[:, None])[:, 0])
    want = torch.softmax(torch.stack([brier(logits, y).mean(), mae.mean()]), 0)
    assert [*criterion.alpha.values()] == pytest.approx(want.tolist())


@pytest.mark.parametrize("policy", [Handover(), BySize()], ids=["weights", "snapshots"])
def test_a_restored_state_and_a_copy_continue_bit_for_bit(policy: WithoutParameters) -> None:
    whole = run(AdaptiveLoss(policy, total_steps=8), range(8))
    first, restored = AdaptiveLoss(policy, total_steps=8), AdaptiveLoss(policy, total_steps=8)
    before = run(first, range(3))
    restored.load_state_dict(first.state_dict())
    for again in (restored, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert before + run(again, range(3, 8)) == whole


def test_the_suite_knows_them() -> None:
    check_basis_loss(brier)
    check_basis_loss(tempered)
    assert own_names(("ce", "tempered", "mae", "brier")) == ("tempered", "brier")


def test_names_are_kept_apart() -> None:
    again = tempered
    assert basis_loss(again) is again, "as a cell of a notebook that is run twice"

    def other(z: Tensor, y: Tensor) -> Tensor:
        return brier(z, y)

    for name in ("tempered", "ce", "gamma"):
        other.__name__ = name
        with pytest.raises(ConfigError, match=f"basis_loss: '{name}' is taken; give the function another name"):
            basis_loss(other)
    with pytest.raises(ConfigError, match=r"basis_loss: <lambda> is no name to know a loss by; write it with def"):
        basis_loss(lambda z, y: z.sum(1))


def test_a_loss_that_nobody_registered_is_named() -> None:
    with pytest.raises(ConfigError, match=r"basis: no loss is called hinge; there are ce, .*, brier, tempered"):
        fixed_mixture({"hinge": 1.0})


def test_a_reduced_loss_is_refused_where_it_is_met() -> None:
    logits, y, _ = batch(0)
    with pytest.raises(ConfigError, match=r"basis loss averaged: gave \[\] for 8 examples; return one value of each"):
        AdaptiveLoss(fixed_mixture({"averaged": 1.0}), total_steps=10)(logits, y)


def test_nothing_is_meta_trained_with_it() -> None:
    told = (
        "{}: brier given, a basis loss of your own: it has no closed form, so nothing is meta-trained with it. Use it"
    )
    with pytest.raises(ConfigError, match=told.format("policy.basis")):
        PolicyConfig(basis=("ce", "brier"))
    with pytest.raises(ConfigError, match=told.format("active_basis")):
        InnerLoop(make_group(), fixed_mixture({"brier": 1.0}), InnerConfig())
