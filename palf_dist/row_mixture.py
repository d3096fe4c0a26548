"""The adaptive loss of each row of a batch, of whatever its mixture and its labels are."""

from __future__ import annotations

from torch import Tensor

from palf_dist.cross_entropy_arguments import LabelledRows
from palf_dist.losses import LossContext
from palf_dist.mixture_loss import mixture_loss
from palf_dist.own_losses import own_mixture, own_names
from palf_dist.soft_targets import soft_target_mixture
from palf_dist.types import CONTROLS


def row_mixture(rows: LabelledRows, controls: Tensor, context: LossContext, active: tuple[str, ...]) -> Tensor:
    """sum_k alpha_k l_k of each row [n].

    Args:
        rows: of one task; with probabilities or smoothed labels, the mean over labels of their losses.
        controls: [U], and after them the weights of a user's own losses, in their order in ``active``.
        context: of the task, with the averages of these rows.
        active: basis losses in the mixture.
    """
    z, labels, targets, own = rows.z, rows.labels, rows.targets, own_names(active)
    values = own_mixture(own, controls[len(CONTROLS) :], z, labels, targets) if own else None
    closed = tuple(name for name in active if name not in own)
    if not closed:
        assert values is not None
        return values
    if targets is not None:
        known = soft_target_mixture(z, labels, targets, controls, context, closed)
    else:
        h = rows.features.flatten(1).to(z.dtype) if rows.features is not None else None
        known = mixture_loss(z, labels, h, controls, context, closed)[0]
    return known if values is None else known + values
