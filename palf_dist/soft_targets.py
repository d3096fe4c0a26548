"""The adaptive loss of a label that is known as a distribution q: the mean over labels of their losses, as torch's
cross-entropy of probabilities is. A basis loss on the logits is F(log p_y), so that this is sum_c q_c F(log p_c).
"""

from __future__ import annotations

from torch import Tensor

from palf_dist.logit_losses import LOGIT_LOSSES, Own
from palf_dist.loss_head import Evaluation
from palf_dist.losses import Controls, LossContext, column


def soft_target_mixture(
    z: Tensor, labels: Tensor, targets: Tensor, controls: Controls, context: LossContext, active: tuple[str, ...]
) -> Tensor:
    """sum_c q_c sum_k alpha_k l_k(z, c) of each example [n] of one task, by autograd in the logits.

    Args:
        z: [n, C] logits.
        labels: [n] int64, whose averaged probabilities are those of ``context``.
        targets: [n, C] the weights q_c, of any sum.
        controls: [1, U], or their columns; taken as constants.
        context: of one task.
        active: basis losses in the mixture; not info_nce, which compares whole labels.
    """
    assert "info_nce" not in active
    evaluation = Evaluation(active, z[None], labels[None], None, controls, context)
    mass = targets.sum(-1)
    mixture = z.new_zeros(len(z))
    for softmax, losses in evaluation.groups:
        log_p = softmax.log_p[0]
        own = Own(log_p.T)  # [C, n]: in the place of the tasks, each class once as everybody's label
        for name in losses:
            value = (targets.T * LOGIT_LOSSES[name](own, controls, context).value).sum(0)
            if (target := evaluation.targets.get(name)) is not None:
                instead = (log_p * target.t).sum(-1)
                value = value + (target.strength * (target.mass * (targets * log_p).sum(-1) - mass * instead))[0]
            if name == "elr" and evaluation.early is not None:
                value = value + mass * (column(controls, "lam") * evaluation.early.value)[0]
            mixture = mixture + column(controls, name)[0] * value
    return mixture
