"""The adjoint method: exact meta-gradients without an autograd graph.

Forward, keep theta_t and the optimiser's slots; of short runs the forward passes, too. Backward, carry the cotangents
of theta and the slots; at each step the optimiser's adjoint gives the cotangent lambda of the gradient g_t, and one
forward-over-reverse pass along lambda gives both H lambda (for the cotangent of theta) and d<g_t, lambda>/d(controls).
The policy is chained once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.estimators.base import Estimate, Recorder, outer_gradient, policy_gradient
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.inner_optimisers import Slots
from palf_dist.inner_steps import Cotangents, Minibatch, Passed, Recalled, backward_step
from palf_dist.policies import LearnedPolicy, Policy
from palf_dist.types import CONTROL_INDEX

KEPT = 2e6
"""Bytes for each task that the forward passes of a whole inner run may take beside theta_t, to be kept for the walk
back; longer runs and deeper models make each of them again."""


@dataclass(frozen=True)
class StepTrace:
    """What the walk back needs of one step."""

    theta: Tensor  # [G, P] before the step
    slots: Slots
    recalled: Recalled
    segment: int  # index of the refresh that set the controls
    passed: Passed | None  # the step's forward pass, where it is kept


@dataclass
class ForwardTrace:
    """What the forward run leaves behind for the walk back."""

    steps: list[StepTrace] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # features [G, S] of each segment; or one of all, [G, n, S]
    controls: list[Tensor] = field(default_factory=list)  # [G, U] of each segment
    mixings: list[Tensor] = field(default_factory=list)  # [G] of each segment, where there is a shield
    outer_gradients: dict[int, Tensor] = field(default_factory=dict)  # of J, after this many steps: [G, P]

    def open_segment(self, state: InnerState) -> None:
        assert state.features is not None and state.controls is not None
        if state.features.dim() == 3:  # the last holds what was seen before
            self.states.clear()
        self.states.append(state.features)
        self.controls.append(state.controls)
        if state.mixing is not None:
            self.mixings.append(state.mixing)


class Adjoint:
    """Gradient of the whole stretch, backpropagated through every step of it."""

    truncated = False

    def __init__(self, config: EstimatorConfig, outer: OuterLossConfig) -> None:
        self.outer, self.task_clip = outer, config.task_clip

    def estimate(
        self,
        loop: InnerLoop,
        phi: Tensor,
        state: InnerState,
        stop: int,
        keys: tuple[int | str, ...],
        carried: dict[str, np.ndarray] | None = None,
    ) -> Estimate:
        start = state.step
        loop.resume(state, phi)
        recorder = Recorder(loop, self.outer, state, stop)
        if self.truncated:
            recorder.checkpoints = set(range(start + 1, stop + 1))
        trace = self._forward(loop, phi, state, stop, recorder)
        with torch.no_grad():
            cotangents = self._walk_back(loop, start, state.slots, trace, recorder.complexity_cotangents())
        metrics = recorder.metrics()
        if self.task_clip is not None:
            cotangents, metrics["clipped_share"] = _clipped(cotangents, loop.policy, self.task_clip)
        return Estimate(
            gradient=policy_gradient(loop, phi, trace.states, trace.mixings, cotangents),
            outer_loss=float(recorder.objective().mean()),
            records=recorder.arrays(),
            metrics=metrics,
        )

    def _forward(self, loop: InnerLoop, phi: Tensor, state: InnerState, stop: int, recorder: Recorder) -> ForwardTrace:
        trace = ForwardTrace()
        if state.features is not None:  # a window that goes on from a refresh before it
            trace.open_segment(state)
        before = (state.theta, state.slots)
        kept: bool | None = None  # whether the steps' forward passes are; they are all of one size
        last_reference: tuple[int, Tensor] | None = None  # step and gradient of V at the checkpoint before

        def after_step(now: InnerState, result: StepResult) -> None:
            nonlocal before, kept, last_reference
            if result.refreshed:
                trace.open_segment(now)
            segment = len(trace.controls) - 1
            if kept is None:
                kept = result.passed is not None and loop.steps * held(result.passed) <= KEPT * loop.group.size
            passed = result.passed if kept else None
            trace.steps.append(StepTrace(*before, result.batch.recalled, segment, passed))
            before = (now.theta, now.slots)
            recorder.step(now, result)
            if now.step in recorder.checkpoints:
                gradient, *of_reference = outer_gradient(loop, recorder, now.theta, now.step)
                trace.outer_gradients[now.step] = gradient.mul_(1 / len(recorder.checkpoints))
                for reference in of_reference:
                    rise = recorder.rise_slope()
                    trace.outer_gradients[now.step] += rise * reference
                    if last_reference is not None and not self.truncated:
                        step, earlier = last_reference
                        trace.outer_gradients[step] -= rise * earlier
                    last_reference = now.step, reference

        loop.run(state, phi, stop, after_step=after_step)
        return trace

    def _walk_back(
        self, loop: InnerLoop, start: int, last_slots: Slots, trace: ForwardTrace, cotangents: list[Tensor]
    ) -> list[Tensor]:
        """Cotangents [G, U] of the controls of each segment: ``cotangents``, which come from no step, and the rest."""
        nothing = torch.zeros_like(trace.steps[-1].theta)
        none_of_slots: Slots = tuple(torch.zeros_like(slot) for slot in last_slots)
        at = Cotangents(nothing, none_of_slots)
        new_slots = last_slots
        running = self.outer.running_sum / len(trace.steps)
        while trace.steps:
            step = trace.steps.pop()  # frees its memory as the walk goes on
            t = start + len(trace.steps)
            if self.truncated:
                at = Cotangents(nothing, none_of_slots)
            if t + 1 in trace.outer_gradients:
                at = at._replace(theta=at.theta + trace.outer_gradients[t + 1])
            controls = loop.columns(trace.controls[step.segment])
            passed = step.passed or Minibatch(*loop.minibatch(t), step.recalled)
            place = at, step.theta, step.slots, new_slots, passed, controls, loop.pace(t)
            if loop.hot is None:
                at, of_controls = backward_step(loop.parts, *place, running)
            else:
                at, of_controls = loop.hot(backward_step, *place, running)
            new_slots = step.slots
            cotangents[step.segment] += of_controls
        return cotangents


def held(*values: Any) -> float:
    """Bytes of all tensors in there; unknown, and so without limit, where autograd holds more for them."""
    sizes: dict[int, float] = {}

    def find(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage._cdata] = inf if value.requires_grad else storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for each in value:
                find(each)
        elif isinstance(value, dict):
            find([*value.values()])
        elif hasattr(value, "__dict__"):
            find(vars(value))

    find(values)
    return sum(sizes.values())


def _clipped(cotangents: list[Tensor], policy: Policy, most: float) -> tuple[list[Tensor], float]:
    """The cotangents [G, U] of all segments, those of each task scaled to a norm of at most ``most`` over the controls
    that the policy sets, and the share of tasks that were; a gradient that is not finite is left out. Inner runs near
    the edge of stability have gradients thousands of times as large as the others', and with no more to say: without a
    limit one of them speaks for its whole group."""
    assert isinstance(policy, LearnedPolicy)
    columns = [CONTROL_INDEX[name] for name in (*policy.spec.basis, *policy.spec.hyperparameters)]
    norms = torch.stack(cotangents, 2)[:, columns].double().flatten(1).norm(dim=1)
    finite = norms.isfinite()
    # exactly 1 below the limit, as most / norms.clamp(min=most) is not: torch multiplies by a reciprocal
    scale = torch.where(finite, (norms / most).clamp(min=1).reciprocal(), 0.0).to(cotangents[0])[:, None]
    kept = [torch.where(finite[:, None], cotangent, 0.0) * scale for cotangent in cotangents]
    return kept, float((~(norms <= most)).double().mean())


class OneStep(Adjoint):
    """The one-step hypergradient: the outer loss is read after every step and its gradient goes back through that step
    alone. Cheap in memory, blind to later consequences."""

    truncated = True
