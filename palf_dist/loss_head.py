"""Closed-form loss head: values of all active basis losses, their gradients, and the directional derivatives of those,
without autograd and from one log-softmax (a second one where the robust loss adjusts for the prior).

``Evaluation`` is the losses at one point, whatever their weights; ``LossHead`` mixes it by the controls for the inner
loop and the adjoint, ``mixture_loss`` for autograd users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from palf_dist.contrastive import Contrast
from palf_dist.early_learning import EarlyLearning
from palf_dist.logit_losses import LOGIT_LOSSES, LogitLoss, Number, Own
from palf_dist.losses import Controls, LossContext, column
from palf_dist.own_losses import refuse_own
from palf_dist.types import BASIS_LOSSES, CONTROLS

Weights = Mapping[str, Tensor]
"""Weight of each active basis loss in the sum over examples: [G, n], or [G, 1] where all examples share it."""


_FEW_CLASSES = 16  # of float32 fill a vector register of a CPU


def both_softmaxes(z: Tensor) -> tuple[Tensor, Tensor]:
    """log p and p of logits [G, n, C]; exp(log p) would be ten times slower where p underflows, as on padded classes.

    Of few classes with all values of one class side by side in memory: torch's kernel for the last dimension takes
    fewer classes than fill a register one by one, which is up to fifteen times as slow.
    """
    if z.shape[-1] >= _FEW_CLASSES:
        return torch.log_softmax(z, -1), torch.softmax(z, -1)
    by_class = z.mT.contiguous()
    return torch.log_softmax(by_class, -2).mT, torch.softmax(by_class, -2).mT


class Softmax:
    """A softmax [G, n, C] and the own-label entries of it."""

    def __init__(self, z: Tensor, y: Tensor) -> None:
        self.y = y[..., None]
        self.log_p, self.p = both_softmaxes(z)
        self.own = Own(self.own_entry(self.log_p))

    def own_entry(self, a: Tensor) -> Tensor:
        """Entries of a [G, n, C] at the labels, [G, n]."""
        return a.gather(-1, self.y)[..., 0]

    def pull(self, at_label: Tensor, scale: Tensor) -> Tensor:
        """at_label * Y - scale * p, with at_label [G, n], scale [G, n, 1 or C]."""
        return (self.p * -scale).scatter_add_(-1, self.y, at_label[..., None])

    def centre(self, a: Tensor) -> Tensor:
        """Directional derivative of log p along a [G, n, C]."""
        return a - (self.p * a).sum(-1, keepdim=True)


class Target(NamedTuple):
    """A distribution that takes a part of the given label's place: it adds strength * sum_c t_c (z_y - z_c) to
    cross-entropy, which is linear in the logits."""

    control: str  # that sets the strength
    rate: float  # of the strength in that control
    strength: Tensor  # [G, 1]
    t: Tensor  # [G, 1 or n, C], 0 on padded classes
    mass: Tensor | float  # sum of t over the classes: [G, n], or 1

    def above(self, own: Tensor, a: Tensor) -> Tensor:
        """sum_c t_c (a_y - a_c) [G, n] of a [G, n, C], whose entries at the labels are ``own``."""
        return self.mass * own - (a * self.t).sum(-1)


class Directional(NamedTuple):
    """Derivatives along a direction; the last two are per example and sum to those of <gradient, direction>."""

    dlogits: Tensor  # [G, n, C]
    dfeatures: Tensor | None  # [G, n, D]
    losses: dict[str, Tensor]  # of each basis loss, not weighted, [G, n]
    controls: dict[str, Tensor]  # weighted, by control, [G, n]


class Evaluation:
    """The active basis losses at logits z [G, n, C], labels y [G, n], features h [G, n, D]."""

    def __init__(
        self,
        active: tuple[str, ...],
        z: Tensor,
        y: Tensor,
        h: Tensor | None,
        controls: Controls,
        context: LossContext,
        plain: Softmax | None = None,
    ) -> None:
        """``plain``: the softmax of the logits themselves, where the caller has it."""
        if plain is not None:
            self.plain = plain
        self.active, self.controls, self.context, self.y = active, controls, context, y
        self.z = z
        self.adjusted = context.adjusted and "robust_ce" in active
        self.contrast: Contrast | None = None
        if "info_nce" in active:
            assert h is not None, "info_nce reads features"
            self.contrast = Contrast(h, y, column(controls, "tau"))
        self._last: tuple[Weights, list[Tensor]] | None = None
        # basis losses by the softmax they read
        self.groups: list[tuple[Softmax, dict[str, LogitLoss]]] = []
        logit_losses = [name for name in active if name in LOGIT_LOSSES]
        of_plain = [name for name in logit_losses if not (self.adjusted and name == "robust_ce")]
        if of_plain:
            self.groups.append((self.plain, self._losses(self.plain, of_plain)))
        self.targets = self._targets()
        self.early: EarlyLearning | None = None
        if "elr" in active and context.averaged is not None:
            self.early = EarlyLearning(self.plain.p, context.averaged)
        if self.adjusted:
            adjusted = self._softmax(column(controls, "la") * context.log_prior_ratio)
            self.groups.append((adjusted, self._losses(adjusted, ["robust_ce"])))

    def _losses(self, softmax: Softmax, names: list[str]) -> dict[str, LogitLoss]:
        return {name: LOGIT_LOSSES[name](softmax.own, self.controls, self.context) for name in names}

    def _softmax(self, offset: Tensor | None) -> Softmax:
        """Softmax of the logits plus offset [G, C], over the real classes."""
        padding = self.context.padding
        if padding is not None:
            offset = padding if offset is None else offset + padding
        return Softmax(self.z if offset is None else self.z + offset[:, None, :], self.y)

    @cached_property
    def plain(self) -> Softmax:
        """The softmax of the logits themselves, without prior adjustment."""
        return self._softmax(None)

    def _targets(self) -> dict[str, Target]:
        """By basis loss: what label smoothing and bootstrapping add to CE."""
        found, averaged = {}, self.context.averaged
        if "label_smoothing" in self.active:
            found["label_smoothing"] = Target("eps", 1.0, column(self.controls, "eps"), self.context.uniform, 1.0)
        if "bootstrap" in self.active and averaged is not None:
            share = 1 - column(self.controls, "beta")
            found["bootstrap"] = Target("beta", -1.0, share, averaged, averaged.sum(-1))
        return found

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Name and per-example value [G, n] of each active loss."""
        for softmax, losses in self.groups:
            for name, loss in losses.items():
                value = loss.value
                if (target := self.targets.get(name)) is not None:
                    value = value + target.strength * target.above(softmax.own.log_p, softmax.log_p)
                if name == "elr" and self.early is not None:
                    value = value + column(self.controls, "lam") * self.early.value
                yield name, value
        if self.contrast is not None:
            yield "info_nce", self.contrast.value

    def _slopes(self, weights: Weights) -> list[Tensor]:
        """sum_k weight_k F_k' [G, n] over the losses of each group; made once for the weights asked for last."""
        if self._last is None or self._last[0] is not weights:
            totals = [_total((weights[name], loss.slope) for name, loss in losses.items()) for _, losses in self.groups]
            self._last = weights, [total.expand_as(self.y) for total in totals]
        return self._last[1]

    def gradient(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        """Gradient of sum_i sum_k weight_ki l_ki in logits [G, n, C] and features [G, n, D]."""
        dlogits = None
        for (softmax, losses), slope in zip(self.groups, self._slopes(weights), strict=True):
            given = {name: target for name, target in self.targets.items() if name in losses}
            moved = [(weights[name] * target.strength, target) for name, target in given.items()]
            at_label = sum((share * target.mass for share, target in moved), start=slope)
            part = softmax.pull(at_label, slope[..., None])
            for share, target in moved:
                part = part - share[..., None] * target.t
            if self.early is not None and "elr" in losses:
                part = part + self.early.gradient(weights["elr"] * column(self.controls, "lam"))
            dlogits = part if dlogits is None else dlogits + part
        if dlogits is None:
            dlogits = torch.zeros_like(self.z)
        return dlogits, None if self.contrast is None else self.contrast.gradient(weights["info_nce"])

    def control_gradient(self, weights: Weights) -> dict[str, Tensor]:
        """Per-example derivatives [G, n] of sum_k weight_ki l_ki in the loss hyper-parameters."""
        result: dict[str, Tensor] = {}
        for softmax, losses in self.groups:
            for name, loss in losses.items():
                for control, value in loss.value_controls().items():
                    result[control] = weights[name] * value
                if (target := self.targets.get(name)) is not None:
                    margin = target.above(softmax.own.log_p, softmax.log_p)
                    result[target.control] = weights[name] * target.rate * margin
                if name == "robust_ce" and self.adjusted:
                    shift = softmax.centre(self.context.log_prior_ratio[:, None, :])
                    result["la"] = weights[name] * loss.slope * softmax.own_entry(shift)
        if self.early is not None:
            result["lam"] = weights["elr"] * self.early.value
        if self.contrast is not None:
            result["tau"] = self.contrast.tau_gradient(weights["info_nce"])
        return result

    def tangent(self, weights: Weights, z_dot: Tensor, h_dot: Tensor | None) -> Directional:
        """Directional derivatives along (z_dot [G, n, C], h_dot [G, n, D]) at fixed controls."""
        dlogits, dfeatures = None, None
        along: dict[str, Tensor] = {}
        controls: dict[str, Tensor] = {}
        for (softmax, losses), slope in zip(self.groups, self._slopes(weights), strict=True):
            centred = softmax.centre(z_dot)
            own_dot = softmax.own_entry(centred)
            for name, loss in losses.items():
                along[name] = loss.slope * own_dot
                for control, value in loss.slope_controls().items():
                    controls[control] = weights[name] * value * own_dot
                if (target := self.targets.get(name)) is not None:
                    margin_dot = target.above(own_dot, centred)
                    along[name] = along[name] + target.strength * margin_dot
                    controls[target.control] = weights[name] * target.rate * margin_dot
            slope_dot = _total((weights[name], loss.curvature) for name, loss in losses.items()) * own_dot
            part = softmax.pull(slope_dot, torch.addcmul(slope_dot[..., None], slope[..., None], centred))
            if self.adjusted and "robust_ce" in losses:
                controls["la"] = (part * self.context.log_prior_ratio[:, None, :]).sum(-1)
            if self.early is not None and "elr" in losses:
                strength = column(self.controls, "lam")
                early_dot, early_along = self.early.tangent(weights["elr"] * strength, centred)
                part = part + early_dot
                along["elr"] = along["elr"] + strength * early_along
                controls["lam"] = weights["elr"] * early_along
            dlogits = part if dlogits is None else dlogits + part
        if dlogits is None:
            dlogits = torch.zeros_like(z_dot)
        if self.contrast is not None:
            assert h_dot is not None, "info_nce reads features"
            dfeatures, along["info_nce"], controls["tau"] = self.contrast.tangent(weights["info_nce"], h_dot)
        return Directional(dlogits, dfeatures, along, controls)


def _total(terms: Iterator[tuple[Tensor, Number]]) -> Tensor:
    """Sum of the products."""
    first, *rest = (weight * number for weight, number in terms)
    return sum(rest, start=first)


@dataclass(frozen=True)
class HeadTape:
    """One evaluation of the adaptive loss: what the inner loop reads of it, and what its derivatives need."""

    evaluation: Evaluation
    weights: Weights  # alpha_k / n [G, 1]
    dlogits: Tensor  # [G, n, C] gradient of sum_g (1/n) sum_i sum_k alpha_k l_k
    dfeatures: Tensor | None  # [G, n, D], where info_nce is active

    @cached_property
    def losses(self) -> Tensor:
        """Per-example basis losses [K, G, n]; rows of inactive losses are zero."""
        rows = dict(self.evaluation.values())
        zero = torch.zeros_like(self.evaluation.z[..., 0])
        return torch.stack([rows.get(name, zero) for name in BASIS_LOSSES])

    @property
    def mixture(self) -> Tensor:
        """The adaptive loss [G]: (1/n) sum_i sum_k alpha_k l_k."""
        return sum((self.weights[name] * value).sum(1) for name, value in self.evaluation.values())  # type: ignore[return-value]

    def _controls(self, per_example: dict[str, Tensor]) -> Tensor:
        """Sums over the examples as [G, U], zero where nothing is named."""
        sums = torch.stack([*per_example.values()], 1).sum(-1)
        given = dict(zip(per_example, sums.unbind(1), strict=True))
        zero = sums.new_zeros(len(sums))
        return torch.stack([given.get(name, zero) for name in CONTROLS], 1)


class LossHead:
    """The adaptive loss of a group of tasks, with fixed active basis losses (names of ``types.BASIS_LOSSES``)."""

    def __init__(self, active: tuple[str, ...]) -> None:
        refuse_own(active, "active_basis")
        assert active and set(active) <= set(BASIS_LOSSES), active
        self.active = active

    @torch.no_grad()
    def forward(self, z: Tensor, y: Tensor, h: Tensor | None, controls: Controls, context: LossContext) -> HeadTape:
        """Evaluate at logits z [G, n, C], labels y [G, n], features h [G, n, D], controls [G, U]."""
        evaluation = Evaluation(self.active, z, y, h, controls, context)
        weights = {name: column(controls, name) / y.shape[1] for name in self.active}
        return HeadTape(evaluation, weights, *evaluation.gradient(weights))

    @torch.no_grad()
    def tangent(self, tape: HeadTape, z_dot: Tensor, h_dot: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Directional derivative of (dlogits, dfeatures) along (z_dot, h_dot) at fixed controls.

        Returns:
            its two parts, and d / d controls [G, U] of <dlogits, z_dot> + <dfeatures, h_dot> of each task.
        """
        along = tape.evaluation.tangent(tape.weights, z_dot, h_dot)
        n = z_dot.shape[1]
        per_example = {name: value / n for name, value in along.losses.items()} | along.controls
        return along.dlogits, along.dfeatures, tape._controls(per_example)

    @torch.no_grad()
    def control_gradient(self, tape: HeadTape) -> Tensor:
        """d / d controls [G, U] of the mixture value (1/n) sum_i sum_k alpha_k l_k of each task."""
        n = tape.dlogits.shape[1]
        per_example = {name: value / n for name, value in tape.evaluation.values()}
        return tape._controls(per_example | tape.evaluation.control_gradient(tape.weights))
