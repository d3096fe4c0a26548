"""Random loss inputs shared by the tests of the loss modules."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palf_dist.losses import LossContext
from palf_dist.randomness import random_generator
from palf_dist.types import BASIS_LOSSES, CONTROLS

LOGIT_BASIS = tuple(name for name in BASIS_LOSSES if name != "info_nce")


@dataclass(frozen=True)
class LossCase:
    z: Tensor
    y: Tensor
    h: Tensor
    controls: Tensor
    context: LossContext

    def to(self, dtype: torch.dtype) -> LossCase:
        context = LossContext.create(self.context.class_mask, self.context.log_prior_ratio.to(dtype))
        if self.context.own_probability is not None:
            averaged = self.context.averaged.to(dtype)
            context = context.with_averages(self.context.own_probability.to(dtype), self.context.seen, averaged)
        return LossCase(self.z.to(dtype), self.y, self.h.to(dtype), self.controls.to(dtype), context)

    def with_controls(self, **values: float) -> LossCase:
        controls = self.controls.clone()
        for name, value in values.items():
            controls[:, CONTROLS.index(name)] = value
        return replace(self, controls=controls)


def make_case(
    seed: int,
    tasks: int = 3,
    n: int = 7,
    classes: int = 5,
    scale: float = 2.0,
    padded: bool = True,
    adjusted: bool = True,
    posterior: bool = True,
) -> LossCase:
    """Float64 logits, labels, 4 features and controls; task g has classes - g % 3 real classes when ``padded``."""
    rng = random_generator("loss case", seed)
    k = [max(2, classes - g % 3) if padded else classes for g in range(tasks)]
    mask = torch.arange(classes) < torch.tensor(k)[:, None]
    y = torch.from_numpy((rng.random((tasks, n)) * torch.tensor(k)[:, None].numpy()).astype("int64"))
    z = torch.from_numpy(rng.normal(size=(tasks, n, classes)) * scale)
    h = torch.from_numpy(rng.normal(size=(tasks, n, 4)))
    ratio = torch.from_numpy(rng.normal(size=(tasks, classes))) * mask * adjusted
    context = LossContext.create(mask, ratio)
    if posterior:
        averaged = torch.from_numpy(rng.dirichlet([0.5] * classes, (tasks, n))) * mask[:, None, :]
        averaged = averaged / averaged.sum(-1, keepdim=True)
        own = averaged.gather(-1, y[..., None])[..., 0]
        context = context.with_averages(own, torch.from_numpy(rng.random((tasks, n)) < 0.8), averaged)
    low = dict(e=0.01, la=-1.0, ew=0.01, wd=0.5, gamma=0.5, eps=0.0, a=0.1, b=0.1, tau=0.1, q=0.05, lam=0.1, beta=0.05)
    high = dict(e=0.9, la=2.0, ew=0.95, wd=2.0, gamma=4.0, eps=0.5, a=2.0, b=2.0, tau=1.0, q=1.0, lam=5.0, beta=0.95)
    columns = [rng.dirichlet([1.0] * len(BASIS_LOSSES), tasks)]
    columns += [rng.uniform(low[name], high[name], (tasks, 1)) for name in low]
    return LossCase(z, y, h, torch.cat([torch.from_numpy(column) for column in columns], 1), context)
