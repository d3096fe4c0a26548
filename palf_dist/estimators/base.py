"""What every meta-gradient estimator returns, and the recording of trajectories that all of them share.

The estimated quantity is the gradient with respect to phi of the mean over the group's tasks of
    J = mean over checkpoints c of outer_loss(theta_c) + running_sum * mean over steps t of the adaptive loss l_t
        + entropy * mean over t of H(alpha_t) + total_variation * sum over refreshes of ||alpha_{t+1} - alpha_t||_1
        + stability * sum over checkpoints of max(0, V(theta_c) - V(theta_{c-1})),
equation (8) with both of its sums made means so that they do not grow with T, the complexity of equation (2), and a
penalty on rises of V, the cross-entropy on the rows of the outer loss, from the start on.

On a window of the run the two last sums are those of the window divided by its share of the run's steps, so that their
mean over windows of equal length is what the whole run has. A window takes the parameters that it starts from as
constant, V there included. The alpha that it finds in force is what the present phi makes of the last refresh, whose
features (and the shield's mixing) are carried; so the change of alpha across the window's edge is part of it, with the
gradient of both sides. What else is stopped (treated as constant) is stated in ``palf_dist.inner_loop`` and is the same
for every differentiating estimator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.outer_loss import accuracy, checkpoints, complexity, outer_loss, outer_terms
from palf_dist.policies import RecurrentPolicy
from palf_dist.shield import mix


@dataclass
class Estimate:
    """A meta-gradient and what was seen on the way."""

    gradient: np.ndarray  # float64 [number of policy parameters]
    outer_loss: float  # J above, at the unperturbed phi where the estimator evaluates it there
    records: dict[str, np.ndarray]  # see Recorder
    carried: dict[str, np.ndarray] = field(default_factory=dict)  # estimator's own carried arrays (pes)
    metrics: dict[str, float] = field(default_factory=dict)  # see Recorder.metrics


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
    """Collects the rows of a trajectory, one per refresh and one per checkpoint of the outer loss, and the parts of J.
    Made after ``InnerLoop.resume`` and before the first step of the stretch."""

    def __init__(self, loop: InnerLoop, outer: OuterLossConfig, state: InnerState, stop: int) -> None:
        self.loop, self.outer = loop, outer
        self.checkpoints = set(checkpoints(outer.every, state.step, stop))
        self._rows: list[dict[str, Tensor | float]] = []
        self._last: dict[str, Tensor | float] = {}
        self.outer_losses: list[Tensor] = []  # [G] each
        self.running: Tensor | float = 0.0  # sum over steps of the adaptive loss [G]
        self.count = stop - state.step
        self._terms: list[dict[str, Tensor]] = []  # of each checkpoint, [G] each
        self._controls = [] if state.controls is None else [state.controls]  # see outer_loss.complexity
        self._lengths = [0] * len(self._controls)
        self.references: list[Tensor] = []  # V at the start and at each checkpoint, [G] each
        if outer.stability:
            with torch.no_grad():
                logits, features, _ = loop.group.model.forward(state.theta.detach(), loop.group.meta_validation.inputs)
                self.references.append(self._outer_terms(logits, features)["cross_entropy"])
        self._refreshes, self._shielded, self._shielded_before = 0, state.shielded, state.shielded

    def step(self, state: InnerState, result: StepResult) -> None:
        """Call after each step."""
        assert state.controls is not None
        if result.refreshed:
            self._controls.append(state.controls)
            self._lengths.append(0)
            self._refreshes += 1
            self._shielded = state.shielded
        self._lengths[-1] += 1
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
            own = log_p.gather(2, result.batch.labels[:, :, None])[:, :, 0]
            row: dict[str, Tensor | float] = {
                "inner_step": float(state.step - 1),
                "state": state.last_features,
                "controls": state.controls,
                "adaptive_loss": loss,
                "cross_entropy": -own.mean(1),
                "train_accuracy": (masked.argmax(-1) == result.batch.labels).to(own.dtype).mean(1),
            }
        self._last = {name: value.detach().clone() if torch.is_tensor(value) else value for name, value in row.items()}
        self._rows.append(self._last)

    def checkpoint(self, step: int, logits: Tensor, features: Tensor) -> Tensor:
        """Read the outer loss [G] from meta-validation logits and features after ``step`` steps; keeps their graph."""
        group = self.loop.group
        rows = group.meta_validation
        terms = self._outer_terms(logits, features)
        value = outer_loss(self.outer, terms)
        if self.outer.stability:
            self.references.append(terms["cross_entropy"])
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

    @property
    def _share(self) -> float:
        """This stretch's share of the run's steps."""
        return self.count / self.loop.steps

    def _outer_terms(self, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        group, rows = self.loop.group, self.loop.group.meta_validation
        return outer_terms(self.outer, logits, features, rows.labels, rows.mask, group.class_mask)

    def objective(self) -> Tensor:
        """J [G], with whatever graph its parts carry."""
        value = torch.stack(self.outer_losses).mean(0)
        value = value + self.outer.running_sum * self.running / self.count
        return value + self._weighted(terms) if (terms := self._run_terms()) else value

    def _run_terms(self) -> dict[str, Tensor]:
        """The terms [G] of J that belong to no single checkpoint, by the names of their weights."""
        terms = self._complexity(self._controls)
        if self.outer.stability:
            terms["stability"] = torch.stack(self.references).diff(dim=0).relu().sum(0) / self._share
        return terms

    def _complexity(self, controls: Sequence[Tensor]) -> dict[str, Tensor]:
        terms = complexity(self.outer, controls, self._lengths)
        if "total_variation" in terms:
            terms["total_variation"] = terms["total_variation"] / self._share
        return terms

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self.outer, name) * term for name, term in terms.items()]).sum(0)

    def complexity_cotangents(self) -> list[Tensor]:
        """Derivatives [G, U] of the complexity's part of J with respect to the controls of each refresh."""
        with torch.enable_grad():
            leaves = [controls.detach().requires_grad_(True) for controls in self._controls]
            terms = self._complexity(leaves)
            if not terms:
                return [torch.zeros_like(leaf) for leaf in leaves]
            return list(torch.autograd.grad(self._weighted(terms).sum(), leaves))

    def rise_slope(self) -> Tensor:
        """Derivative [G, 1] of the stability's part of J with respect to the newest V, as long as no later one is read;
        with respect to the V before it, this newest rise adds as much with the opposite sign."""
        before, newest = self.references[-2:]
        return self.outer.stability / self._share * (newest > before).to(newest)[:, None]

    def metrics(self) -> dict[str, float]:
        """outer_<term>: means over tasks (and checkpoints) of the terms of J before their weights, where J has more of
        them than the validation loss. shield_share: share of the refreshes at which the shield acted, where there is
        one and there were any."""
        means = {name: float(torch.stack([terms[name] for terms in self._terms]).mean()) for name in self._terms[0]}
        if self.outer.running_sum:
            means["running_sum"] = float(torch.as_tensor(self.running).detach().mean()) / self.count
        means |= {name: float(term.detach().mean()) for name, term in self._run_terms().items()}
        metrics = {f"outer_{name}": mean for name, mean in means.items()} if len(means) > 1 else {}
        if self._shielded is not None and self._refreshes:
            before = 0.0 if self._shielded_before is None else self._shielded_before
            metrics["shield_share"] = float((self._shielded - before).mean()) / self._refreshes
        return metrics

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


