"""The basis losses of equation (4) as plain formulas, and the per-task facts they need.

These formulas are the specification: autograd differentiates them in the reference estimator and in the tests. The
hot path uses the closed forms of ``loss_head``, which give the same numbers without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from palf_dist.types import BASIS_LOSSES, BASIS_PARTS, CONTROL_INDEX, CONTROLS, HYPERPARAMETERS

Made = TypeVar("Made")

MASKED_LOGIT = -1e9  # finite on purpose: -inf times zero is NaN in label smoothing and entropies
FOCAL_FLOOR = 1e-4  # 1 - p_y in the focal power: a non-integer gamma has no derivative at 0
REVERSE_CLIP = 4.0  # -A of the reverse cross-entropy, A = log 0 clipped to -4
NORM_FLOOR = 1e-6  # under the root of the feature norm: the gradient at a zero feature stays bounded
NOISE_FLOOR = 1e-30  # added to e / k, so that e = 0 has finite derivatives even where r_y underflows
OWN_FLOOR = 1e-6  # averaged own-label probability in the posterior weights
WEIGHT_FLOOR = 0.05  # of the batch mean that normalises the posterior weights
UNSEEN_WEIGHT = 0.5  # posterior weight of an example without an averaged prediction yet
EXPONENT_FLOOR = 0.01  # q of the generalised cross-entropy: there it is cross-entropy, up to 0.5 % of a loss of 1
AGREEMENT_SHARE = 1 - 1e-4  # of <p, t> in the early-learning term, whose logarithm stays finite where p = t = 1


@dataclass(frozen=True)
class LossContext:
    """What the losses know of each task besides the batch. Made by ``create``, once for a group of tasks."""

    class_mask: Tensor  # [G, C] bool, True on real classes
    num_classes: Tensor  # [G] number of real classes k, floating point
    log_prior_ratio: Tensor  # [G, C] log(pi_train / pi_target), 0 on padding
    uniform: Tensor  # [G, 1, C] 1 / k on real classes, 0 on padding
    padding: Tensor | None  # [G, C] MASKED_LOGIT on padding and 0 elsewhere; None where no class is padding
    adjusted: bool  # some log_prior_ratio is not zero
    own_probability: Tensor | None = None  # [G, n] averaged probability of each example's own label; no gradient
    seen: Tensor | None = None  # [G, n] bool: that average has been updated at least once
    averaged: Tensor | None = None  # [G, n, C] averaged predictions, 0 on padding and where not seen; no gradient

    @classmethod
    def create(cls, class_mask: Tensor, log_prior_ratio: Tensor) -> LossContext:
        """Context without averaged predictions; add them for each batch by ``with_averages``.

        What the hot path may skip is decided here, so that a step never waits for the device to tell.
        """
        num_classes = class_mask.sum(1).to(log_prior_ratio.dtype)
        return cls(
            class_mask,
            num_classes,
            log_prior_ratio,
            uniform=(class_mask / num_classes[:, None])[:, None, :],
            padding=None if bool(class_mask.all()) else (~class_mask).to(log_prior_ratio.dtype) * MASKED_LOGIT,
            adjusted=bool((log_prior_ratio != 0).any()),
        )

    def with_averages(self, own_probability: Tensor, seen: Tensor, averaged: Tensor | None = None) -> LossContext:
        """The same tasks with the averages of one batch: own-label probabilities and whether there are any, [G, n]
        each; and the whole predictions [G, n, C], for ``types.AVERAGED_BASIS``."""
        if averaged is not None:
            averaged = torch.where(seen[..., None], averaged.detach(), 0.0)
        return replace(self, own_probability=own_probability.detach(), seen=seen, averaged=averaged)

    def recalling(self, averaged: Tensor, seen: Tensor, y: Tensor, whole: bool) -> LossContext:
        """``with_averages`` of one task: averaged predictions [n, C], all of which the losses read if ``whole``, else
        those of the own labels; whether there are any [n]; labels [n]."""
        averaged = averaged.to(self.num_classes.dtype)
        return self.with_averages(averaged.gather(1, y[:, None]).mT, seen[None], averaged[None] if whole else None)


class Columns(dict[str, Tensor]):
    """Controls [G, U] taken apart for the steps that share them: each by its name [G, 1]."""

    @classmethod
    def of(cls, controls: Tensor, names: Sequence[str] = CONTROLS) -> Columns:
        return cls(zip(names, controls.split(1, 1), strict=True))

    def once(self, make: Callable[[Columns, LossContext], Made], context: LossContext) -> Made:
        """What ``make`` makes of them and of tasks that stay the same; made for the first of these steps."""
        if make not in self._made:
            self._made[make] = make(self, context)
        return self._made[make]

    def among_all(self, own: LossContext, joint: LossContext) -> Columns:
        """Those for the rows of one rank, with which posterior weights are relative to the mean over all ranks."""
        own_mean, joint_mean = (mean_belief(posterior_belief(of, self["ew"])) for of in (own, joint))
        return Columns(self | {"robust_ce": self["robust_ce"] * (own_mean / joint_mean)})

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}


Controls = Tensor | Columns
"""Controls [G, U] (types.CONTROLS), or the columns of them."""


def column(controls: Controls, name: str) -> Tensor:
    """One control as [G, 1]."""
    return controls.narrow(1, CONTROL_INDEX[name], 1) if isinstance(controls, Tensor) else controls[name]


def positive_pairs(y: Tensor) -> tuple[Tensor, Tensor]:
    """Same-label pairs of each batch as bool [G, n, n], self excluded, and the self mask [n, n]."""
    itself = torch.eye(y.shape[1], dtype=torch.bool, device=y.device)
    return (y[:, :, None] == y[:, None, :]) & ~itself, itself


def posterior_weights(context: LossContext, ew: Tensor) -> Tensor | float:
    """w_i [G, n]: ``posterior_belief`` divided by its batch mean. 1 without averages."""
    if context.own_probability is None:
        return 1.0
    belief = posterior_belief(context, ew)
    return belief / mean_belief(belief)


def posterior_belief(context: LossContext, ew: Tensor) -> Tensor:
    """Belief [G, n] that example i carries its true label, from its average.

    ew [G, 1] is the noise rate believed in; the belief is differentiable in it.
    """
    assert context.own_probability is not None and context.seen is not None
    own = (1 - ew) * context.own_probability.clamp_min(OWN_FLOOR)
    belief = own / (own + ew / context.num_classes[:, None])
    return torch.where(context.seen, belief, UNSEEN_WEIGHT)


def mean_belief(belief: Tensor) -> Tensor:
    """What posterior weights are divided by [G, 1]."""
    return belief.mean(1, keepdim=True).clamp_min(WEIGHT_FLOOR)


def reference_losses(
    z: Tensor, y: Tensor, h: Tensor | None, controls: Tensor, context: LossContext, active: tuple[str, ...]
) -> Tensor:
    """Per-example basis losses [K, G, n]; rows of inactive losses are zero.

    Args:
        z: logits [G, n, C].
        y: labels [G, n] int64.
        h: features [G, n, D]; only info_nce reads them.
        controls: [G, U], columns in the order of ``types.CONTROLS``.
        context: facts of the G tasks.
        active: names of the basis losses to evaluate.
    """
    control = {name: column(controls, name) for name in HYPERPARAMETERS}
    z = z.masked_fill(~context.class_mask[:, None, :], MASKED_LOGIT)
    log_p = torch.log_softmax(z, -1)
    own = log_p.gather(-1, y[..., None])[..., 0]
    k = context.num_classes[:, None]
    rows: dict[str, Tensor] = {"ce": -own}
    if "focal" in active:
        rest = (-torch.expm1(own)).clamp_min(FOCAL_FLOOR)
        # not rest ** gamma: at gamma = 0 torch drops the mixed second derivative of pow
        rows["focal"] = -torch.exp(control["gamma"] * rest.log()) * own
    if "label_smoothing" in active:
        spread = -(log_p * context.uniform).sum(-1)
        rows["label_smoothing"] = (1 - control["eps"]) * -own + control["eps"] * spread
    if "symmetric_ce" in active:
        rows["symmetric_ce"] = control["a"] * -own + control["b"] * REVERSE_CLIP * (1 - own.exp())
    if "info_nce" in active:
        assert h is not None, "info_nce reads features"
        f = h * torch.rsqrt((h * h).sum(-1, keepdim=True) + NORM_FLOOR)
        positive, itself = positive_pairs(y)
        similarity = f @ f.transpose(1, 2) / control["tau"][..., None]
        log_q = torch.log_softmax(similarity.masked_fill(itself, MASKED_LOGIT), -1)
        rows["info_nce"] = -(positive * log_q).sum(-1) / positive.sum(-1).clamp_min(1)
    if "robust_ce" in active:
        log_r = torch.log_softmax(z + (control["la"] * context.log_prior_ratio)[:, None, :], -1)
        kept = log_r.gather(-1, y[..., None])[..., 0] + torch.log1p(-control["e"])
        log_noise = torch.log((control["e"] + NOISE_FLOOR) / k)
        # logaddexp(kept, log_noise): torch's own has no finite second derivative far from zero
        log_m = torch.logsumexp(torch.stack(torch.broadcast_tensors(kept, log_noise)), 0)
        rows["robust_ce"] = posterior_weights(context, control["ew"]) * -log_m
    if "generalised_ce" in active:
        q = control["q"].clamp_min(EXPONENT_FLOOR)
        rows["generalised_ce"] = -torch.expm1(q * own) / q
    if "mae" in active:
        rows["mae"] = 2 * (1 - own.exp())
    if "elr" in active:
        rows["elr"] = -own
        if context.averaged is not None:
            agreement = (log_p.exp() * context.averaged).sum(-1)
            rows["elr"] = control["lam"] * torch.log1p(-AGREEMENT_SHARE * agreement) - own
    if "bootstrap" in active:
        rows["bootstrap"] = -own
        if context.averaged is not None:  # -(beta y + (1 - beta) t) log p, the targets t having sum 1
            gap = (context.averaged * (own[..., None] - log_p)).sum(-1)
            rows["bootstrap"] = (1 - control["beta"]) * gap - own
    zero = torch.zeros_like(own)
    return torch.stack([rows[name] if name in active else zero for name in BASIS_LOSSES])


def reference_mixture(
    z: Tensor, y: Tensor, h: Tensor | None, controls: Tensor, context: LossContext, active: tuple[str, ...]
) -> Tensor:
    """The adaptive loss [G]: mean over the batch of sum_k alpha_k l_k. Arguments as ``reference_losses``."""
    losses = reference_losses(z, y, h, controls, context, active)
    sums = [torch.einsum("gk,kgn->g", controls[:, part], losses[part]) for part in BASIS_PARTS]
    return torch.stack(sums).sum(0) / y.shape[1]
