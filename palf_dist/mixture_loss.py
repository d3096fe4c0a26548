"""The closed-form losses as an autograd function, for loops that call ``loss.backward()``.

Differentiable twice: the gradient is itself a function whose backward is the closed-form directional derivative, since
the Hessian of a per-example sum is symmetric. Where nobody asks for that, the gradient is computed without a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from palf_dist.loss_head import Evaluation, Softmax, Weights
from palf_dist.losses import Controls, LossContext, column


class MixtureLoss(Function):
    """(logits [n, C], features [n, D] or None, Evaluation at them, its values, whether the mean is wanted) -> sum_k
    alpha_k l_k of each example [n], or their mean []."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        features: Tensor | None,
        evaluation: Evaluation,
        values: dict[str, Tensor],
        mean: bool,
    ) -> Tensor:
        ctx.save_for_backward(logits, features)
        ctx.evaluation, ctx.mean = evaluation, mean
        first, *rest = (column(evaluation.controls, name) * value for name, value in values.items())
        mixture = sum(rest, start=first)
        return mixture.mean() if mean else mixture[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        logits, features = ctx.saved_tensors
        of_each = upstream[0] / len(logits) if ctx.mean else upstream[0]
        if torch.is_grad_enabled():  # the caller asked for a graph
            given = of_each.expand(len(logits))
            return (*_Gradient.apply(logits, features, given, ctx.evaluation), None, None, None)
        return (*_gradient(ctx.evaluation, of_each), None, None, None)


class _Gradient(Function):
    """Gradient in (logits, features) of the sum of upstream [n] times the mixture."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, features: Tensor | None, upstream: Tensor, evaluation: Evaluation
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(upstream)
        ctx.evaluation = evaluation
        return _gradient(evaluation, upstream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *direction: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, None]:
        (upstream,) = ctx.saved_tensors
        z_dot, h_dot = (None if part is None else part[None] for part in direction)
        assert z_dot is not None
        controls = ctx.evaluation.controls
        along = ctx.evaluation.tangent(_weights(ctx.evaluation, upstream), z_dot, h_dot)
        mixture = sum(column(controls, name) * value for name, value in along.losses.items())
        return along.dlogits[0], None if along.dfeatures is None else along.dfeatures[0], mixture[0], None


def _weights(evaluation: Evaluation, upstream: Tensor) -> Weights:
    return {name: column(evaluation.controls, name) * upstream for name in evaluation.active}


def _gradient(evaluation: Evaluation, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    """Its gradient [n, C] and [n, D]; upstream [n], or [] where all examples share it."""
    dlogits, dfeatures = evaluation.gradient(_weights(evaluation, upstream))
    return dlogits[0], None if dfeatures is None else dfeatures[0]


def mixture_loss(
    logits: Tensor,
    labels: Tensor,
    features: Tensor | None,
    controls: Controls,
    context: LossContext,
    active: tuple[str, ...],
    *,
    plain: Softmax | None = None,
    mean: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The adaptive loss of one task (G = 1), differentiable in logits and features.

    Args:
        logits: [n, C] floating point.
        labels: [n] int64.
        features: [n, D]; only info_nce reads them.
        controls: [1, U], or their columns; taken as constants.
        context: of one task.
        active: basis losses in the mixture.
        plain: softmax of the logits, where the caller has it.
        mean: of the examples, NaN of none.

    Returns:
        sum_k alpha_k l_k of each example [n] or their mean [], and the values l_k [1, n] by basis loss.
    """
    h = features if "info_nce" in active else None
    with torch.no_grad():
        rows = None if h is None else h[None]
        evaluation = Evaluation(active, logits[None], labels[None], rows, controls, context, plain)
        values = dict(evaluation.values())
    return MixtureLoss.apply(logits, h, evaluation, values, mean), values
