"""Closed form of the supervised contrastive basis loss (info_nce) on the features of one batch.

s = f f^T / tau on normalised features f, self excluded; l_i = minus the mean of log-softmax(s_i) over the positives of
i, zero where i has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from palf_dist.losses import MASKED_LOGIT, NORM_FLOOR, positive_pairs


def _twice(a: Tensor) -> Tensor:
    """a + a^T: every similarity reads its two features alike."""
    if len(a) == 1:  # torch copies one transposed matrix in blocks, which is three times as fast
        return a[0].T.contiguous().add_(a[0])[None]
    return a + a.transpose(1, 2)


@dataclass(frozen=True)
class Contrast:
    """The loss at features h [G, n, D], and its derivatives. ``weight`` [G, n] multiplies each example's loss."""

    f: Tensor  # [G, n, D] normalised features
    inverse_norm: Tensor  # [G, n, 1]
    similarity: Tensor  # [G, n, n]
    log_q: Tensor  # [G, n, n] log-softmax of it
    target: Tensor  # [G, n, n] 1 / number of positives on each positive
    reached: Tensor  # [G, n, 1] 1 where the example has a positive
    tau: Tensor  # [G, 1, 1]

    @classmethod
    def at(cls, h: Tensor, y: Tensor, tau: Tensor) -> Contrast:
        """Evaluate at features h [G, n, D], labels y [G, n], temperature tau [G, 1]."""
        tau = tau[..., None]
        inverse_norm = torch.rsqrt((h * h).sum(-1, keepdim=True) + NORM_FLOOR)
        f = h * inverse_norm
        positive, itself = positive_pairs(y)
        count = positive.sum(-1, keepdim=True)
        target = positive / count.clamp_min(1).to(h.dtype)
        # in place here and below where nobody else reads it: of a large batch, new memory takes longer than the sums
        similarity = torch.bmm(f, f.transpose(1, 2)).div_(tau).masked_fill_(itself, MASKED_LOGIT)
        log_q = torch.log_softmax(similarity, -1)
        return cls(f, inverse_norm, similarity, log_q, target, (count > 0).to(h.dtype), tau)

    @cached_property
    def q(self) -> Tensor:
        return torch.softmax(self.similarity, -1)  # not exp(log q), which is slow where q underflows

    @cached_property
    def residual(self) -> Tensor:
        """d l_i / d s_ij [G, n, n]."""
        return (self.q * self.reached).sub_(self.target)

    @property
    def value(self) -> Tensor:
        """l [G, n]."""
        return -(self.target * self.log_q).sum(-1)

    def _pull(self, df: Tensor) -> Tensor:
        """Part of df that turns f: the component along f only scales it."""
        return df - self.f * (self.f * df).sum(-1, keepdim=True)

    def _df(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Symmetrised d / d s, divided by tau, and the gradient in f."""
        pairs = _twice(self.residual * weight[..., None]).div_(self.tau)
        return pairs, torch.bmm(pairs, self.f)

    def gradient(self, weight: Tensor) -> Tensor:
        """Gradient [G, n, D] of sum_i weight_i l_i in h."""
        return self.inverse_norm * self._pull(self._df(weight)[1])

    def tau_gradient(self, weight: Tensor) -> Tensor:
        """d (weight_i l_i) / d tau [G, n]."""
        return -weight * ((self.residual * self.similarity).sum(-1, keepdim=True) / self.tau)[..., 0]

    def tangent(self, weight: Tensor, h_dot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directional derivatives along h_dot [G, n, D].

        Returns:
            that of ``gradient`` [G, n, D]; that of each l_i [G, n]; and d / d tau of weight_i times the latter [G, n].
        """
        f, tau = self.f, self.tau
        along = (f * h_dot).sum(-1, keepdim=True)
        f_dot = (h_dot - f * along) * self.inverse_norm
        s_dot = _twice(torch.bmm(f_dot, f.transpose(1, 2))) / tau
        log_q_dot = s_dot - (self.q * s_dot).sum(-1, keepdim=True)
        residual_dot = self.q * log_q_dot * self.reached
        pairs, df = self._df(weight)
        pull = self._pull(df)
        df_dot = torch.baddbmm(torch.bmm(pairs, f_dot), _twice(residual_dot * weight[..., None]) / tau, f)
        pull_dot = self._pull(df_dot) - f_dot * (f * df).sum(-1, keepdim=True) - f * (f_dot * df).sum(-1, keepdim=True)
        dh_dot = self.inverse_norm * (pull_dot - self.inverse_norm * along * pull)
        loss_dot = (self.residual * s_dot).sum(-1)
        by_tau = (residual_dot * self.similarity).sum(-1) + loss_dot
        return dh_dot, loss_dot, -weight * by_tau / tau[..., 0]
