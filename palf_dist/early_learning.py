"""Closed form of the early-learning regularisation (Liu et al. 2020), which holds an example's prediction to its own
averaged one: R = log(1 - c <p, t>), t the averaged prediction without a gradient, c just below 1.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from palf_dist.losses import AGREEMENT_SHARE


class EarlyLearning:
    """R of each example at a softmax p [G, n, C] with averages t [G, n, C], both 0 on padded classes. ``weight`` [G, n]
    (or [G, 1]) multiplies each example's R. Where t is 0, for an example not seen before, so is everything."""

    def __init__(self, p: Tensor, t: Tensor) -> None:
        self.p, self.t = p, t
        self.agreement = (p * t).sum(-1, keepdim=True)
        self.slope = -AGREEMENT_SHARE / (1 - AGREEMENT_SHARE * self.agreement)  # dR / d<p, t>; d2R is -slope^2

    @property
    def value(self) -> Tensor:
        """R [G, n]."""
        return torch.log1p(-AGREEMENT_SHARE * self.agreement)[..., 0]

    @cached_property
    def _pull(self) -> Tensor:
        """Gradient [G, n, C] of <p, t> in the logits."""
        return self.p * (self.t - self.agreement)

    def gradient(self, weight: Tensor) -> Tensor:
        """Gradient [G, n, C] of sum_i weight_i R_i in the logits."""
        return weight[..., None] * self.slope * self._pull

    def tangent(self, weight: Tensor, log_p_dot: Tensor) -> tuple[Tensor, Tensor]:
        """Directional derivatives where log p moves along log_p_dot [G, n, C]: that of ``gradient`` [G, n, C], and that
        of each R_i [G, n]."""
        p_dot = self.p * log_p_dot
        agreement_dot = (p_dot * self.t).sum(-1, keepdim=True)
        along = self.slope * agreement_dot
        pull_dot = p_dot * (self.t - self.agreement) - self.p * agreement_dot
        return weight[..., None] * self.slope * (pull_dot - along * self._pull), along[..., 0]
