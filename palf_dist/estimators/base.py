"""What every meta-gradient estimator returns, and the recording of trajectories that all of them share.

The estimated quantity is the gradient with respect to phi of the mean over the group's tasks of
    J = mean over checkpoints c of outer_loss(theta_c) + running_sum * mean over steps t of the adaptive loss l_t,
equation (8) with both sums made means so that they do not grow with T. What is stopped (treated as constant) is stated
in ``palf_dist.inner_loop`` and is the same for every differentiating estimator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.outer_loss import accuracy, checkpoints, outer_loss, outer_terms


@dataclass
class Estimate:
    """A meta-gradient and what was seen on the way."""

    gradient: np.ndarray  # float64 [number of policy parameters]
    outer_loss: float  # J above, at the unperturbed phi where the estimator evaluates it there
    records: dict[str, np.ndarray]  # see Recorder
    carried: dict[str, np.ndarray] = field(default_factory=dict)  # estimator's own carried arrays (pes)
    terms: dict[str, float] = field(default_factory=dict)  # of J before their weights; none where J has but one


class Estimator(Protocol):
    """Runs ``state`` forward to step ``stop`` and estimates the meta-gradient of that stretch."""

    def __init__(self, config: EstimatorConfig, outer: OuterLossConfig) -> None: ...

    def estimate(
        self,
        loop: InnerLoop,
        phi: Tensor,
        state: InnerState,
        stop: int,
        keys: tuple[int | str, ...],
        carried: dict[str, np.ndarray] | None = None,
    ) -> Estimate:
        """Args:
        loop: the inner run of a task group.
        phi: policy parameters [number of policy parameters].
        state: inner state to start from; it is advanced in place to ``stop``.
        stop: inner step at which the stretch ends.
        keys: random-number keys of this unit (perturbations of es and pes).
        carried: what the previous window's estimate returned as ``carried``.
        """
        ...


class Recorder:
    """Collects the rows of a trajectory: one per refresh and one per checkpoint of the outer loss."""

    def __init__(self, loop: InnerLoop, outer: OuterLossConfig, start: int, stop: int) -> None:
        self.loop, self.outer = loop, outer
        self.checkpoints = set(checkpoints(outer.every, start, stop))
        self._rows: list[dict[str, Tensor | float]] = []
        self._last: dict[str, Tensor | float] = {}
        self.outer_losses: list[Tensor] = []  # [G] each
        self.running: Tensor | float = 0.0  # sum over steps of the adaptive loss [G]
        self.count = stop - start
        self._terms: list[dict[str, Tensor]] = []  # of each checkpoint, [G] each

    def step(self, state: InnerState, result: StepResult) -> None:
        """Call after each step."""
        assert state.controls is not None
        if not self._last:  # a window may begin between two refreshes
            self._last = {"state": state.last_features, "controls": state.controls.detach()}
        if not (result.refreshed or self.outer.running_sum):
            return
        loss = result.adaptive_loss()
        self.running = self.running + loss
        if not result.refreshed:
            return
        with torch.no_grad():
            masked = result.logits.masked_fill(~self.loop.group.class_mask[:, None, :], -1e9)
            log_p = torch.log_softmax(masked, -1)
            own = log_p.gather(2, result.labels[:, :, None])[:, :, 0]
            row: dict[str, Tensor | float] = {
                "inner_step": float(state.step - 1),
                "state": state.last_features,
                "controls": state.controls,
                "adaptive_loss": loss,
                "cross_entropy": -own.mean(1),
                "train_accuracy": (masked.argmax(-1) == result.labels).to(own.dtype).mean(1),
            }
        self._last = {name: value.detach().clone() if torch.is_tensor(value) else value for name, value in row.items()}
        self._rows.append(self._last)

    def checkpoint(self, step: int, logits: Tensor, features: Tensor) -> Tensor:
        """Read the outer loss [G] from meta-validation logits and features after ``step`` steps; keeps their graph."""
        group = self.loop.group
        rows = group.meta_validation
        terms = outer_terms(self.outer, logits, features, rows.labels, rows.mask, group.class_mask)
        value = outer_loss(self.outer, terms)
        self._terms.append({name: term.detach() for name, term in terms.items()})
        right = accuracy(logits.detach(), rows.labels, rows.mask, group.class_mask)
        seen: dict[str, Tensor | float] = {
            "inner_step": float(step),
            "outer_loss": value.detach(),
            "meta_validation_accuracy": right,
        }
        self._rows.append(self._last | seen)
        self.outer_losses.append(value)
        return value

    def objective(self) -> Tensor:
        """J [G], with whatever graph its parts carry."""
        value = torch.stack(self.outer_losses).mean(0)
        return value + self.outer.running_sum * self.running / self.count

    def terms(self) -> dict[str, float]:
        """Means over tasks and checkpoints of the terms of J (``outer_loss.outer_terms``, and running_sum: the mean
        adaptive loss); empty where the validation loss is all there is."""
        means = {name: float(torch.stack([terms[name] for terms in self._terms]).mean()) for name in self._terms[0]}
        if self.outer.running_sum:
            means["running_sum"] = float(torch.as_tensor(self.running).detach().mean()) / self.count
        return means if len(means) > 1 else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """inner_step [R]; state [R, G, S]; controls [R, G, U]; the rest [R, G], NaN where not read."""
        unknown = torch.full((self.loop.group.size,), math.nan)
        names = ("adaptive_loss", "cross_entropy", "train_accuracy", "outer_loss", "meta_validation_accuracy")
        result = {
            name: torch.stack([torch.as_tensor(row.get(name, unknown)).to(unknown) for row in self._rows]).numpy()
            for name in names
        }
        for name in ("state", "controls"):
            result[name] = torch.stack([torch.as_tensor(row[name]) for row in self._rows]).to(unknown).numpy()
        result["inner_step"] = np.array([row["inner_step"] for row in self._rows], np.int32)
        return result


def outer_gradient(loop: InnerLoop, recorder: Recorder, theta: Tensor, step: int) -> Tensor:
    """Read the outer loss at theta and return its gradient [G, P], summed over tasks."""
    group = loop.group
    with torch.no_grad():
        *outputs, tape = group.model.forward(theta, group.meta_validation.inputs)
    with torch.enable_grad():
        logits, features = (output.detach().requires_grad_(True) for output in outputs)
        value = recorder.checkpoint(step, logits, features)
        dlogits, dfeatures = torch.autograd.grad(value.sum(), (logits, features), allow_unused=True)
    recorder.outer_losses[-1] = recorder.outer_losses[-1].detach()
    with torch.no_grad():
        return group.model.backward(theta, tape, dlogits, dfeatures)


def policy_gradient(loop: InnerLoop, phi: Tensor, states: list[Tensor], cotangents: list[Tensor]) -> np.ndarray:
    """Chain cotangents of the controls [G, U], one per refresh, through the policy once: float64 [len(phi)]."""
    with torch.enable_grad():
        leaf = phi.detach().requires_grad_(True)
        if loop.policy.reads_history:  # of other lengths
            controls = torch.cat([loop.policy.controls(leaf, state) for state in states])
        else:
            controls = loop.policy.controls(leaf, torch.cat(states))
        if not controls.requires_grad:
            return np.zeros(phi.shape[-1])
        (gradient,) = torch.autograd.grad((controls * torch.cat(cotangents)).sum(), leaf)
    return (gradient / loop.group.size).double().cpu().numpy()
