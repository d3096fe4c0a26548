"""The outer loss: what the meta-learner minimises over phi. Read on clean meta-validation rows at checkpoints along
the inner run and at its end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from palf_dist.config import OuterLossConfig


def outer_terms(
    config: OuterLossConfig, logits: Tensor, features: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor
) -> dict[str, Tensor]:
    """The terms [G] of the outer loss, before their weights; those of equation (3) where ``information`` weighs them.

    - validation: ``validation_loss``. - information: I(Yhat; Y) in nats. - cross_entropy: E[l], l being plain
    cross-entropy, the reference of every adaptive loss: one yardstick whatever mixture the inner model minimised.
    - gradient_variance: Var[grad l] over examples, of the gradient with respect to the last layer.

    Args:
        logits: [G, V, C]. features: [G, V, D], what the last layer reads; only gradient_variance needs them.
        labels: [G, V]. mask: [G, V], 1 on real rows. class_mask: [G, C], True on real classes.
    """
    terms = {"validation": validation_loss(config, logits, labels, mask, class_mask)}
    if not config.information:
        return terms
    weight = mask / mask.sum(1, keepdim=True).clamp_min(1)
    log_p = torch.log_softmax(logits.masked_fill(~class_mask[:, None, :], -1e9), -1)
    p, truth = log_p.exp(), torch.zeros_like(log_p).scatter(2, labels[:, :, None], 1.0)
    terms["information"] = soft_information(p, truth, weight)
    if config.beta:
        terms["cross_entropy"] = -(log_p.gather(2, labels[:, :, None])[:, :, 0] * weight).sum(1)
    if config.gamma:
        terms["gradient_variance"] = last_layer_variance(p - truth, features, weight)
    return terms


def outer_loss(config: OuterLossConfig, terms: Mapping[str, Tensor]) -> Tensor:
    """The outer loss [G] of one checkpoint from its terms: validation - information * objective (3)."""
    value = terms["validation"]
    for name, weight in (("information", -1.0), ("cross_entropy", config.beta), ("gradient_variance", config.gamma)):
        if name in terms:
            value = value + config.information * weight * terms[name]
    return value


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
