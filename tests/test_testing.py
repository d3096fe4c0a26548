"""The checks that users get: each finds what it is for, in a policy or a loss that is right but for that."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist import AdaptiveLoss
from palf_dist.errors import ConfigError
from palf_dist.losses import LossContext
from palf_dist.mixture_loss import mixture_loss
from palf_dist.policies import CurriculumPolicy, WithoutParameters, mixture_controls
from palf_dist.policies.static import control_vector
from palf_dist.testing import check_basis_loss, check_policy
from palf_dist.types import BASIS_LOSSES
from tests.adaptive_cases import batch


class Warmup(WithoutParameters):
    """Cross-entropy first; MAE as the averaged predictions contradict more labels."""

    features = ("time", "disagreement")
    active_basis = ("ce", "mae")
    refresh = 5

    def share(self, state: Tensor) -> Tensor:
        return state[:, :1].clamp(0, 1) * torch.sigmoid(state[:, 1:].nan_to_num(0.0))

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        share = self.share(state)
        return mixture_controls(torch.cat([1 - share, share], 1), self.active_basis)


class Learned(Warmup):
    """The same with parameters, given as they are or one row for each task."""

    num_parameters = 2

    def initial(self) -> np.ndarray:
        return np.array([0.1, 1.0], np.float32)

    def share(self, state: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        bias, slope = phi.unbind(-1)
        seen = state[:, 1:].nan_to_num(0.0)[:, 0]
        return torch.sigmoid(bias + slope * seen)[:, None]

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        share = self.share(state, phi)
        return mixture_controls(torch.cat([1 - share, share], 1), self.active_basis)


def test_policies_of_ones_own_pass() -> None:
    check_policy(Warmup())
    check_policy(Learned())


def test_a_policy_of_ones_own_is_followed() -> None:
    criterion = AdaptiveLoss(Warmup(), total_steps=20)
    for step in range(11):
        logits, y, index = batch(step)
        loss = criterion(logits, y, index=index)
        share = criterion.alpha["mae"]
        mae = 2 * (1 - torch.softmax(logits, 1).gather(1, y[:, None])[:, 0])
        torch.testing.assert_close(loss, ((1 - share) * functional.cross_entropy(logits, y) + share * mae.mean()))
        assert (share > 0) == (step >= 5), "asked at steps 0, 5 and 10"
        criterion.step(nn.Identity())


class NotAMixture(Warmup):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return 1.1 * super().controls(phi, state)


class Negative(Warmup):
    def share(self, state: Tensor) -> Tensor:
        return super().share(state) - 0.5


class AnotherLoss(Warmup):
    active_basis = ("ce", "focal")

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return mixture_controls(torch.ones_like(state[:, :1]), ("mae",))


class UnknownIsNan(Warmup):
    def share(self, state: Tensor) -> Tensor:
        return torch.sigmoid(state[:, 1:])


class OutOfBounds(Warmup):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return control_vector({"ce": 1.0}, {"e": 0.99}).to(state).repeat(len(state), 1)


class AlphaAlone(Warmup):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return torch.full_like(state[:, :1], 0.5).repeat(1, 2)


class Float32(Warmup):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return super().controls(phi, state.float())


class OneTask(Warmup):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return super().controls(phi, state)[:1]


class Together(Warmup):
    def share(self, state: Tensor) -> Tensor:
        return super().share(state).mean(0, keepdim=True).expand(len(state), 1)


class Drawing(Warmup):
    def share(self, state: Tensor) -> Tensor:
        return super().share(state) * torch.rand(1).item()


class Seeding(Warmup):
    def share(self, state: Tensor) -> Tensor:
        torch.manual_seed(0)
        return super().share(state)


class WritesItsState(Warmup):
    def share(self, state: Tensor) -> Tensor:
        return super().share(state.clamp_(-1, 1))


class Counting(Warmup):
    """Remembers by itself, where not even two calls in a row tell."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def share(self, state: Tensor) -> Tensor:
        if len(state) > 1:
            return super().share(state)
        share = super().share(state)
        if self.last is None or not torch.equal(self.last[0], state):
            self.last = state.clone(), (share if self.last is None else (share + self.last[1].to(share)) / 2)
        return self.last[1].to(state)


class NotDifferentiable(Learned):
    def share(self, state: Tensor, phi: Tensor | None = None) -> Tensor:
        assert phi is not None
        bias, slope = phi.unbind(-1)
        return super().share(state, torch.stack([bias, slope.detach()], -1))


class OnePhi(Learned):
    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return super().controls(phi if phi.dim() == 1 else phi[0], state)


class Float64Start(Learned):
    def initial(self) -> np.ndarray:
        return np.zeros(2)


class Nameless(Warmup):
    active_basis = ["ce", "mae"]  # type: ignore[assignment]  # noqa: RUF012


class Misspelt(Warmup):
    features = ("time", "disagreemnt")


