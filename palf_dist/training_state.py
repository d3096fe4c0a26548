"""The training state s_t: what a policy reads. The six features of equation (6), made dimensionless, and the named
extended ones of METHODS part 6. The same code serves meta-training (G tasks at once) and AdaptiveLoss (G = 1).

A feature that is not known (no gradient yet, no validation rows, no example index) is NaN; normalisation maps NaN to
0, the frozen mean. No gradient flows through any feature, in any estimator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.loss_head import both_softmaxes
from palf_dist.randomness import random_generator
from palf_dist.types import InnerModel, Rows

PAPER_FEATURES = ("gradient_norm", "hessian_trace", "entropy", "loss", "loss_variance", "time")
"""Equation (6): ||grad L||^2 and tr(H) on a signed log scale, H[p(y|x)] / log k, E[l] / log k, Var[l], t / T."""

TASK_FEATURES = ("log_rows", "log_classes", "imbalance", "prior_shift")
"""Constant over a run: log n, log k, entropy of the label frequencies / log k, mean |log pi_train / pi_target|."""

NOISE_FEATURES = ("accuracy", "noise_rate", "disagreement", "bimodality")
"""Noise-revealing: batch accuracy; maximum-likelihood rate of uniform label noise given the averaged predictions;
share of examples whose averaged prediction disagrees with the label; Otsu's bimodality of their losses."""

NEIGHBOUR_FEATURES = ("neighbour_agreement",)
"""Leave-one-out label agreement of the 5 nearest neighbours in input space; numeric inputs only."""

VALIDATION_FEATURES = ("validation_loss", "validation_accuracy", "loss_gap", "accuracy_gap", "validation_noise_rate")

SNAPSHOTS = "snapshots"
"""Not a feature of one moment: a policy whose ``features`` are this alone reads, in place of them, the snapshots of all
refreshes of the run so far, [G, n, 1 + K]: the validation error, then the mean of each of its K active basis losses."""

FEATURES = PAPER_FEATURES + TASK_FEATURES + NOISE_FEATURES + NEIGHBOUR_FEATURES + VALIDATION_FEATURES

SMOOTHING = 0.4  # weight of the past in the moving averages of batch statistics
CLAMP = 4.0  # normalised features are clamped to +- this many standard deviations
HUTCHINSON_ROWS = 8  # sub-batch of the trace
HUTCHINSON_PROBES = 4
_NEIGHBOUR_ROWS = 256  # whose neighbours are looked for at once: their similarities to all rows are held
_NOISE_GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def check_features(names: Sequence[str]) -> None:
    """Refuse unknown feature names, naming what is allowed."""
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        raise ConfigError(f"policy.features: unknown {', '.join(unknown)}; allowed: {', '.join(FEATURES)}")


@dataclass(frozen=True)
class TaskFacts:
    """What is known of each task before training starts; the source of the constant features."""

    class_mask: Tensor  # [G, C] bool
    class_frequencies: Tensor  # [G, C] of the training labels, sums to 1; NaN row where unknown
    train_sizes: Tensor  # [G]; NaN where unknown
    log_prior_ratio: Tensor  # [G, C]
    neighbour_agreement: Tensor | None = None  # [G]


