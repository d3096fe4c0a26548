"""The inner loop: G inner models train side by side under the adaptive loss that a policy sets.

One definition of a step serves every estimator, evaluation and recording; only how the gradient is taken differs:
in closed form (the hot path) or by autograd with a graph (the reference ``unroll``). What is stopped, everywhere alike:
no gradient flows through the training state, the averaged predictions, the choice of minibatches, or how far the shield
mixes alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palf_dist.adaptation import look_ahead_slope, pieces
from palf_dist.compilation import HotPath
from palf_dist.config import InnerConfig
from palf_dist.inner_optimisers import Pace, Slots, cosine_rate, inner_optimiser
from palf_dist.inner_steps import Minibatch, Moved, Outputs, Passed, Recalled, StepParts, forward_step, traced_step
from palf_dist.loss_head import Evaluation, HeadTape, LossHead, both_softmaxes
from palf_dist.losses import MASKED_LOGIT, Columns, Controls, LossContext, reference_mixture
from palf_dist.policies import AdaptingPolicy
from palf_dist.policies.base import Policy
from palf_dist.policies.static import control_vector
from palf_dist.shield import least_mixing, mix, reference_products
from palf_dist.training_state import (
    HUTCHINSON_ROWS,
    SNAPSHOTS,
    VALIDATION_FEATURES,
    Observation,
    RowStatistics,
    StateReader,
    TaskFacts,
    hessian_trace,
    hutchinson_probes,
    neighbour_agreement,
)
from palf_dist.types import AVERAGED_BASIS, NUM_BASIS, Inputs, Rows, TaskGroup


@dataclass
class InnerState:
    """Everything that changes during the inner run of a group."""

    step: int
    theta: Tensor  # [G, P]
    slots: Slots  # the optimiser's, each [G, P]
    averaged: Tensor  # [G, N, C] moving average of each training row's predicted probabilities
    seen: Tensor  # [G, N] bool: rows that have been in a minibatch
    statistics: Tensor | None = None  # [G, 4] of the StateReader
    features: Tensor | None = None  # what the policy read last: raw features [G, S]; all so far, [G, n, S]; snapshots
    controls: Tensor | None = None  # [G, U] in force
    gradient_norm2: Tensor | None = None  # [G] of the last step before a refresh
    mixing: Tensor | None = None  # [G] how far the shield mixed alpha towards the reference at the last refresh
    shielded: Tensor | None = None  # [G] refreshes so far at which it acted

    @property
    def last_features(self) -> Tensor:
        """Raw features [G, S] of the last refresh."""
        assert self.features is not None
        return self.features if self.features.dim() == 2 else self.features[:, -1]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As numpy arrays, for a windowed estimator's carried state; ``InnerLoop.resume`` recomputes the controls."""
        arrays: dict[str, Tensor | np.ndarray] = {
            "step": np.array(self.step),
            "theta": self.theta,
            "averaged": self.averaged,
            "seen": self.seen,
        }
        arrays |= {f"slot_{index}": slot for index, slot in enumerate(self.slots)}
        for name in ("statistics", "features", "gradient_norm2", "mixing", "shielded"):
            value = getattr(self, name)
            if value is not None:
                arrays[name] = value
        return {
            name: value.detach().cpu().numpy() if isinstance(value, Tensor) else value for name, value in arrays.items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], device: torch.device) -> InnerState:
        tensors = {n: torch.from_numpy(np.array(value)).to(device) for n, value in arrays.items() if n != "step"}
        slots = tuple(tensors.pop(name) for name in sorted(tensors) if name.startswith("slot_"))
        return cls(step=int(arrays["step"]), slots=slots, **tensors)


@dataclass(frozen=True)
class StepResult:
    """What was seen during one step, before the update."""

    logits: Tensor  # [G, B, C]
    batch: Minibatch
    refreshed: bool
    loss: Tensor | HeadTape  # the adaptive loss [G], or what it is made from
    passed: Passed | None  # in a closed-form step that is not compiled

    def adaptive_loss(self) -> Tensor:
        """l_t [G]; with its graph in a differentiable step."""
        return self.loss.mixture if isinstance(self.loss, HeadTape) else self.loss


