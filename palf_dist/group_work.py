"""What units of work do with a group of tasks, or with some of its tasks: everything between building the group and
making the contribution. The tasks of a group share nothing but their padding, so that a group too large for a worker's
memory is done in parts, whose results join to what the whole gives, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import OuterLossConfig, RunConfig
from palf_dist.estimators import Estimate, make_estimator
from palf_dist.evaluation.metrics import curve_metrics, prediction_metrics
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.outer_loss import accuracy, validation_loss
from palf_dist.policies import Policy, RecordedSchedule
from palf_dist.types import Rows, TaskGroup

EARLY_STOPPING_EVERY = 10  # inner steps between two looks at the validation accuracy
CURVE_INTERVALS = 15  # of a learning curve
_CROSS_ENTROPY = OuterLossConfig(kind="cross_entropy")

Carried = dict[str, np.ndarray]
"""Inner state and estimator's memory between two windows; axis 0 of every array but ``state/step`` is the task."""


@dataclass(frozen=True)
class Stretch:
    """A meta-gradient, and the state that the next window of the inner run starts from (None after the last one)."""

    estimate: Estimate
    carried: Carried | None


def meta_gradient(
    config: RunConfig, loop: InnerLoop, phi: Tensor, start: int, stop: int, keys: tuple[int | str, ...], carried: Any
) -> Stretch:
    """The meta-gradient of inner steps ``start`` to ``stop``; ``carried`` is needed where ``start`` > 0."""
    state, memory = loop.start(), None
    if start > 0:
        assert carried is not None, "a window after the first needs the carried inner state"
        state = InnerState.from_arrays(_named(carried, "state/"), phi.device)
        memory = _named(carried, "estimator/")
    estimate = make_estimator(config.estimator, config.outer_loss).estimate(loop, phi, state, stop, keys, memory)
    onward = None
    if stop < loop.steps:
        onward = {f"state/{name}": value for name, value in state.to_arrays().items()}
        onward |= {f"estimator/{name}": value for name, value in estimate.carried.items()}
    return Stretch(estimate, onward)


def at_refreshes(loop: InnerLoop, phi: Tensor, read: Callable[[InnerState], Tensor]) -> np.ndarray:
    """What ``read`` says of the inner state, [G, X], at each refresh of a whole inner run: [R, G, X] float64."""
    seen: list[Tensor] = []

    def after_step(state: InnerState, result: StepResult) -> None:
        if result.refreshed:
            seen.append(read(state))

    loop.run(loop.start(), phi, loop.steps, after_step=after_step)
    return torch.stack(seen).double().cpu().numpy()


def final_accuracy(loop: InnerLoop, phi: Tensor, *, early_stopping: bool = False) -> np.ndarray:
    """Clean test accuracy [G] float64 after a whole inner run."""
    return _accuracy(loop, _trained(loop, loop.start(), phi, early_stopping), loop.group.test)


def measure(loop: InnerLoop, phi: Tensor, *, early_stopping: bool = False) -> dict[str, np.ndarray]:
    """A whole inner run, measured: float64 arrays whose axis 0 is the task, by name.

    - accuracy [G]: as ``final_accuracy``, and bit for bit that: looking on changes nothing.
    - validation_accuracy, validation_loss [G]: of the same parameters on the validation rows, whose labels are as noisy
      as in training; the loss is the mean cross-entropy in nats. NaN for a task that has no such rows.
    - those of ``prediction_metrics`` [G], on the test rows.
    - curve_accuracy [G, M]: on the test rows after each of ``moments(loop.steps)``, of the parameters that the method
      would hand over by then; and those of ``curve_metrics`` [G].
    - wrong_share [G]: share of the training labels that are wrong.
    - shield_share [G]: share of the refreshes at which the shield acted; only where the policy has one.
    """
    group, curve, wanted = loop.group, [], set(moments(loop.steps))
    state = loop.start()

    def look(step: int, theta: Tensor) -> None:
        if step in wanted:
            curve.append(_accuracy(loop, theta, group.test))

    look(0, group.theta0)
    theta = _trained(loop, state, phi, early_stopping, look)
    test, clean = group.test, group.clean_train_labels
    frequencies = torch.zeros_like(group.log_prior_ratio).scatter_add(1, clean, group.train.mask)
    metrics = prediction_metrics(loop.evaluate(theta, test), test.labels, test.mask, group.class_mask, frequencies)
    share = loop.shield_share(state)
    wrong = ((group.train.labels != clean) * group.train.mask).sum(1) / group.train_sizes
    return {
        "accuracy": curve[-1],
        **on_validation(loop, theta),
        **{name: value.cpu().numpy() for name, value in metrics.items()},
        **curve_metrics(moments(loop.steps), np.stack(curve, 1)),
        "curve_accuracy": np.stack(curve, 1),
        "wrong_share": wrong.double().cpu().numpy(),
        **({} if share is None else {"shield_share": share.double().cpu().numpy()}),
    }