class RowStatistics(NamedTuple):
    """Of each row of a minibatch, [G, B] each."""

    entropy: Tensor
    loss: Tensor  # cross-entropy
    right: Tensor  # 1 where the likeliest class is the label

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, class_mask: Tensor) -> RowStatistics:
        """Of logits [G, B, C] and labels [G, B]."""
        masked = logits.masked_fill(~class_mask[:, None, :], -1e9)
        log_p, p = both_softmaxes(masked)
        loss = -log_p.gather(2, labels[:, :, None])[:, :, 0]
        # clamped, since 0 times -inf, the logit of a class that somebody rules out, would be NaN
        entropy = -(p * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
        return cls(entropy, loss, (log_p.argmax(-1) == labels).to(loss.dtype))


@dataclass(frozen=True)
class Observation:
    """What is seen at one refresh. Optional parts may be missing; their features are then NaN."""

    time: float  # t / T
    minibatch: RowStatistics  # of the current one
    averaged: Tensor | None = None  # [G, N, C] averaged predictions of the training rows
    averaged_labels: Tensor | None = None  # [G, N]
    averaged_mask: Tensor | None = None  # [G, N] bool: rows that count (real, and seen at least once or at their prior)
    gradient_norm2: Tensor | None = None  # [G] squared norm of the previous step's gradient
    hessian_trace: Tensor | None = None  # [G]
    validation_logits: Tensor | None = None  # [G, V, C]
    validation_labels: Tensor | None = None  # [G, V]
    validation_mask: Tensor | None = None  # [G, V]


class StateReader:
    """Turns observations into features [G, S]; carries the moving averages of the batch statistics [G, 4]."""

    def __init__(self, names: Sequence[str], facts: TaskFacts) -> None:
        check_features(names)
        self.names = tuple(names)
        self.facts = facts
        self.statistics: Tensor | None = None  # moving averages of entropy, loss, loss variance, accuracy
        self._log_k = facts.class_mask.sum(1).to(facts.log_prior_ratio.dtype).log()
        self._constant = _task_features(facts, self._log_k)

    @torch.no_grad()
    def read(self, seen: Observation) -> Tensor:
        """Raw features [G, S] in the order of ``names``."""
        values = dict(self._constant)
        unknown = torch.full_like(self._log_k, math.nan)
        entropy, loss, variance, accuracy = self._batch_statistics(seen).unbind(1)
        values["time"] = torch.full_like(self._log_k, seen.time)
        values["entropy"] = entropy
        values["loss"] = loss.clamp_max(20.0).log1p()
        values["loss_variance"] = variance
        values["accuracy"] = accuracy
        if seen.gradient_norm2 is not None:
            values["gradient_norm"] = (seen.gradient_norm2 + 1e-12).log()
        if seen.hessian_trace is not None:
            values["hessian_trace"] = seen.hessian_trace.sign() * seen.hessian_trace.abs().log1p()
        if seen.averaged is not None and {"noise_rate", "disagreement", "bimodality"} & set(self.names):
            values |= self._noise_features(seen)
        if seen.validation_logits is not None:
            values |= self._validation_features(seen, values["loss"], accuracy)
        columns = [values.get(name, unknown) for name in self.names]
        return torch.stack(columns, 1) if columns else unknown.new_empty(len(unknown), 0)

    def _batch_statistics(self, seen: Observation) -> Tensor:
        entropy, loss, right = seen.minibatch
        variance = loss.var(1, unbiased=False).log1p()
        now = torch.stack([entropy.mean(1) / self._log_k, loss.mean(1) / self._log_k, variance, right.mean(1)], 1)
        if self.statistics is not None:
            past = torch.where(self.statistics.isnan(), now, self.statistics)  # as after logits that were not finite
            now = SMOOTHING * past + (1 - SMOOTHING) * now
        self.statistics = now
        return now

    def _noise_features(self, seen: Observation) -> dict[str, Tensor]:
        assert seen.averaged is not None and seen.averaged_labels is not None and seen.averaged_mask is not None
        labels, mask = seen.averaged_labels, seen.averaged_mask
        own = seen.averaged.gather(2, labels[:, :, None])[:, :, 0]
        wrong = (seen.averaged.argmax(-1) != labels) & mask
        return {
            "noise_rate": likely_noise_rate(own, mask, self._log_k.exp()),
            "disagreement": wrong.sum(1) / mask.sum(1).clamp_min(1),
            "bimodality": bimodality(-own.clamp_min(1e-4).log(), mask),
        }

    def _validation_features(self, seen: Observation, train_loss: Tensor, accuracy: Tensor) -> dict[str, Tensor]:
        assert seen.validation_logits is not None
        assert seen.validation_labels is not None and seen.validation_mask is not None
        masked = seen.validation_logits.masked_fill(~self.facts.class_mask[:, None, :], -1e9)
        log_p = torch.log_softmax(masked, -1)
        own = log_p.gather(2, seen.validation_labels[:, :, None])[:, :, 0]
        weight = seen.validation_mask / seen.validation_mask.sum(1, keepdim=True).clamp_min(1)
        loss = (-(own * weight).sum(1) / self._log_k).clamp_max(20.0).log1p()
        right = ((log_p.argmax(-1) == seen.validation_labels) * weight).sum(1)
        rate = likely_noise_rate(own.exp(), seen.validation_mask > 0, self._log_k.exp())
        return {
            "validation_loss": loss,
            "validation_accuracy": right,
            "loss_gap": loss - train_loss,
            "accuracy_gap": accuracy - right,
            "validation_noise_rate": rate,
        }


def normalise(state: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(state - mean) / std with unknown (NaN) entries at 0, clamped to +-4; any leading shape."""
    return torch.nan_to_num((state - mean) / std, nan=0.0).clamp(-CLAMP, CLAMP)


def likely_noise_rate(own: Tensor, mask: Tensor, num_classes: Tensor) -> Tensor:
    """Posterior mean [G], on a flat grid, of the rate e of uniform label noise when the model gives an example's own
    label probability own [G, N]: the label has likelihood (1 - e) own + e / k."""
    grid = torch.tensor(_NOISE_GRID, dtype=own.dtype, device=own.device)
    likelihood = (1 - grid) * own[..., None] + grid / num_classes[:, None, None] + 1e-6
    log_likelihood = (likelihood.log() * mask[..., None]).sum(1)
    return torch.softmax(log_likelihood, -1) @ grid


def bimodality(losses: Tensor, mask: Tensor) -> Tensor:
    """Otsu's criterion [G]: share of the variance of losses [G, N] that the best split in two explains."""
    rows = losses.shape[1]
    real = mask.to(losses.dtype)
    known = real.sum(1, keepdim=True)
    count = known.clamp_min(1)
    ordered = losses.masked_fill(~mask, math.inf).sort(1)[0]
    rank = torch.arange(1, rows + 1, dtype=losses.dtype, device=losses.device)[None]
    inside = rank <= known
    ordered = torch.where(inside, ordered, torch.zeros_like(ordered))
    cumulative = ordered.cumsum(1)
    total = cumulative[:, -1:]
    share = rank / count
    low, high = cumulative / rank, (total - cumulative) / (count - rank).clamp_min(1)
    between = torch.where(rank < count, share * (1 - share) * (low - high) ** 2, torch.zeros_like(low))
    variance = ((ordered - total / count) ** 2 * inside).sum(1) / count[:, 0]
    return between.max(1)[0] / (variance + 1e-4)


def neighbour_agreement(train: Rows, neighbours: int = 5) -> Tensor | None:
    """Mean leave-one-out agreement [G] of a row's label with its nearest neighbours by cosine similarity of the first
    input, when that is numeric; None otherwise. NaN for a task of one row."""
    column = train.inputs[0]
    if not column.is_floating_point():
        return None
    flat = column.flatten(2)
    unit = flat / (flat.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    real = train.mask > 0
    # task by task and without its padding: the similarities are quadratic in the rows, and few at a time stay in cache
    tasks = zip(unit, train.labels, real, strict=True)
    return torch.stack([_agreement(rows[kept], labels[kept], neighbours) for rows, labels, kept in tasks])


def _agreement(unit: Tensor, labels: Tensor, neighbours: int) -> Tensor:
    """The same [] of one task: unit vectors [n, D] and labels [n]."""
    parts = []
    for first in range(0, len(unit), _NEIGHBOUR_ROWS):
        some = unit[first : first + _NEIGHBOUR_ROWS]
        similarity = some @ unit.T
        similarity.diagonal(offset=first).fill_(-9.0)
        nearest = similarity.topk(min(neighbours, len(unit) - 1), -1)[1]
        parts.append(labels[nearest] == labels[first : first + _NEIGHBOUR_ROWS, None])
    return torch.cat(parts).to(unit.dtype).mean()


def hutchinson_probes(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Banked Rademacher probes [HUTCHINSON_PROBES, size], drawn once (drawing anew costs more than using them)."""
    signs = random_generator("hutchinson", seed).integers(0, 2, (HUTCHINSON_PROBES, size))
    return torch.from_numpy(2.0 * signs - 1.0).to(dtype)


@torch.no_grad()
def hessian_trace(
    model: InnerModel, theta: Tensor, inputs: tuple[Tensor, ...], labels: Tensor, class_mask: Tensor, probes: Tensor
) -> Tensor:
    """Hutchinson's estimate [G] of the trace of the Hessian of the mean cross-entropy over the given rows.

    probes [Q, P] of +-1 entries: mean over q of probes_q^T H probes_q, which is exact where H is diagonal.
    """
    logits, _, tape = model.forward(theta, inputs)
    p = torch.softmax(logits.masked_fill(~class_mask[:, None, :], -1e9), -1)
    rows = labels.shape[1]
    dlogits = p.scatter_add(2, labels[:, :, None], -torch.ones_like(labels, dtype=p.dtype)[:, :, None]) / rows
    total = torch.zeros_like(theta[:, 0])
    for probe in probes:
        v = probe.expand_as(theta).contiguous()
        tangent, _, tangent_tape = model.tangent(theta, tape, v)
        dtangent = p * (tangent - (p * tangent).sum(-1, keepdim=True)) / rows
        product = model.backward_tangent(theta, tape, tangent_tape, v, dlogits, None, dtangent, None)
        total = total + (product * v).sum(1)
    return total / len(probes)


def _task_features(facts: TaskFacts, log_k: Tensor) -> dict[str, Tensor]:
    frequencies = facts.class_frequencies
    entropy = -(frequencies * (frequencies + 1e-9).log()).sum(1) / log_k
    shift = (facts.log_prior_ratio.abs() * facts.class_mask).sum(1) / log_k.exp()
    values = {
        "log_rows": facts.train_sizes.to(log_k.dtype).log(),
        "log_classes": log_k,
        "imbalance": entropy.to(log_k.dtype),
        "prior_shift": shift,
    }
    if facts.neighbour_agreement is not None:
        values["neighbour_agreement"] = facts.neighbour_agreement
    return values
