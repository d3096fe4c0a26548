"""Inner optimisers as pure functions of (theta, slots, gradient), with the adjoint of their update.

All act on flat parameters [G, P]. Weight decay is decoupled from them and lives in the inner loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palf_dist.errors import ConfigError

Slots = tuple[Tensor, ...]

ADAM_EPSILON = 1e-6  # added in squares under the root: sqrt(v) + eps has no derivative at zero gradients


class Pace(NamedTuple):
    """What an update takes of the step it is made at, beside tensors of the parameters' shape."""

    rate: Tensor  # [G, 1] learning rate
    corrections: tuple[float | Tensor, ...]  # of the optimiser: numbers, or tensors [] where all steps share a graph


class InnerOptimiser(Protocol):
    """One update rule."""

    num_slots: int

    def corrections(self, step: int) -> tuple[float, ...]:
        """Of ``Pace``, at a step; steps count from 0."""
        return ()

    def update(self, theta: Tensor, slots: Slots, gradient: Tensor, pace: Pace) -> tuple[Tensor, Slots]:
        """New parameters and slots; differentiable by autograd."""
        ...

    def adjoint(
        self, cotangent: Tensor, slot_cotangents: Slots, slots: Slots, new_slots: Slots, pace: Pace
    ) -> tuple[Tensor, Slots]:
        """Cotangents of the gradient and of the old slots, from those of the new parameters and slots.

        The old parameters' cotangent is the new ones' own, since every update is theta minus a function of the rest.
        """
        ...


class SGD(InnerOptimiser):
    """theta' = theta - rate g."""

    num_slots = 0

    def update(self, theta: Tensor, slots: Slots, gradient: Tensor, pace: Pace) -> tuple[Tensor, Slots]:
        return theta - pace.rate * gradient, ()

    def adjoint(
        self, cotangent: Tensor, slot_cotangents: Slots, slots: Slots, new_slots: Slots, pace: Pace
    ) -> tuple[Tensor, Slots]:
        return -pace.rate * cotangent, ()


class Momentum(InnerOptimiser):
    """m' = mu m + g; theta' = theta - rate m'."""

    num_slots = 1
    mu = 0.9

    def update(self, theta: Tensor, slots: Slots, gradient: Tensor, pace: Pace) -> tuple[Tensor, Slots]:
        m = torch.add(gradient, slots[0], alpha=self.mu)
        return theta - pace.rate * m, (m,)

    def adjoint(
        self, cotangent: Tensor, slot_cotangents: Slots, slots: Slots, new_slots: Slots, pace: Pace
    ) -> tuple[Tensor, Slots]:
        of_m = slot_cotangents[0] - pace.rate * cotangent
        return of_m, (self.mu * of_m,)


class Adam(InnerOptimiser):
    """m' = b1 m + (1-b1) g; v' = b2 v + (1-b2) g^2; theta' = theta - rate (m'/c1) / sqrt(v'/c2 + eps^2) with
    c = 1 - b^(step+1). (torch.optim.Adam adds eps outside of the root.)"""

    num_slots = 2
    beta1, beta2 = 0.9, 0.99

    def update(self, theta: Tensor, slots: Slots, gradient: Tensor, pace: Pace) -> tuple[Tensor, Slots]:
        m = torch.lerp(gradient, slots[0], self.beta1)
        v = torch.addcmul(slots[1] * self.beta2, gradient, gradient, value=1 - self.beta2)
        rate, (c1, c2) = pace
        inverse = torch.rsqrt(v * (1 / c2) + ADAM_EPSILON**2)
        return torch.addcmul(theta, m * inverse, -rate / c1), (m, v)

    def adjoint(
        self, cotangent: Tensor, slot_cotangents: Slots, slots: Slots, new_slots: Slots, pace: Pace
    ) -> tuple[Tensor, Slots]:
        (m, _), (new_m, new_v), (rate, (c1, c2)) = slots, new_slots, pace
        inverse = new_v.mul(1 / c2).add_(ADAM_EPSILON**2).rsqrt_()
        scaled, gain = cotangent * inverse, -rate / c1  # their product is d theta' / d m'
        of_m = torch.addcmul(slot_cotangents[0], scaled, gain)
        of_v = torch.addcmul(slot_cotangents[1], scaled.mul_(new_m).mul_(inverse.square_()), gain * (-0.5 / c2))
        gradient = torch.lerp(new_m, m, -self.beta1 / (1 - self.beta1))  # g = (m' - b1 m) / (1 - b1)
        of_gradient = torch.addcmul(of_m * (1 - self.beta1), gradient, of_v, value=2 * (1 - self.beta2))
        return of_gradient, (of_m.mul_(self.beta1), of_v.mul_(self.beta2))

    def corrections(self, step: int) -> tuple[float, ...]:
        """c1, c2."""
        return 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)


_OPTIMISERS: dict[str, InnerOptimiser] = {"sgd": SGD(), "momentum": Momentum(), "adam": Adam()}


def inner_optimiser(name: str) -> InnerOptimiser:
    if name not in _OPTIMISERS:
        raise ConfigError(f"tasks.optimisers: {name!r} is unknown; allowed: {', '.join(_OPTIMISERS)}")
    return _OPTIMISERS[name]


def cosine_rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step``: half a cosine from 1 towards 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
