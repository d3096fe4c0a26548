"""Hedge (Freund and Schapire 1997): exponentiated-gradient mixture weights within one run, nothing meta-learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.policies.base import WithoutParameters
from palf_dist.policies.online_learnloss import PER_EXAMPLE
from palf_dist.policies.static import mixture_controls
from palf_dist.training_state import SNAPSHOTS


def hedge_rate(experts: int, rounds: Tensor | float) -> Tensor | float:
    """eta = sqrt(8 log K / T): with it the mean regret over T rounds is at most sqrt(log K / (2 T)) for losses in
    [0, 1] (Cesa-Bianchi and Lugosi 2006, theorem 2.2). With the present round in the place of T it needs no horizon, at
    about twice that bound (theorem 2.3)."""
    return (8 * math.log(experts) / rounds) ** 0.5


def hedge_weights(cumulative: Tensor, eta: Tensor | float) -> Tensor:
    """Weights [..., K] proportional to exp(-eta * cumulative losses [..., K])."""
    return torch.softmax(-eta * cumulative, -1)


class HedgePolicy(WithoutParameters):
    """alpha_k proportional to exp(-eta * sum of the losses of basis loss k at the refreshes so far).

    The loss of basis loss k at a refresh is its mean over the training rows divided by that at the first refresh at
    which it was finite, at most 1: so all are in [0, 1] and none wins by its scale. What is not finite counts as 1.
    Hyper-parameters keep their defaults.
    """

    features: tuple[str, ...] = (SNAPSHOTS,)

    def __init__(self, basis: Sequence[str] = PER_EXAMPLE, *, horizon: int | None = None, refresh: int = 10) -> None:
        """
        Args:
            basis: basis losses of the mixture.
            horizon: refreshes of a run, for eta; left out, eta falls with their number so far.
            refresh: inner steps between two refreshes.

        Raises:
            ConfigError: basis does not fit, or the horizon is not positive.
        """
        if len(set(basis)) < len(basis) or len(basis) < 2 or not set(basis) <= set(PER_EXAMPLE):
            raise ConfigError(
                f"basis: {', '.join(basis)} given; needs two or more of {', '.join(PER_EXAMPLE)}, each once"
            )
        if horizon is not None and horizon < 1:
            raise ConfigError(f"horizon: {horizon} given; needs a positive number of refreshes, or none")
        self.active_basis = tuple(basis)
        self.settings = {"basis": list(basis), "horizon": horizon}
        self.refresh = refresh
        self._horizon = horizon

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        """Controls [G, U] from the snapshots state [G, n, 1 + K], of which the validation error is not read."""
        losses = state[:, :, 1:]
        known = losses.isfinite()
        scale = torch.where(known & (known.cumsum(1) == 1), losses, 0.0).sum(1, keepdim=True)  # the first finite one
        relative = (losses / scale).nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1)
        eta = hedge_rate(len(self.active_basis), self._horizon or max(state.shape[1], 1))
        return mixture_controls(hedge_weights(relative.sum(1), eta), self.active_basis)
