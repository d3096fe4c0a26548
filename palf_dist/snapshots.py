"""What a policy that learns within one run reads of it, in anybody's loop: its snapshots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist.data_parallel import joined
from palf_dist.errors import ConfigError
from palf_dist.loss_head import Evaluation
from palf_dist.losses import LossContext
from palf_dist.own_losses import own_names, own_values, registered
from palf_dist.policies.base import Policy
from palf_dist.policies.online_learnloss import OnlineLearnLoss
from palf_dist.policies.static import control_vector
from palf_dist.shown_rows import LabelledTensor, validation_columns


class Snapshots(nn.Module):
    """Gathers the mean of each of the policy's basis losses over the batches since the last snapshot, the present one
    among them, at the default hyper-parameters; on all ranks together."""

    totals: Tensor  # [1 + K] rows since the last snapshot, and the sum of each basis loss over them

    def __init__(self, policy: Policy, validation: Callable[[], LabelledTensor] | None) -> None:
        """
        Args:
            policy: reads them.
            validation: as of ``AdaptiveLoss``; without it the validation error is NaN.

        Raises:
            ConfigError: LearnLoss, which learns from the validation error, is shown no validation rows; or the mixture
                holds a loss that compares rows.
        """
        super().__init__()
        if validation is None and isinstance(policy, OnlineLearnLoss):
            raise ConfigError("validation: online LearnLoss learns from the validation error; pass validation=")
        if "info_nce" in policy.active_basis:
            raise ConfigError("active_basis: info_nce is no mean over rows, which a snapshot holds; leave it out")
        own = own_names(policy.active_basis)
        self._basis = tuple(name for name in policy.active_basis if name not in own), own
        self._order, self._validation = policy.active_basis, validation
        self.register_buffer("totals", torch.zeros(1 + len(policy.active_basis)))

    @torch.no_grad()
    def add(self, z: Tensor, labels: Tensor, context: LossContext) -> None:
        """Take in logits z [n, C] and labels [n]; the context is without averages."""
        closed, own = self._basis
        defaults = control_vector({}).to(z)[None]
        evaluation = Evaluation(closed, z[None], labels[None], None, defaults, context)
        values = dict(evaluation.values()) | {name: own_values(name, registered(name), z, labels) for name in own}
        sums = [values[name].sum() for name in self._order]
        rows = torch.stack([z.new_tensor(len(labels)), *sums])
        self.totals += joined(rows[None])[0].sum(0).to(self.totals)  # at every batch: all ranks save one state

    def taken(self, z: Tensor) -> Tensor:
        """The snapshot [1, 1 + K] of now, with which the next one begins: the validation error (mean cross-entropy; NaN
        where nobody shows rows), then the means. z [n, C] are the logits of the batch."""
        count, *sums = self.totals.clone()
        self.totals.zero_()
        error = z.new_tensor(torch.nan)
        if self._validation is not None:
            logits, labels, _ = validation_columns(self._validation, z)
            error = functional.cross_entropy(logits[0], labels[0])
        return torch.stack([error.to(count), *(total / count for total in sums)])[None]
