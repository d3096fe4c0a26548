"""The closed-form losses as an autograd function, for loops that call ``loss.backward()``.

Differentiable twice: the gradient is itself a function whose backward is the closed-form directional derivative, since
the Hessian of a per-example sum is symmetric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from palf_dist.errors import ConfigError
from palf_dist.loss_head import Evaluation
from palf_dist.losses import LossContext
from palf_dist.types import CONTROL_INDEX


class MixtureLoss(Function):
    """(logits [G, n, C], features [G, n, D] or None, Evaluation at them) -> values [K, G, n] in order of ``active``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, features: Tensor | None, evaluation: Evaluation) -> Tensor:
        ctx.save_for_backward(logits, features)
        ctx.evaluation = evaluation
        rows = dict(evaluation.values())
        return torch.stack([rows[name] for name in evaluation.active])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        logits, features = ctx.saved_tensors
        return (*_Gradient.apply(logits, features, upstream[0], ctx.evaluation), None)


class _Gradient(Function):
    """Gradient in (logits, features) of the sum of upstream [K, G, n] times the losses."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, features: Tensor | None, upstream: Tensor, evaluation: Evaluation
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(upstream)
        ctx.evaluation = evaluation
        return evaluation.gradient(dict(zip(evaluation.active, upstream, strict=True)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, None]:
        (upstream,) = ctx.saved_tensors
        active = ctx.evaluation.active
        z_dot, h_dot = direction
        assert z_dot is not None
        along = ctx.evaluation.tangent(dict(zip(active, upstream, strict=True)), z_dot, h_dot)
        return along.dlogits, along.dfeatures, torch.stack([along.losses[name] for name in active]), None


def mixture_loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None,
    controls: Tensor,
    context: LossContext,
    active: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """The adaptive loss of one task (G = 1), differentiable in logits, features and alpha.

    Args:
        logits: [n, C] floating point.
        labels: [n] int64.
        features: [n, D]; only info_nce reads them.
        controls: [U]; the hyper-parameters in it are taken as constants.
        context: of one task.
        active: basis losses in the mixture.

    Returns:
        sum_k alpha_k l_k of each example [n], and the values l_k [K, n] in the order of ``active``.
    """
    z, y = logits[None], labels[None]
    h = features[None] if features is not None and "info_nce" in active else None
    with torch.no_grad():
        evaluation = Evaluation(active, z, y, h, controls[None].detach(), context)
    values = MixtureLoss.apply(z, h, evaluation)[:, 0]
    alpha = torch.stack([controls[CONTROL_INDEX[name]] for name in active])
    return alpha @ values, values


def check_batch(logits: Tensor, y: Tensor) -> None:
    """Refuse, with a ConfigError, what is no batch of logits [n, C] and labels [n] in 0 .. C - 1."""
    if logits.dim() != 2 or y.shape != logits.shape[:1] or y.is_floating_point():
        raise ConfigError(
            f"logits {list(logits.shape)} and y {list(y.shape)} {y.dtype}: needs logits [n, C] and whole labels [n]"
        )
    if not len(y):
        raise ConfigError("y: the batch is empty; a mean loss needs at least one example")
    check_labels(y, logits.shape[1])


def check_labels(y: Tensor, classes: int) -> None:
    """Refuse, with a ConfigError, labels [n] out of 0 .. classes - 1. They are not looked for on a GPU: that would make
    every step wait for it, and its kernels check the range."""
    if not len(y) or y.device.type != "cpu":
        return
    low, high = (int(bound) for bound in y.aminmax())
    if not 0 <= low <= high < classes:
        raise ConfigError(
            f"y: labels {low} to {high} given, but logits have {classes} classes; needs labels from 0 to classes - 1"
        )
