"""Closed form of the supervised contrastive basis loss (info_nce) on the features of one batch.

s = f f^T / tau on normalised features f, self excluded; l_i = minus the mean of log-softmax(s_i) over the positives of
i, zero where i has none.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from palf_dist.losses import MASKED_LOGIT, NORM_FLOOR, positive_pairs


def _twice(a: Tensor) -> Tensor:
    """a + a^T: every similarity reads its two features alike."""
    if len(a) == 1:  # torch copies one transposed matrix in blocks, which is three times as fast
        return a[0].T.contiguous().add_(a[0])[None]
    return a + a.transpose(1, 2)


class _Pulled(NamedTuple):
    """How the features' similarities pull them, under a weight of each example."""

    weight: Tensor
    pairs: Tensor  # [G, n, n] symmetrised d / d s, divided by tau
    df: Tensor  # [G, n, D] gradient in f
    radial: Tensor  # [G, n, 1] its component along f
    turning: Tensor  # [G, n, D] the rest


class Contrast:
    """The loss at features h [G, n, D], labels y [G, n], temperature tau [G, 1], and its derivatives. ``weight`` [G, n]
    (or [G, 1]) multiplies each example's loss."""

    def __init__(self, h: Tensor, y: Tensor, tau: Tensor) -> None:
        self.tau = tau  # [G, 1]
        self.inverse_norm = torch.rsqrt((h * h).sum(-1, keepdim=True) + NORM_FLOOR)  # [G, n, 1]
        self.f = h * self.inverse_norm  # [G, n, D] normalised features
        same, itself = positive_pairs(y)
        positive = same.to(h.dtype)
        count = positive.sum(-1, keepdim=True)
        self.target = positive.div_(count.clamp_min(1))  # [G, n, n] 1 / number of positives on each positive
        self.reached = count.clamp_max(1)  # [G, n, 1] 1 where the example has a positive
        # in place here and below where nobody else reads it: of a large batch, new memory takes longer than the sums
        product = torch.bmm(self.f, self.f.transpose(1, 2))
        self.similarity = product.div_(tau[..., None]).masked_fill_(itself, MASKED_LOGIT)  # [G, n, n]
        self._pulled: _Pulled | None = None

    @cached_property
    def q(self) -> Tensor:
        """[G, n, n] softmax of the similarities, 0 in rows without a positive."""
        # not exp(log q), which is slow where q underflows
        return torch.softmax(self.similarity, -1).mul_(self.reached)

    @cached_property
    def residual(self) -> Tensor:
        """d l_i / d s_ij [G, n, n]."""
        return self.q - self.target

    @property
    def value(self) -> Tensor:
        """l [G, n]."""
        return -(self.target * torch.log_softmax(self.similarity, -1)).sum(-1)

    def _pull(self, weight: Tensor) -> _Pulled:
        """Of f, the component of df along f only scales it."""
        if self._pulled is None or self._pulled.weight is not weight:
            pairs = _twice(self.residual * (weight / self.tau)[..., None])
            df = torch.bmm(pairs, self.f)
            radial = (self.f * df).sum(-1, keepdim=True)
            self._pulled = _Pulled(weight, pairs, df, radial, torch.addcmul(df, self.f, radial, value=-1))
        return self._pulled

    def gradient(self, weight: Tensor) -> Tensor:
        """Gradient [G, n, D] of sum_i weight_i l_i in h."""
        return self.inverse_norm * self._pull(weight).turning

    def tau_gradient(self, weight: Tensor) -> Tensor:
        """d (weight_i l_i) / d tau [G, n]."""
        return -weight / self.tau * (self.residual * self.similarity).sum(-1)

    # With a dot for the derivative along h_dot and pull the part of df that turns f,
    #   f. = (h_dot - f <f, h_dot>) / |h|,  s. = (f. f' + f f.') / tau,  residual. = q (s. - <q, s.>),
    #   pull. = df. - f (<f, df.> + <f., df>) - f. <f, df>,  (dh). = (pull. - <f, h_dot> pull / |h|) / |h|.
    def tangent(self, weight: Tensor, h_dot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directional derivatives along h_dot [G, n, D].

        Returns:
            that of ``gradient`` [G, n, D]; that of each l_i [G, n]; and d / d tau of weight_i times the latter [G, n].
        """
        f, tau, share = self.f, self.tau[..., None], weight / self.tau
        _, pairs, df, radial, turning = self._pull(weight)
        along = (f * h_dot).sum(-1, keepdim=True)
        f_dot = torch.addcmul(h_dot, f, along, value=-1).mul_(self.inverse_norm)
        s_dot = _twice(torch.bmm(f_dot / tau, f.transpose(1, 2)))
        residual_dot = self.q * (s_dot - (self.q * s_dot).sum(-1, keepdim=True))
        df_dot = torch.bmm(pairs, f_dot).baddbmm_(_twice(residual_dot * share[..., None]), f)
        radial_dot = (f * df_dot).addcmul_(f_dot, df).sum(-1, keepdim=True)
        turning_dot = df_dot.addcmul_(f, radial_dot, value=-1).addcmul_(f_dot, radial, value=-1)
        dh_dot = turning_dot.addcmul_(turning, along * self.inverse_norm, value=-1).mul_(self.inverse_norm)
        loss_dot = (self.residual * s_dot).sum(-1)
        by_tau = (residual_dot * self.similarity).sum(-1) + loss_dot
        return dh_dot, loss_dot, -share * by_tau
