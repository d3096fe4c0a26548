"""Closed forms of the basis losses (of two of them: parts) that read only log p_y, the log-probability of an example's
own label.

For l = F(log p_y) the gradient in the logits is F' (Y - p), and its directional derivative needs F'' besides; both are
functions of one number per example. Each class gives F, F', F'' and their derivatives in the loss's own controls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palf_dist.losses import (
    EXPONENT_FLOOR,
    FOCAL_FLOOR,
    NOISE_FLOOR,
    OWN_FLOOR,
    REVERSE_CLIP,
    UNSEEN_WEIGHT,
    WEIGHT_FLOOR,
    Controls,
    LossContext,
    column,
)

Number = Tensor | float
"""[G, n], or a float where all examples share it."""


class Own:
    """Log-probability and probability of each example's own label, [G, n] each."""

    def __init__(self, log_p: Tensor) -> None:
        self.log_p = log_p

    @cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()


class LogitLoss(Protocol):
    """One basis loss at one point."""

    @property
    def value(self) -> Tensor:
        """F [G, n]."""
        ...

    @property
    def slope(self) -> Number:
        """F'."""
        ...

    @property
    def curvature(self) -> Number:
        """F''."""
        ...

    def value_controls(self) -> dict[str, Number]:
        """dF / d control, by name."""
        ...

    def slope_controls(self) -> dict[str, Number]:
        """dF' / d control, by name."""
        ...


class CrossEntropy:
    """F = -log p_y."""

    slope = -1.0
    curvature = 0.0

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        self.value = -own.log_p

    def value_controls(self) -> dict[str, Number]:
        return {}

    def slope_controls(self) -> dict[str, Number]:
        return {}


class Focal:
    """F = -u^gamma log p_y with u = max(1 - p_y, floor)."""

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        self.own, self.gamma = own, column(controls, "gamma")
        rest = -torch.expm1(own.log_p)
        self.u = rest.clamp_min(FOCAL_FLOOR)
        self.power = self.u**self.gamma
        # -du / dlog p_y, relative to u: zero where the clamp holds
        self.rate = torch.where(rest >= FOCAL_FLOOR, own.p / self.u, 0.0)

    @property
    def value(self) -> Tensor:
        return -self.power * self.own.log_p

    @cached_property
    def slope(self) -> Tensor:
        return self.power * (self.gamma * self.rate * self.own.log_p - 1)

    @property
    def curvature(self) -> Tensor:
        bend = (1 + self.rate - self.gamma * self.rate) * self.own.log_p + 2
        return self.power * self.gamma * self.rate * bend

    def value_controls(self) -> dict[str, Number]:
        return {"gamma": self.value * self.u.log()}

    def slope_controls(self) -> dict[str, Number]:
        return {"gamma": self.power * self.rate * self.own.log_p + self.slope * self.u.log()}


class SymmetricCrossEntropy:
    """F = -a log p_y + 4 b (1 - p_y)."""

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        self.own, self.a, self.b = own, column(controls, "a"), column(controls, "b")

    @property
    def value(self) -> Tensor:
        return REVERSE_CLIP * self.b * (1 - self.own.p) - self.a * self.own.log_p

    @cached_property
    def slope(self) -> Tensor:
        return self.curvature - self.a

    @cached_property
    def curvature(self) -> Tensor:
        return -REVERSE_CLIP * self.b * self.own.p

    def value_controls(self) -> dict[str, Number]:
        return {"a": -self.own.log_p, "b": REVERSE_CLIP * (1 - self.own.p)}

    def slope_controls(self) -> dict[str, Number]:
        return {"a": -1.0, "b": -REVERSE_CLIP * self.own.p}


class NoiseShares(NamedTuple):
    """What the controls say of label noise, [G, 1] each."""

    k: Tensor
    log_kept: Tensor  # log(1 - e)
    log_noise: Tensor  # log(e / k)
    believed: Tensor  # ew / k

    @classmethod
    def of(cls, controls: Controls, context: LossContext) -> NoiseShares:
        k, e = context.num_classes[:, None], column(controls, "e")
        return cls(k, torch.log1p(-e), torch.log((e + NOISE_FLOOR) / k), column(controls, "ew") / k)


