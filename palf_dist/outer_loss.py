"""The outer loss: what the meta-learner minimises over phi. Most of it is read on clean meta-validation rows at
checkpoints along the inner run and at its end; the complexity of the losses is read off the mixture weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from palf_dist.config import OuterLossConfig
from palf_dist.types import BASIS_PARTS


def outer_terms(
    config: OuterLossConfig, logits: Tensor, features: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor
) -> dict[str, Tensor]:
    """The terms [G] of the outer loss at one checkpoint, before their weights; those of equation (3) where
    ``information`` weighs them.

    - validation: ``validation_loss``. - information: I(Yhat; Y) in nats. - cross_entropy: E[l], l being plain
    cross-entropy, the reference of every adaptive loss: one yardstick whatever mixture the inner model minimised. It is
      also the V whose rises ``stability`` weighs.
    - gradient_variance: Var[grad l] over examples, of the gradient with respect to the last layer.

    Args:
        logits: [G, V, C]. features: [G, V, D], what the last layer reads; only gradient_variance needs them.
        labels: [G, V]. mask: [G, V], 1 on real rows. class_mask: [G, C], True on real classes.
    """
    terms = {"validation": validation_loss(config, logits, labels, mask, class_mask)}
    if not (config.information or config.stability):
        return terms
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    log_p = torch.log_softmax(logits.masked_fill(~class_mask[:, None, :], -1e9), -1)
    p, truth = log_p.exp(), torch.zeros_like(log_p).scatter(2, labels[:, :, None], 1.0)
    if config.information:
        terms["information"] = soft_information(p, truth, weight)
    if config.beta or config.stability:
        terms["cross_entropy"] = -(log_p.gather(2, labels[:, :, None])[:, :, 0] * weight).sum(1)
    if config.gamma and config.information:
        terms["gradient_variance"] = last_layer_variance(p - truth, features, weight)
    return terms


def outer_loss(config: OuterLossConfig, terms: Mapping[str, Tensor]) -> Tensor:
    """The outer loss [G] of one checkpoint from its terms: validation - information * objective (3)."""
    value = terms["validation"]
    for name, weight in (("information", -1.0), ("cross_entropy", config.beta), ("gradient_variance", config.gamma)):
        if name in terms and config.information * weight:  # cross_entropy may be there for the stability alone
            value = value + config.information * weight * terms[name]
    return value


def complexity(config: OuterLossConfig, controls: Sequence[Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    """The terms [G] of R(l) in equation (2) that have a weight, before it, over a stretch of the inner run.

    R is taken of the loss, that is of alpha: the paper's (2) has no norm of theta (weight decay is theirs).

    - entropy: the mean over steps of -sum_k alpha_k log alpha_k, in nats. - total_variation: the sum over refreshes of
    ||alpha_{t+1} - alpha_t||_1 from one refresh to the next, for bounded variation as in theorem 1.

    Args:
        controls: [G, U] each, in the order they came into force: of each refresh, and before those what was in force at
            the start of the stretch, if anything was. So a change at the edge of a window is part of the later window,
            and the variations of all windows add up to that of the run.
        lengths: number of steps for which each was in force; 0 for the first where the stretch begins with a refresh.
    """
    parts = [[each[:, part] for each in controls] for part in BASIS_PARTS]
    terms = {}
    if config.entropy:
        entropies = [torch.stack([*map(mixture_entropy, alpha)]).sum(0) for alpha in zip(*parts, strict=True)]
        weighted = [steps * entropy for steps, entropy in zip(lengths, entropies, strict=True)]
        terms["entropy"] = torch.stack(weighted).sum(0) / sum(lengths)
    if config.total_variation:
        terms["total_variation"] = torch.stack([_variation(part) for part in parts]).sum(0)
    return terms


def _variation(alphas: Sequence[Tensor]) -> Tensor:
    """Sum [G] over refreshes of the absolute changes of weights [G, X]."""
    return torch.stack(list(alphas)).diff(dim=0).abs().sum((0, 2))


def mixture_entropy(alpha: Tensor) -> Tensor:
    """Entropy [G] in nats of mixture weights [G, K], or the part of some of them in it; 0 log 0 = 0, with a finite
    gradient."""
    return -(alpha * alpha.clamp_min(torch.finfo(alpha.dtype).tiny).log()).sum(1)


def soft_information(p: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Mutual information [G] in nats of the soft confusion matrix P(a, y) = sum_i w_i p_ia truth_iy of equation (3).

    p: probabilities [G, V, C]; truth: one-hot labels [G, V, C]; weight: [G, V] with sum 1.
    """
    joint = (p * weight[:, :, None]).transpose(1, 2) @ truth
    tiny = torch.finfo(p.dtype).tiny  # 0 log 0 = 0, with a finite gradient
    predicted, actual = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    log_ratio = joint.clamp_min(tiny).log() - predicted.clamp_min(tiny).log() - actual.clamp_min(tiny).log()
    return (joint * log_ratio).sum((1, 2))


def last_layer_variance(residual: Tensor, features: Tensor, weight: Tensor) -> Tensor:
    """Trace [G] of the covariance over examples of (p_i - y_i) outer [h_i, 1], the gradient of an example's
    cross-entropy with respect to the weights and biases of the last layer; no such matrix is made.

    residual: p - y [G, V, C]; features: h [G, V, D]; weight: [G, V] with sum 1.
    """
    squares = residual.square().sum(-1) * (features.square().sum(-1) + 1)
    weighted = residual * weight[:, :, None]
    mean_weights, mean_biases = weighted.transpose(1, 2) @ features, weighted.sum(1)
    return (squares * weight).sum(1) - mean_weights.square().sum((1, 2)) - mean_biases.square().sum(1)


def validation_loss(
    config: OuterLossConfig, logits: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor
) -> Tensor:
    """Val of equation (8) [G] for logits [G, V, C] and labels [G, V]; mask [G, V] is 1 on real rows.

    - soft_error: mean of sigmoid(-s m / RMS(m)), m the margin of the label's logit over the best other one and s the
      sharpness. Dividing by the margins' own root mean square makes it blind to confidence (METHODS part 6).
    - one_minus_p: mean of 1 - p_y. - cross_entropy: mean of -log p_y.
    """
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    logits = logits.masked_fill(~class_mask[:, None, :], -1e9)
    if config.kind == "soft_error":
        own = logits.gather(2, labels[:, :, None])[:, :, 0]
        other = logits.scatter(2, labels[:, :, None], -1e9).amax(-1)
        margin = (own - other).clamp(-1e3, 1e3) * (mask > 0)
        rms = ((margin * margin * weight).sum(1, keepdim=True) + 1e-6).sqrt()
        return (torch.sigmoid(-config.sharpness * margin / rms) * weight).sum(1)
    log_p = torch.log_softmax(logits, -1).gather(2, labels[:, :, None])[:, :, 0]
    if config.kind == "one_minus_p":
        return ((1 - log_p.exp()) * weight).sum(1)
    return -(log_p * weight).sum(1)


def accuracy(logits: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor) -> Tensor:
    """Share [G] of real rows whose largest real logit is the label's."""
    predicted = logits.masked_fill(~class_mask[:, None, :], -1e9).argmax(-1)
    return ((predicted == labels) * mask).sum(1) / mask.sum(1).clamp_min(1)


def checkpoints(every: int, start: int, stop: int) -> list[int]:
    """Inner steps t in (start, stop] after which the outer loss is read: multiples of ``every``, and ``stop``."""
    inside = [step for step in range(start + 1, stop) if step % every == 0]
    return [*inside, stop]
