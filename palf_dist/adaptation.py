"""How the validation loss of a task answers to the controls, one inner step ahead: what an adapting policy descends on.

The look-ahead is the step that the inner model would take on the minibatch at hand, its optimiser and weight decay
included. Its derivative comes from the passes of the adjoint method, for all controls at once.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from palf_dist.inner_optimisers import InnerOptimiser, Pace, Slots
from palf_dist.loss_head import Evaluation, LossHead
from palf_dist.losses import LossContext
from palf_dist.types import WD, Rows, TaskGroup

AT_ONCE = 4 * 10**9
"""Rows x parameters of one forward pass over a split, which keeps all that a derivative would need: 19 MB for each row
of a ResNet-18. Models of some thousand parameters read any split whole."""


def pieces(group: TaskGroup, rows: Rows) -> list[Rows]:
    """A split as one forward pass after the other may read it."""
    return rows.pieces(max(1, AT_ONCE // group.model.num_parameters))


@torch.no_grad()
def look_ahead_slope(
    group: TaskGroup,
    head: LossHead,
    optimiser: InnerOptimiser,
    at: tuple[Tensor, Slots],
    outputs: tuple[Tensor, Tensor, Any],
    labels: Tensor,
    controls: Tensor,
    context: LossContext,
    pace: Pace,
) -> Tensor:
    """d Val(theta') / d controls [G, U]: Val is the mean cross-entropy on the (noisy) validation rows, theta' where one
    step along the gradient of the mixture leads. 0 for a task without validation rows.

    Args:
        at: theta [G, P] and the optimiser's slots before the step.
        outputs: what ``model.forward`` returned there for the minibatch: logits, features and its tape.
        labels: [G, B]. controls: [G, U]. context: of the minibatch.
        pace: of the step.
    """
    model, (theta, slots), (logits, features, tape) = group.model, at, outputs
    evaluated = head.forward(logits, labels, features, controls, context)
    gradient = model.backward(theta, tape, evaluated.dlogits, evaluated.dfeatures)
    moved, new_slots = optimiser.update(theta, slots, gradient, pace)
    decay = pace.rate * group.weight_decay
    slope = _validation_gradient(group, moved - decay * controls[:, WD : WD + 1] * theta, controls, context)
    nothing = tuple(torch.zeros_like(slot) for slot in slots)
    along, _ = optimiser.adjoint(slope, nothing, slots, new_slots, pace)
    logits_dot, features_dot, _ = model.tangent(theta, tape, along)
    of_controls = head.tangent(evaluated, logits_dot, features_dot)[2]
    of_controls[:, WD] -= (decay * (slope * theta).sum(1, keepdim=True))[:, 0]
    return of_controls


def _validation_gradient(group: TaskGroup, theta: Tensor, controls: Tensor, context: LossContext) -> Tensor:
    """Gradient [G, P] of the mean cross-entropy on the validation rows, which no control changes; of a large model
    piece by piece."""
    count = group.validation.mask.sum(1, keepdim=True).clamp_min(1)

    def of(rows: Rows) -> Tensor:
        logits, _, tape = group.model.forward(theta, rows.inputs)
        at = Evaluation(("ce",), logits, rows.labels, None, controls, context)
        return group.model.backward(theta, tape, at.gradient({"ce": rows.mask / count})[0], None)

    return reduce(torch.add, map(of, pieces(group, group.validation)))