class RobustCrossEntropy:
    """F = -w log m, m = (1 - e) r_y + e / k: ``own`` belongs to the prior-adjusted softmax r.

    In logarithms throughout, so that r_y may underflow. r_y / m and 1 / m stay finite because e is floored.
    """

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        make = NoiseShares.of
        self.noise = make(controls, context) if isinstance(controls, Tensor) else controls.once(make, context)
        self.ew, self.k, self.context = column(controls, "ew"), self.noise.k, context
        self.log_own = own.log_p
        kept = own.log_p + self.noise.log_kept
        self.log_m = torch.logaddexp(kept, self.noise.log_noise)
        self.kept = torch.exp(kept - self.log_m)  # probability that the label is not a noisy one

    @cached_property
    def ratio(self) -> Tensor:
        """r_y / m."""
        return torch.exp(self.log_own - self.log_m)

    @cached_property
    def _belief(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Averaged own probability, the mixture of it with noise, the posterior belief and its batch mean."""
        assert self.context.own_probability is not None and self.context.seen is not None
        own = self.context.own_probability.clamp_min(OWN_FLOOR)
        kept = torch.addcmul(own, own, self.ew, value=-1)
        mixed = kept + self.noise.believed
        belief = torch.where(self.context.seen, kept / mixed, UNSEEN_WEIGHT)
        return own, mixed, belief, belief.mean(1, keepdim=True)

    @cached_property
    def weight(self) -> Number:
        """w, as ``losses.posterior_weights``."""
        if self.context.own_probability is None:
            return 1.0
        *_, belief, mean = self._belief
        return belief / mean.clamp_min(WEIGHT_FLOOR)

    @cached_property
    def weight_ew(self) -> Number:
        """dw / d ew."""
        if self.context.own_probability is None:
            return 0.0
        assert self.context.seen is not None
        own, mixed, _, mean = self._belief
        change = torch.where(self.context.seen, -own / (self.k * mixed * mixed), 0.0)
        shift = torch.where(mean >= WEIGHT_FLOOR, change.mean(1, keepdim=True), 0.0)
        return (change - self.weight * shift) / mean.clamp_min(WEIGHT_FLOOR)

    @property
    def value(self) -> Tensor:
        return -self.weight * self.log_m

    @cached_property
    def slope(self) -> Tensor:
        return -self.weight * self.kept

    @property
    def curvature(self) -> Tensor:
        return self.slope * (1 - self.kept)

    def value_controls(self) -> dict[str, Number]:
        rise = self.ratio - torch.exp(-self.log_m) / self.k
        return {"e": self.weight * rise, "ew": -self.weight_ew * self.log_m}

    def slope_controls(self) -> dict[str, Number]:
        fall = self.ratio * torch.exp(-self.log_m) / self.k
        return {"e": self.weight * fall, "ew": -self.weight_ew * self.kept}


class GeneralisedCrossEntropy:
    """F = (1 - p_y^q) / q (Zhang and Sabuncu 2018, equation 6), q floored: from ce (q = 0) to half of mae (q = 1)."""

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        self.log_p = own.log_p
        asked = column(controls, "q")
        self.q = asked.clamp_min(EXPONENT_FLOOR)
        self.moves = (asked >= EXPONENT_FLOOR).to(self.q.dtype)  # zero where the clamp holds

    @cached_property
    def value(self) -> Tensor:
        return -torch.expm1(self.q * self.log_p) / self.q

    @cached_property
    def slope(self) -> Tensor:
        return -torch.exp(self.q * self.log_p)

    @property
    def curvature(self) -> Tensor:
        return self.q * self.slope

    def value_controls(self) -> dict[str, Number]:
        return {"q": self.moves * (self.log_p * self.slope - self.value) / self.q}

    def slope_controls(self) -> dict[str, Number]:
        return {"q": self.moves * self.log_p * self.slope}


class MeanAbsoluteError:
    """F = 2 (1 - p_y), the sum over classes of |y - p|."""

    def __init__(self, own: Own, controls: Controls, context: LossContext) -> None:
        self.own = own

    @property
    def value(self) -> Tensor:
        return 2 * (1 - self.own.p)

    @cached_property
    def slope(self) -> Tensor:
        return -2 * self.own.p

    @property
    def curvature(self) -> Tensor:
        return self.slope

    def value_controls(self) -> dict[str, Number]:
        return {}

    def slope_controls(self) -> dict[str, Number]:
        return {}


LOGIT_LOSSES: dict[str, Callable[[Own, Controls, LossContext], LogitLoss]] = {
    "ce": CrossEntropy,
    "focal": Focal,
    "label_smoothing": CrossEntropy,  # = ce + eps (z_y - mean_c z_c); the head adds that part, which is linear in z
    "symmetric_ce": SymmetricCrossEntropy,
    "robust_ce": RobustCrossEntropy,
    "generalised_ce": GeneralisedCrossEntropy,
    "mae": MeanAbsoluteError,
    "elr": CrossEntropy,  # the head adds lam times the term of ``early_learning``, which reads all of p
    "bootstrap": CrossEntropy,  # as label_smoothing, with the averaged prediction in the place of the uniform one
}
