"""One inner step, and its part of the walk back, as functions of tensors: what the hot path calls at every step.

They change nothing in place and read no state, so that a compiler may take each as a whole (``palf_dist.compilation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palf_dist.inner_optimisers import InnerOptimiser, Pace, Slots
from palf_dist.loss_head import HeadTape, LossHead
from palf_dist.losses import Controls, LossContext, column
from palf_dist.types import WD, InnerModel, Inputs


class Recalled(NamedTuple):
    """What is remembered of a minibatch's rows."""

    own_probability: Tensor  # [G, B] averaged probability of each row's own label
    seen: Tensor  # [G, B]
    averaged: Tensor | None  # [G, B, C] averaged predictions, where a basis loss reads them


class Minibatch(NamedTuple):
    """The rows of one step."""

    inputs: Inputs  # each [G, B, ...]
    labels: Tensor  # [G, B]
    recalled: Recalled


class Outputs(NamedTuple):
    """Of the model on one minibatch."""

    logits: Tensor  # [G, B, C]
    features: Tensor  # [G, B, D]
    tape: Any


class Passed(NamedTuple):
    """The forward pass of one step."""

    outputs: Outputs
    head: HeadTape


class Moved(NamedTuple):
    """What one step leads to."""

    remembered: Tensor  # [G, B, C] averaged predictions of the minibatch's rows
    gradient: Tensor  # [G, P]
    theta: Tensor  # [G, P]
    slots: Slots


@dataclass(frozen=True)
class StepParts:
    """What all steps of a group have in common."""

    model: InnerModel
    head: LossHead
    optimiser: InnerOptimiser
    weight_decay: Tensor  # [G, 1] before the policy's multiplier
    context: LossContext  # without averages
    ema: float  # of the averaged predictions

    def context_of(self, recalled: Recalled) -> LossContext:
        return self.context.with_averages(*recalled)

    def evaluate(self, outputs: Outputs, batch: Minibatch, controls: Controls) -> HeadTape:
        """The adaptive loss."""
        context = self.context_of(batch.recalled)
        return self.head.forward(outputs.logits, batch.labels, outputs.features, controls, context)

    def decay(self, controls: Controls) -> Tensor:
        """Decoupled weight decay [G, 1]: the task's own times the policy's multiplier. Not through the gradient: Adam
        would divide it by its root, which makes the meta-gradient explode at units that are off."""
        return self.weight_decay * column(controls, "wd")


def forward_step(
    parts: StepParts,
    theta: Tensor,
    slots: Slots,
    batch: Minibatch,
    averaged: Tensor,
    controls: Controls,
    pace: Pace,
    outputs: Outputs | None = None,
) -> tuple[Moved, Passed]:
    """One step in closed form. ``averaged``: predictions [G, B, C] of the minibatch's rows so far; ``outputs``: of the
    model at theta, where the caller has them."""
    if outputs is None:
        outputs = Outputs(*parts.model.forward(theta, batch.inputs))
    head = parts.evaluate(outputs, batch, controls)
    gradient = parts.model.backward(theta, outputs.tape, head.dlogits, head.dfeatures)
    remembered = torch.lerp(head.evaluation.plain.p, averaged, parts.ema)
    moved, slots = parts.optimiser.update(theta, slots, gradient, pace)
    moved = torch.addcmul(moved, theta, -pace.rate * parts.decay(controls))
    return Moved(remembered, gradient, moved, slots), Passed(outputs, head)


def traced_step(parts: StepParts, *arguments: Any) -> tuple[Moved, Tensor, Tensor]:
    """``forward_step`` in tensors alone: where it leads, the logits [G, B, C] and the adaptive loss [G]."""
    moved, passed = forward_step(parts, *arguments)
    return moved, passed.outputs.logits, passed.head.mixture


class Cotangents(NamedTuple):
    """Of theta [G, P] and the optimiser's slots."""

    theta: Tensor
    slots: Slots


def backward_step(
    parts: StepParts,
    of_new: Cotangents,
    theta: Tensor,
    slots: Slots,
    new_slots: Slots,
    passed: Passed | Minibatch,
    controls: Controls,
    pace: Pace,
    running: float,
) -> tuple[Cotangents, Tensor]:
    """The cotangents before a step from those after it, and the part of the controls' [G, U] that came through it and
    from ``running`` times its adaptive loss.

    The optimiser's adjoint gives the cotangent lambda of the gradient g; one forward-over-reverse pass along lambda
    both H lambda and d<g, lambda> / d(controls). ``passed``: the step's forward pass; where it was not kept, its rows.
    """
    along, of_slots = parts.optimiser.adjoint(of_new.theta, of_new.slots, slots, new_slots, pace)
    model, loss_head = parts.model, parts.head
    if isinstance(passed, Minibatch):
        outputs = Outputs(*model.forward(theta, passed.inputs))
        passed = Passed(outputs, parts.evaluate(outputs, passed, controls))
    (_, _, tape), head = passed
    logits_dot, features_dot, tangent_tape = model.tangent(theta, tape, along)
    dlogits_dot, dfeatures_dot, of_controls = loss_head.tangent(head, logits_dot, features_dot)
    curvature = model.backward_tangent(
        theta, tape, tangent_tape, along, head.dlogits, head.dfeatures, dlogits_dot, dfeatures_dot
    )
    if running:
        curvature = curvature.add(model.backward(theta, tape, head.dlogits, head.dfeatures), alpha=running)
        of_controls = of_controls.add(loss_head.control_gradient(head), alpha=running)
    # weight decay: theta' has the further term -rate * decay * theta
    shrunk = pace.rate * parts.weight_decay * (of_new.theta * theta).sum(1, keepdim=True)
    of_controls[:, WD] -= shrunk[:, 0]
    of_theta = torch.addcmul(curvature, 1 - pace.rate * parts.decay(controls), of_new.theta)
    return Cotangents(of_theta, of_slots), of_controls