def outer_gradient(loop: InnerLoop, recorder: Recorder, theta: Tensor, step: int) -> list[Tensor]:
    """Read the outer loss at theta: its gradients [G, P] of each task, then those of V where stability weighs it."""
    group = loop.group
    with torch.no_grad():
        *outputs, tape = group.model.forward(theta, group.meta_validation.inputs)
    with torch.enable_grad():
        leaves = [output.detach().requires_grad_(True) for output in outputs]
        values = [recorder.checkpoint(step, *leaves)]
        if recorder.references:
            values.append(recorder.references[-1])
        gradients = [
            torch.autograd.grad(value.sum(), leaves, allow_unused=True, retain_graph=value is not values[-1])
            for value in values
        ]
    for kept in (recorder.outer_losses, recorder.references):
        kept[-1:] = [value.detach() for value in kept[-1:]]
    with torch.no_grad():
        return [group.model.backward(theta, tape, *gradient) for gradient in gradients]


def policy_gradient(
    loop: InnerLoop, phi: Tensor, states: list[Tensor], mixings: list[Tensor], cotangents: list[Tensor]
) -> np.ndarray:
    """Chain cotangents of the controls [G, U], one per refresh, through the policy once: float64 [len(phi)].
    ``states``: what it read at each, or all of it, [G, n, S], for a recurrent one. ``mixings``: how far the shield
    mixed each [G], constants; empty where there is none."""
    with torch.enable_grad():
        leaf = phi.detach().requires_grad_(True)
        if isinstance(loop.policy, RecurrentPolicy):
            controls = loop.policy.controls_along(leaf, states[-1])[-len(cotangents) :].flatten(0, 1)
        else:
            controls = loop.policy.controls(leaf, torch.cat(states))
        if not controls.requires_grad:
            return np.zeros(phi.shape[-1])
        if mixings:
            controls = mix(controls, torch.cat(mixings))
        (gradient,) = torch.autograd.grad((controls * torch.cat(cotangents)).sum(), leaf)
    return (gradient / loop.group.size).double().cpu().numpy()
