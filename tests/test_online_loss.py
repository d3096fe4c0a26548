"""Online LearnLoss in an ordinary PyTorch loop."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from palf_dist import AdaptiveLoss
from palf_dist.errors import ConfigError
from palf_dist.losses import LossContext, reference_losses
from palf_dist.online_loss import OnlineLoss
from palf_dist.policies import HedgePolicy, OnlineLearnLoss
from palf_dist.randomness import random_generator
from palf_dist.types import BASIS_LOSSES
from tests.adaptive_cases import batch

BASIS = ("ce", "focal", "label_smoothing", "symmetric_ce")


def plain_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[n, K] by the plain formulas, in the order of BASIS."""
    controls = AdaptiveLoss.online().controls[None]
    context = LossContext.create(torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4))
    losses = reference_losses(logits[None], y[None], None, controls, context, BASIS)[:, 0]
    return torch.stack([losses[BASIS_LOSSES.index(name)] for name in BASIS], 1)


def test_it_learns_from_the_mean_losses_between_two_observations() -> None:
    criterion = AdaptiveLoss.online()
    assert criterion.weights == dict.fromkeys(BASIS, 0.25)
    snapshots, errors = [], [1.0, 0.7, 0.9, 0.65]
    for period, error in enumerate(errors):
        seen = []
        for number in range(3):
            logits, y, _ = batch(10 * period + number, n=8 - number)
            loss = criterion(logits, y)
            values = plain_losses(logits, y)
            alpha = torch.tensor(list(criterion.weights.values()))
            torch.testing.assert_close(loss, (values @ alpha).mean())
            (ours,) = torch.autograd.grad(loss, logits)
            (theirs,) = torch.autograd.grad((values @ alpha).mean(), logits)
            torch.testing.assert_close(ours, theirs)
            seen.append(values.detach())
        criterion.observe(torch.tensor(error, requires_grad=True) if period % 2 else error)
        snapshots.append([error, *torch.cat(seen).double().mean(0).tolist()])
    want = OnlineLearnLoss().mixture(np.array(snapshots))
    assert np.ptp(want) > 0.1, "it has learned something"
    assert list(criterion.weights.values()) == pytest.approx(want, rel=1e-4)


def periods(criterion: OnlineLoss, numbers: range) -> list:
    """Losses and weights of one batch after another; every second one is followed by an observation."""
    result: list = []
    for number in numbers:
        logits, y, _ = batch(number)
        result.append(criterion(logits, y).item())
        if number % 2:
            criterion.observe(0.5 + (number - 7) ** 2 / 50)
        result.append(tuple(criterion.weights.values()))
    return result


@pytest.mark.parametrize("cut", [4, 7])
def test_a_restored_state_continues_bit_for_bit(cut: int) -> None:
    whole = periods(AdaptiveLoss.online(), range(14))
    assert len(set(whole[1::2])) > 1, "the weights move"
    first, second = AdaptiveLoss.online(), AdaptiveLoss.online()
    before = periods(first, range(cut))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True))
    assert before + periods(second, range(cut, 14)) == whole


def test_a_state_in_memory_is_not_changed_by_going_on() -> None:
    criterion = AdaptiveLoss.online()
    periods(criterion, range(2))
    state = criterion.state_dict()
    there = criterion.weights
    periods(criterion, range(2, 14))
    assert criterion.weights != there
    criterion.load_state_dict(state)
    assert criterion.weights == there


def test_a_state_of_other_arguments_is_refused() -> None:
    state = AdaptiveLoss.online().state_dict()
    with pytest.raises(ConfigError, match=r"saved with .*high.*make the loss with the same arguments"):
        AdaptiveLoss.online(high=10.0).load_state_dict(state)


def test_what_is_not_finite_is_left_out() -> None:
    clean, disturbed = AdaptiveLoss.online(), AdaptiveLoss.online()
    for number, error in enumerate((1.0, 0.8, 0.9)):
        logits, y, _ = batch(number)
        for criterion in (clean, disturbed):
            criterion(logits, y)
            criterion.observe(error)
        disturbed(logits * torch.nan, y)
        disturbed.observe(0.1)
        disturbed(logits, y)
        disturbed.observe(float("nan"))
    assert disturbed.weights == clean.weights


def test_calls_that_do_not_fit_are_refused() -> None:
    criterion = AdaptiveLoss.online(("ce", "symmetric_ce"), low=0.1, high=10.0)
    logits, y, _ = batch(0)
    with pytest.raises(ConfigError, match="observe: no training batch"):
        criterion.observe(0.5)
    with pytest.raises(ConfigError, match="whole labels"):
        criterion(logits, y[:3])
    with pytest.raises(ConfigError, match="basis: ce, info_nce given"):
        AdaptiveLoss.online(("ce", "info_nce"))
    criterion.eval()
    assert torch.equal(criterion(logits, y), functional.cross_entropy(logits, y))
    with pytest.raises(ConfigError, match="observe: no training batch"):
        criterion.observe(0.5)


def test_hedge_learns_from_the_mean_losses_alone() -> None:
    """Against the policy on the same snapshots; its state makes a round trip."""
    criterion = AdaptiveLoss.hedge(BASIS, horizon=4)
    assert criterion.weights == dict.fromkeys(BASIS, 0.25)
    means = []
    for number in range(4):
        logits, y, _ = batch(number)
        logits = logits + number * functional.one_hot(y, 4)  # a model that learns
        criterion(logits, y)
        means.append([0.0, *plain_losses(logits, y).double().mean(0).tolist()])
        criterion.observe()
    want = HedgePolicy(BASIS, horizon=4).controls(torch.zeros(0), torch.tensor(means)[None])[0]
    got = list(criterion.weights.values())
    assert got == pytest.approx([want[BASIS_LOSSES.index(name)].item() for name in BASIS], rel=1e-4)
    assert max(got) > min(got) + 0.01
    restored = AdaptiveLoss.hedge(BASIS, horizon=4)
    restored.load_state_dict(criterion.state_dict())
    assert restored.weights == criterion.weights
    with pytest.raises(ConfigError, match="make the loss with the same arguments"):
        AdaptiveLoss.hedge(BASIS).load_state_dict(criterion.state_dict())


def test_learnloss_needs_an_error() -> None:
    criterion = AdaptiveLoss.online()
    logits, y, _ = batch(0)
    criterion(logits, y)
    with pytest.raises(ConfigError, match="observe: LearnLoss needs the model's validation error"):
        criterion.observe()


def test_a_training_loop() -> None:
    """The loop of docs/learnloss.md on digits, a tenth of the labels wrong."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    draw = random_generator("online digits")
    noisy = torch.where(torch.from_numpy(draw.random(len(y)) < 0.1), torch.from_numpy(draw.integers(0, 10, len(y))), y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    criterion = AdaptiveLoss.online()
    for step in range(200):
        rows = torch.from_numpy(draw.integers(0, 600, 50))
        criterion(model(x[rows]), noisy[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            with torch.no_grad():
                criterion.observe(functional.cross_entropy(model(x[600:900]), noisy[600:900]))
    assert (model(x[900:]).argmax(1) == y[900:]).float().mean() > 0.85
    assert max(criterion.weights.values()) > 0.3, "it moved away from where it began"
