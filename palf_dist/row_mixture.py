"""The adaptive loss of each row of a batch, of whatever its mixture and its labels are."""

from __future__ import annotations

from torch import Tensor

from palf_dist.cross_entropy_arguments import LabelledRows
from palf_dist.loss_head import Softmax
from palf_dist.losses import Columns, LossContext
from palf_dist.mixture_loss import mixture_loss
from palf_dist.own_losses import own_mixture, own_names
from palf_dist.soft_targets import soft_target_mixture


def row_mixture(
    rows: LabelledRows,
    controls: Columns,
    context: LossContext,
    active: tuple[str, ...],
    *,
    plain: Softmax | None = None,
    mean: bool = False,
) -> Tensor:
    """sum_k alpha_k l_k of each row [n], or the mean of the rows [].

    Args:
        rows: of one task; with probabilities or smoothed labels, the mean over labels of their losses.
        controls: by name, the weights of a user's own losses among them.
        context: of the task, with the averages of these rows.
        active: basis losses in the mixture.
        plain: softmax of the logits, where the caller has it.
        mean: NaN of no rows.
    """
    z, labels, targets, own = rows.z, rows.labels, rows.targets, own_names(active)
    closed = tuple(name for name in active if name not in own)
    values = own_mixture({name: controls[name][0] for name in own}, z, labels, targets) if own else None
    if closed and targets is not None:
        known = soft_target_mixture(z, labels, targets, controls, context, closed)
    elif closed:
        h = rows.features.flatten(1).to(z.dtype) if rows.features is not None else None
        alone = mean and values is None
        known, _ = mixture_loss(z, labels, h, controls, context, closed, plain=plain, mean=alone)
        if alone:
            return known
    if values is not None:
        known = known + values if closed else values
    return known.mean() if mean else known
