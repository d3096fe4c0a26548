"""One inner step, and its part of the walk back, as functions of tensors: what the hot path calls at every step.

They change nothing in place and read no state, so that a compiler may take each as a whole (``palf_dist.compilation``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palf_dist.inner_optimisers import Count, InnerOptimiser, Slots
from palf_dist.loss_head import HeadTape, LossHead
from palf_dist.losses import Controls, LossContext, column
from palf_dist.types import WD, InnerModel, Inputs


class Recalled(NamedTuple):
    """What is remembered of the rows of one minibatch."""

    own_probability: Tensor  # [G, B] averaged probability of each row's own label
    seen: Tensor  # [G, B]
    averaged: Tensor | None  # [G, B, C] averaged predictions, where a basis loss reads them


class Outputs(NamedTuple):
    """Of the model on one minibatch."""

    logits: Tensor  # [G, B, C]
    features: Tensor  # [G, B, D]
    tape: Any


class Passed(NamedTuple):
    """The forward pass of one step."""

    outputs: Outputs
    head: HeadTape


class Step(NamedTuple):
    """What one step has seen and made."""

    passed: Passed
    labels: Tensor  # [G, B]
    recalled: Recalled
    remembered: Tensor  # [G, B, C] averaged predictions of the minibatch's rows after it
    gradient: Tensor  # [G, P]
    theta: Tensor  # [G, P] after it
    slots: Slots


class TracedStep(NamedTuple):
    """Those tensors of a ``Step`` that somebody reads."""

    logits: Tensor
    labels: Tensor
    recalled: Recalled
    loss: Tensor  # [G]
    remembered: Tensor
    gradient: Tensor
    theta: Tensor
    slots: Slots


@dataclass(frozen=True)
class StepParts:
    """What all steps of a group have in common."""

    model: InnerModel
    head: LossHead
    optimiser: InnerOptimiser
    inputs: Inputs  # training rows, each [G, N, ...]
    labels: Tensor  # [G, N]
    weight_decay: Tensor  # [G, 1] before the policy's multiplier
    context: LossContext  # without averages
    reads_averages: bool  # a basis loss reads the whole averaged predictions
    ema: float  # of those

    def minibatch(self, rows: Tensor) -> tuple[Inputs, Tensor]:
        """Inputs [G, B, ...] and labels [G, B] of ``rows`` [G, B] among the training rows of all tasks joined."""
        return tuple(joined(column, rows) for column in self.inputs), joined(self.labels, rows)

    def context_of(self, recalled: Recalled) -> LossContext:
        return self.context.with_averages(*recalled)

    def recall(self, averaged: Tensor, seen: Tensor, rows: Tensor, labels: Tensor) -> tuple[Recalled, Tensor]:
        """What averages [G, N, C] and flags [G, N] hold of ``rows`` [G, B], whose labels are [G, B]; and the whole
        averages [G, B, C]."""
        before = joined(averaged, rows)
        own = before.gather(2, labels[:, :, None])[:, :, 0]
        return Recalled(own, joined(seen, rows), before if self.reads_averages else None), before

    def decay(self, controls: Controls) -> Tensor:
        """Decoupled weight decay [G, 1]: the task's own times the policy's multiplier. Not through the gradient: Adam
        would divide it by its root, which makes the meta-gradient explode at units that are off."""
        return self.weight_decay * column(controls, "wd")


def joined(columns: Tensor, rows: Tensor) -> Tensor:
    """Entries [G, B, ...] of columns [G, N, ...] at ``rows`` [G, B] among those of all tasks joined."""
    return columns.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def forward_step(
    parts: StepParts,
    theta: Tensor,
    slots: Slots,
    averaged: Tensor,
    seen: Tensor,
    rows: Tensor,
    controls: Controls,
    rate: Tensor,
    step: Count,
    outputs: Outputs | None = None,
) -> Step:
    """One step in closed form. ``outputs``: of the model at theta, where the caller has them."""
    inputs, labels = parts.minibatch(rows)
    if outputs is None:
        outputs = Outputs(*parts.model.forward(theta, inputs))
    recalled, before = parts.recall(averaged, seen, rows, labels)
    head = parts.head.forward(outputs.logits, labels, outputs.features, controls, parts.context_of(recalled))
    gradient = parts.model.backward(theta, outputs.tape, head.dlogits, head.dfeatures)
    remembered = torch.lerp(head.evaluation.plain.p, before, parts.ema)
    moved, slots = parts.optimiser.update(theta, slots, gradient, rate, step)
    moved = torch.addcmul(moved, theta, -rate * parts.decay(controls))
    return Step(Passed(outputs, head), labels, recalled, remembered, gradient, moved, slots)


def traced_step(parts: StepParts, *arguments: Any) -> TracedStep:
    """``forward_step`` in tensors alone."""
    step = forward_step(parts, *arguments)
    seen = step.passed.outputs.logits, step.labels, step.recalled, step.passed.head.mixture
    return TracedStep(*seen, step.remembered, step.gradient, step.theta, step.slots)


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
    rows: Tensor,
    recalled: Recalled,
    controls: Controls,
    rate: Tensor,
    step: Count,
    running: float,
    passed: Passed | None = None,
) -> tuple[Cotangents, Tensor]:
    """The cotangents before a step from those after it, and the part of the controls' [G, U] that came through it and
    from ``running`` times its adaptive loss.

    The optimiser's adjoint gives the cotangent lambda of the gradient g; one forward-over-reverse pass along lambda
    both H lambda and d<g, lambda> / d(controls). ``passed``: the step's forward pass, where it was kept.
    """
    along, of_slots = parts.optimiser.adjoint(of_new.theta, of_new.slots, slots, new_slots, rate, step)
    model, loss_head = parts.model, parts.head
    if passed is None:
        inputs, labels = parts.minibatch(rows)
        logits, features, tape = model.forward(theta, inputs)
        head = loss_head.forward(logits, labels, features, controls, parts.context_of(recalled))
    else:
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
    shrunk = rate * parts.weight_decay * (of_new.theta * theta).sum(1, keepdim=True)
    of_controls[:, WD] -= shrunk[:, 0]
    of_theta = torch.addcmul(curvature, 1 - rate * parts.decay(controls), of_new.theta)
    return Cotangents(of_theta, of_slots), of_controls
