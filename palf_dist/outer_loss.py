"""The outer loss: what the meta-learner minimises over phi. Read on clean meta-validation rows at checkpoints along
the inner run and at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palf_dist.config import OuterLossConfig


def outer_loss(config: OuterLossConfig, logits: Tensor, labels: Tensor, mask: Tensor, class_mask: Tensor) -> Tensor:
    """Outer loss [G] of logits [G, V, C] for labels [G, V]; mask [G, V] is 1 on real rows.

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