def moments(steps: int, intervals: int = CURVE_INTERVALS) -> list[int]:
    """Inner steps taken when test accuracy is read along a run of ``steps``: from none to all of them, at the ends of
    so many equal intervals, to the nearest step; after every step of a run that has fewer."""
    intervals = min(steps, intervals)
    return [round(steps * index / intervals) for index in range(intervals + 1)]


def _trained(
    loop: InnerLoop,
    state: InnerState,
    phi: Tensor,
    early_stopping: bool,
    look: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The parameters [G, P] that a whole inner run hands over: the last, or the latest of those with the best accuracy
    on the validation rows. ``look`` sees them after every step. ``state`` is that of the start, and advances."""
    group = loop.group
    best = torch.full_like(state.theta[:, 0], -1.0)
    kept = state.theta

    def after_step(now: InnerState, result: StepResult) -> None:
        nonlocal best, kept
        if not early_stopping:
            kept = now.theta
        elif now.step % EARLY_STOPPING_EVERY == 0 or now.step == loop.steps:
            rows = group.validation
            score = accuracy(loop.evaluate(now.theta, rows), rows.labels, rows.mask, group.class_mask)
            better = score >= best
            best = torch.where(better, score, best)
            kept = torch.where(better[:, None], now.theta, kept)
        if look is not None:
            look(now.step, kept)

    loop.run(state, phi, loop.steps, after_step=after_step)
    return kept


def on_validation(loop: InnerLoop, theta: Tensor) -> dict[str, np.ndarray]:
    """``validation_accuracy`` and ``validation_loss`` of ``measure``."""
    rows, class_mask = loop.group.validation, loop.group.class_mask
    seen = loop.evaluate(theta, rows), rows.labels, rows.mask, class_mask
    values = {"accuracy": accuracy(*seen), "loss": validation_loss(_CROSS_ENTROPY, *seen)}
    known = rows.mask.any(1)
    return {
        f"validation_{name}": torch.where(known, value, torch.nan).double().cpu().numpy()
        for name, value in values.items()
    }


def _accuracy(loop: InnerLoop, theta: Tensor, rows: Rows) -> np.ndarray:
    right = accuracy(loop.evaluate(theta, rows), rows.labels, rows.mask, loop.group.class_mask)
    return right.double().cpu().numpy()


def in_parts(group: TaskGroup, parts: int) -> list[TaskGroup]:
    """The tasks of ``group`` in ``parts`` runs of nearly equal length, as views. They stay padded as the whole group
    is: the width of an inner model decides what it starts from."""
    if parts == 1:
        return [group]
    edges = [round(group.size * part / parts) for part in range(parts + 1)]
    return [_tasks(group, slice(a, b)) for a, b in pairwise(edges)]


def part_of(carried: Mapping[str, np.ndarray] | None, part: TaskGroup) -> Carried | None:
    """What is carried of the tasks of ``part``."""
    if carried is None:
        return None
    tasks = slice(part.first, part.first + part.size)
    return {name: value[tasks] if value.ndim else value for name, value in carried.items()}


def policy_of(policy: Policy, part: TaskGroup) -> Policy:
    """What sets the controls of the tasks of ``part``."""
    return policy.part(slice(part.first, part.first + part.size)) if isinstance(policy, RecordedSchedule) else policy


def join(stretches: Sequence[Stretch]) -> Stretch:
    """The stretch of a whole group from those of its parts, in order: means over tasks are weighted by the sizes of the
    parts, in float64; what is kept for each task is put one after the other."""
    if len(stretches) == 1:
        return stretches[0]
    estimates = [stretch.estimate for stretch in stretches]
    sizes = [estimate.records["outer_loss"].shape[1] for estimate in estimates]
    shares = [size / sum(sizes) for size in sizes]

    def mean(values: Sequence[Any]) -> Any:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    def joined(arrays: Sequence[Carried], axis: int) -> Carried:
        return {
            name: np.concatenate([each[name] for each in arrays], axis) if value.ndim > axis else value
            for name, value in arrays[0].items()
        }

    whole = Estimate(
        gradient=mean([estimate.gradient for estimate in estimates]),
        outer_loss=mean([estimate.outer_loss for estimate in estimates]),
        records=joined([estimate.records for estimate in estimates], axis=1),
        metrics={name: mean([estimate.metrics[name] for estimate in estimates]) for name in estimates[0].metrics},
    )
    onward = [stretch.carried for stretch in stretches if stretch.carried is not None]
    return Stretch(whole, joined(onward, axis=0) if onward else None)


def _tasks(group: TaskGroup, tasks: slice) -> TaskGroup:
    def cut(rows: Rows) -> Rows:
        return Rows(tuple(column[tasks] for column in rows.inputs), rows.labels[tasks], rows.mask[tasks])

    changed: dict[str, Any] = {"specs": group.specs[tasks], "batches": group.batches[:, tasks]}
    for item in fields(group):
        value = getattr(group, item.name)
        if isinstance(value, Rows):
            changed[item.name] = cut(value)
        elif isinstance(value, Tensor) and item.name not in changed:
            changed[item.name] = value[tasks]
    return replace(group, **changed, first=group.first + tasks.start)


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> Carried:
    return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