class Twice(Warmup):
    active_basis = ("ce", "ce")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NotAMixture, "NotAMixture: mixture weights .* are no shares >= 0 of sum 1"),
        (Negative, "Negative: mixture weights .* are no shares >= 0 of sum 1"),
        (AnotherLoss, "AnotherLoss: mae has a mixture weight; name it in active_basis"),
        (UnknownIsNan, "UnknownIsNan: controls are not finite; features that are not known are NaN"),
        (OutOfBounds, "OutOfBounds: hyper-parameter e is .0.99.*; needs numbers from 0 to 0.95"),
        (AlphaAlone, "AlphaAlone: controls .4, 2. given; needs .4, 22., one row for each task"),
        (Float32, "Float32.controls: it gives torch.float32 for a state of torch.float64"),
        (OneTask, "OneTask: controls .1, 22. given; needs .4, 22., one row for each task"),
        (Together, "Together.controls: tasks are not apart"),
        (Drawing, "Drawing.controls: it (differs from call to call|draws from a global random state)"),
        (Seeding, "Seeding.controls: it draws from a global random state"),
        (WritesItsState, "WritesItsState.controls: it changes an argument"),
        (Counting, "Counting(.controls)?: (a restored run is another one|tasks are not apart)"),
        (NotDifferentiable, "NotDifferentiable.controls: its gradient in phi is another one"),
        (OnePhi, "OnePhi.controls: it is another one for phi .G, P."),
        (Float64Start, "Float64Start.initial: needs float32 .num_parameters., here .2."),
        (Nameless, "policy Nameless: active_basis is .*; needs a tuple of names"),
        (Misspelt, "unknown disagreemnt; allowed: gradient_norm"),
        (Twice, "basis: ce, ce given; needs one loss or more, each once"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(kind: type[Warmup], message: str) -> None:
    with pytest.raises((AssertionError, ConfigError), match=message):
        check_policy(kind())


def test_a_policy_that_goes_wrong_later_is_told_at_its_refresh() -> None:
    criterion = AdaptiveLoss(NotAMixture(), total_steps=20)
    logits, y, index = batch(0)
    with pytest.raises(ConfigError, match="NotAMixture: mixture weights"):
        criterion(logits, y, index=index)


class RowPerRefresh(Warmup):
    reads_history = True

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return super().controls(phi, state.flatten(0, 1))


def test_an_answer_for_each_refresh_is_refused_at_the_second() -> None:
    criterion = AdaptiveLoss(RowPerRefresh(), total_steps=20)
    logits, y, index = batch(0)
    for _ in range(RowPerRefresh.refresh):
        criterion(logits, y, index=index)
        criterion.step(nn.Identity())
    with pytest.raises(ConfigError, match=r"RowPerRefresh: controls \[2, 22\] given; needs \[1, 22\], one row"):
        criterion(logits, y, index=index)


def test_a_policy_under_a_shield_is_refused() -> None:
    policy = copy.copy(CurriculumPolicy())
    policy.shield = 0.1
    with pytest.raises(ConfigError, match=r"policy CurriculumPolicy: shield is 0.1, but a Lyapunov shield compares"):
        AdaptiveLoss(policy, total_steps=20)


@pytest.mark.parametrize("name", [name for name in BASIS_LOSSES if name != "info_nce"])
def test_the_losses_of_this_package_pass(name: str) -> None:
    """But for the one that compares rows."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        context = LossContext.create(torch.ones(1, z.shape[1], dtype=torch.bool), z.new_zeros(1, z.shape[1]))
        return mixture_loss(z, y, None, control_vector({name: 1.0}).to(z)[None], context, (name,))[0]

    check_basis_loss(loss)


def squared(z: Tensor, y: Tensor) -> Tensor:
    """The Brier score."""
    return (torch.softmax(z, 1) - functional.one_hot(y, z.shape[1])).square().sum(1)


def mean(z: Tensor, y: Tensor) -> Tensor:
    return squared(z, y).mean()


def infinite(z: Tensor, y: Tensor) -> Tensor:
    return -torch.softmax(z, 1).gather(1, y[:, None])[:, 0].log()


def steep(z: Tensor, y: Tensor) -> Tensor:
    return (1 - torch.softmax(z, 1).gather(1, y[:, None])[:, 0]).sqrt()


def constant(z: Tensor, y: Tensor) -> Tensor:
    return squared(z.detach(), y)


def double(z: Tensor, y: Tensor) -> Tensor:
    return squared(z, y).double()


def relative(z: Tensor, y: Tensor) -> Tensor:
    values = squared(z, y)
    return values / (1 + values.sum())


def noisy(z: Tensor, y: Tensor) -> Tensor:
    return squared(z + 0.1 * torch.randn_like(z), y)


def in_place(z: Tensor, y: Tensor) -> Tensor:
    values = squared(z, y)
    y.clamp_(max=0)
    return values


def stopped(z: Tensor, y: Tensor) -> Tensor:
    p = torch.softmax(z, 1)
    return squared(z, y) * p.gather(1, y[:, None])[:, 0].detach()


def test_a_loss_of_ones_own_passes() -> None:
    check_basis_loss(squared)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (mean, r"basis loss mean: gave \[\] for 8 examples; return one value of each, \[n\]"),
        (infinite, "infinite: it gives .*inf"),
        (steep, "steep: its gradient is .*(nan|inf)"),
        (constant, r"constant: it is not differentiable; leave out detach\(\)"),
        (double, "double: it gives torch.float64 for logits of torch.float32"),
        (relative, "relative: a value depends on the other rows"),
        (noisy, "noisy: it (differs from call to call|draws from a global random state)"),
        (in_place, "in_place: it (changes an argument|differs from call to call)"),
        (stopped, "Jacobian mismatch"),
    ],
)
def test_what_is_wrong_with_a_loss_is_said(loss, message: str) -> None:
    with pytest.raises((AssertionError, ConfigError, RuntimeError), match=message):
        check_basis_loss(loss)