class InnerLoop:
    """The inner run of one task group under one policy."""

    def __init__(self, group: TaskGroup, policy: Policy, inner: InnerConfig) -> None:
        self.group, self.policy, self.inner = group, policy, inner
        self.steps = group.batches.shape[0]
        self.optimiser = inner_optimiser(group.specs[0].optimiser)
        self.head = LossHead(policy.active_basis)
        rows = group.train.labels.shape[1]
        first_rows = rows * torch.arange(group.size, device=group.batches.device)
        self._rows = group.batches + first_rows[:, None]  # among the rows of all tasks joined, [T, G, B]
        self.parts = StepParts(
            group.model,
            self.head,
            self.optimiser,
            group.weight_decay,
            LossContext.create(group.class_mask, group.log_prior_ratio),
            inner.ema,
        )
        self._reads_averages = bool({*AVERAGED_BASIS} & {*policy.active_basis})
        self.hot = HotPath(self.parts) if inner.compile else None
        self._columns: tuple[Tensor, Columns] | None = None  # of the controls asked for last
        self._facts = task_facts(group, needs_neighbours="neighbour_agreement" in policy.features)
        self._keeps_snapshots = SNAPSHOTS in policy.features
        self._needs_validation = bool(set(VALIDATION_FEATURES) & set(policy.features))
        self._probes = None
        if "hessian_trace" in policy.features:
            self._probes = hutchinson_probes(group.theta0.shape[1], group.theta0.dtype).to(group.theta0.device)

    def start(self) -> InnerState:
        """The state before the first step."""
        group = self.group
        valid = group.class_mask.to(group.theta0.dtype) / group.num_classes[:, None]
        rows = group.train.labels.shape[1]
        return InnerState(
            step=0,
            theta=group.theta0,
            slots=tuple(torch.zeros_like(group.theta0) for _ in range(self.optimiser.num_slots)),
            averaged=valid[:, None, :].repeat(1, rows, 1),
            seen=torch.zeros_like(group.train.labels, dtype=torch.bool),
        )

    def minibatch(self, step: int) -> tuple[Inputs, Tensor]:
        """Inputs [G, B, ...] and labels [G, B] at ``step``."""
        train, rows = self.group.train, self._rows[step]
        return tuple(_joined(column, rows) for column in train.inputs), _joined(train.labels, rows)

    def pace(self, step: int) -> Pace:
        """Of the inner optimiser at ``step``, as hot functions take it."""
        corrections: tuple[float | Tensor, ...] = self.optimiser.corrections(step)
        if self.hot is not None:  # one graph for all steps; in float64, as Python's numbers
            corrections = tuple(torch.tensor(number, dtype=torch.float64) for number in corrections)
        return Pace(self.group.learning_rate * cosine_rate(step, self.steps), corrections)

    def columns(self, controls: Tensor) -> Controls:
        """Controls [G, U] as hot functions take them: taken apart once for all steps that share them."""
        if self.hot is not None:
            return controls
        if self._columns is None or self._columns[0] is not controls:
            self._columns = controls, Columns.of(controls)
        return self._columns[1]

    def step(self, state: InnerState, phi: Tensor, *, differentiable: bool = False) -> StepResult:
        """Advance ``state`` by one step in place. With ``differentiable`` the new theta and slots carry a graph back to
        the old ones and to phi."""
        t, model = state.step, self.group.model
        inputs, labels = self.minibatch(t)
        refreshed = t % self.policy.refresh == 0 or state.features is None
        outputs: Outputs | None = None
        if differentiable:
            logits, features = model.apply(state.theta, inputs)
        elif refreshed:
            outputs = Outputs(*model.forward(state.theta, inputs))
            logits = outputs.logits
        if refreshed:
            state.features = self._read(state, logits, labels)
            state.mixing = None
        if refreshed or state.controls is None:
            self.resume(state, phi)
        recalled, before = self._recall(state, labels)
        batch = Minibatch(inputs, labels, recalled)
        if refreshed and (isinstance(self.policy, AdaptingPolicy) or self.policy.shield is not None):
            with torch.no_grad():
                there = Outputs(*model.forward(state.theta, inputs)) if outputs is None else outputs
            self._adapt(state, phi, batch, there)
            self._shield(state, batch, there)
        controls, passed = state.controls, None
        assert controls is not None
        loss: Tensor | HeadTape
        if differentiable:
            moved, loss = self._by_autograd(state, batch, before, logits, features)
        elif self.hot is not None:
            at = state.theta, state.slots, batch, before, controls
            moved, logits, loss = self.hot(traced_step, *at, self.pace(t))
        else:
            taken = state.theta, state.slots, batch, before, self.columns(controls)
            moved, passed = forward_step(self.parts, *taken, self.pace(t), outputs)
            logits, loss = passed.outputs.logits, passed.head
        self._remember(state, moved.remembered)
        if "gradient_norm" in self.policy.features and (t + 1) % self.policy.refresh == 0:  # it is read next
            state.gradient_norm2 = moved.gradient.detach().square().sum(1)
        state.theta, state.slots = moved.theta, moved.slots
        state.step = t + 1
        return StepResult(logits, batch, refreshed, loss, passed)

    def _by_autograd(
        self, state: InnerState, batch: Minibatch, averaged: Tensor, logits: Tensor, features: Tensor
    ) -> tuple[Moved, Tensor]:
        """The step with a graph, from the plain formulas of the losses; and the adaptive loss [G]."""
        controls, pace, context = state.controls, self.pace(state.step), self.parts.context_of(batch.recalled)
        assert controls is not None
        loss = reference_mixture(logits, batch.labels, features, controls, context, self.policy.active_basis)
        (gradient,) = torch.autograd.grad(loss.sum(), state.theta, create_graph=True)
        _, p = both_softmaxes(logits.detach().masked_fill(~self.group.class_mask[:, None, :], MASKED_LOGIT))
        moved, slots = self.optimiser.update(state.theta, state.slots, gradient, pace)
        moved = torch.addcmul(moved, state.theta, -pace.rate * self.parts.decay(controls))
        return Moved(torch.lerp(p, averaged, self.parts.ema), gradient, moved, slots), loss

    def resume(self, state: InnerState, phi: Tensor) -> None:
        """Set the controls in force, [G, U]: what the policy says of the last refresh, if there was one, under ``phi``
        as it is now, mixed as far as the shield did then."""
        if state.features is not None:
            state.controls = self.policy.controls(phi, state.features)
            if state.mixing is not None:
                state.controls = mix(state.controls, state.mixing)

    def shield_share(self, state: InnerState) -> Tensor | None:
        """Share [G] of the run's refreshes so far at which the shield acted; None where it was never asked."""
        return None if state.shielded is None else state.shielded / -(-state.step // self.policy.refresh)

    def _adapt(self, state: InnerState, phi: Tensor, batch: Minibatch, outputs: Outputs) -> None:
        """Where the policy adapts: tell it how the validation loss answers to the controls in force on this minibatch,
        and ask it anew. ``outputs``: of the model there, with their tape."""
        if not isinstance(self.policy, AdaptingPolicy):
            return
        assert state.controls is not None and state.features is not None
        at = state.theta.detach(), tuple(slot.detach() for slot in state.slots)
        pace, controls = self.pace(state.step), state.controls.detach()
        context = self.parts.context_of(batch.recalled)
        slope = look_ahead_slope(
            self.group, self.head, self.optimiser, at, outputs, batch.labels, controls, context, pace
        )
        # per unit of the peak learning rate: tasks of any rate then have sums of one size
        state.features = state.features + self.policy.descent(phi, state.features, slope) / self.group.learning_rate
        self.resume(state, phi)

    def _shield(self, state: InnerState, batch: Minibatch, outputs: Outputs) -> None:
        """Mix the controls as far as the descent condition of the shield asks for, where there is one."""
        if self.policy.shield is None:
            return
        assert state.controls is not None
        theta, controls = state.theta.detach(), state.controls.detach()
        context = self.parts.context_of(batch.recalled)
        products = reference_products(self.group.model, self.head, theta, outputs, batch.labels, controls, context)
        state.mixing = least_mixing(controls[:, :NUM_BASIS], products, self.policy.shield)
        acted = (state.mixing > 0).to(state.mixing.dtype)
        state.shielded = acted if state.shielded is None else state.shielded + acted
        state.controls = mix(state.controls, state.mixing)

    def _recall(self, state: InnerState, labels: Tensor) -> tuple[Recalled, Tensor]:
        """What is remembered of this minibatch's rows, and their whole averages [G, B, C]."""
        with torch.no_grad():
            before, seen = (_joined(each, self._rows[state.step]) for each in (state.averaged, state.seen))
            own = before.gather(2, labels[:, :, None])[:, :, 0]
        return Recalled(own, seen, before if self._reads_averages else None), before

    def _remember(self, state: InnerState, averaged: Tensor) -> None:
        """Take averages [G, B, C] of this minibatch's rows into those of all rows."""
        rows = self._rows[state.step].flatten()
        state.averaged.flatten(0, 1).index_copy_(0, rows, averaged.flatten(0, 1))  # of a view: written in place
        state.seen.flatten().index_fill_(0, rows, True)

    def _read(self, state: InnerState, logits: Tensor, labels: Tensor) -> Tensor:
        """What the policy reads at the current step; one that adapts, what it read before, to which ``_adapt`` adds."""
        if isinstance(self.policy, AdaptingPolicy):
            nothing = state.theta.new_zeros(self.group.size, len(self.policy.features))
            return nothing if state.features is None else state.features
        if self._keeps_snapshots:
            return _appended(state.features, self.snapshot(state.theta.detach()))
        return self._observe(state, logits, labels)

    def _observe(self, state: InnerState, logits: Tensor, labels: Tensor) -> Tensor:
        """Raw features [G, S] at the current step, after those before it where the policy reads its history."""
        reader = StateReader(self.policy.features, self._facts)
        reader.statistics = state.statistics
        group = self.group
        trace = None
        if self._probes is not None:
            inputs, all_labels = self.minibatch(state.step)
            few = tuple(column[:, :HUTCHINSON_ROWS] for column in inputs)
            theta = state.theta.detach()
            few_labels = all_labels[:, :HUTCHINSON_ROWS]
            trace = hessian_trace(group.model, theta, few, few_labels, group.class_mask, self._probes)
        validation = None
        if self._needs_validation:
            validation = self.evaluate(state.theta.detach(), group.validation)
        observation = Observation(
            time=state.step / self.steps,
            minibatch=RowStatistics.of(logits.detach(), labels, group.class_mask),
            averaged=state.averaged,
            averaged_labels=group.train.labels,
            averaged_mask=state.seen,
            gradient_norm2=state.gradient_norm2,
            hessian_trace=trace,
            validation_logits=validation,
            validation_labels=group.validation.labels,
            validation_mask=group.validation.mask,
        )
        features = reader.read(observation)
        state.statistics = reader.statistics
        return _appended(state.features, features) if self.policy.reads_history else features

    def snapshot(self, theta: Tensor) -> Tensor:
        """What a model is worth, [G, 1 + K]: cross-entropy on the (noisy) validation rows, then the mean of each active
        basis loss over the training rows, at the default hyper-parameters."""
        group = self.group
        defaults = control_vector({}).to(theta).expand(group.size, -1)
        means = []
        for rows, active in ((group.validation, ("ce",)), (group.train, self.policy.active_basis)):
            at = Evaluation(active, self.evaluate(theta, rows), rows.labels, None, defaults, self.parts.context)
            values = dict(at.values())
            # 0 / 0, unknown, where there are no validation rows
            means += [(values[name] * rows.mask).sum(1) / rows.mask.sum(1) for name in active]
        return torch.stack(means, 1)

    def run(
        self,
        state: InnerState,
        phi: Tensor,
        stop: int,
        *,
        after_step: Callable[[InnerState, StepResult], None] | None = None,
    ) -> None:
        """Advance ``state`` to step ``stop`` without gradients with respect to phi."""
        with torch.no_grad():
            while state.step < stop:
                result = self.step(state, phi)
                if after_step is not None:
                    after_step(state, result)

    def evaluate(self, theta: Tensor, rows: Rows) -> Tensor:
        """Logits [G, N, C] on a split, of a large model piece by piece."""
        with torch.no_grad():
            return torch.cat([self.group.model.forward(theta, some.inputs)[0] for some in pieces(self.group, rows)], 1)


def _joined(columns: Tensor, rows: Tensor) -> Tensor:
    """Entries [G, B, ...] of columns [G, N, ...] at ``rows`` [G, B] among those of all tasks joined."""
    return columns.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _appended(past: Tensor | None, now: Tensor) -> Tensor:
    """What was seen at each refresh so far, [G, n, X], from what was before and is now, [G, X]."""
    return now[:, None] if past is None else torch.cat([past, now[:, None]], 1)


def task_facts(group: TaskGroup, *, needs_neighbours: bool = False) -> TaskFacts:
    """The constant part of the training state, from the (noisy) training labels."""
    counts = torch.zeros_like(group.class_mask, dtype=group.theta0.dtype)
    counts.scatter_add_(1, group.train.labels, group.train.mask.to(counts.dtype))
    return TaskFacts(
        class_mask=group.class_mask,
        class_frequencies=counts / counts.sum(1, keepdim=True),
        train_sizes=group.train_sizes.to(counts.dtype),
        log_prior_ratio=group.log_prior_ratio,
        neighbour_agreement=neighbour_agreement(group.train) if needs_neighbours else None,
    )


def move_group(group: TaskGroup, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> TaskGroup:
    """The same group in another floating-point type (the proofs run in float64) or on another device."""

    def convert(value: Tensor) -> Tensor:
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    def convert_rows(rows: Rows) -> Rows:
        return Rows(tuple(convert(column) for column in rows.inputs), convert(rows.labels), convert(rows.mask))

    changed: dict[str, Any] = {
        item.name: convert_rows(value) if isinstance(value, Rows) else convert(value)
        for item in fields(group)
        if isinstance(value := getattr(group, item.name), (Rows, Tensor))
    }
    return replace(group, **changed)
