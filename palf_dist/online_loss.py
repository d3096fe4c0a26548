"""Policies that learn within one run, in anybody's PyTorch loop: online LearnLoss and Hedge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist.errors import ConfigError
from palf_dist.losses import LossContext
from palf_dist.mixture_loss import check_batch, mixture_loss
from palf_dist.policies.hedge import HedgePolicy
from palf_dist.policies.online_learnloss import OnlineLearnLoss
from palf_dist.types import CONTROL_INDEX
from palf_dist.untraced import untraced


class OnlineLoss(nn.Module):
    """A loss whose mixture weights follow the history of the run, by LearnLoss (``AdaptiveLoss.online`` makes one) or
    by Hedge (``AdaptiveLoss.hedge``).

    ``loss = criterion(logits, y); loss.backward(); optimizer.step()``, and every few (about ten) iterations
    ``criterion.observe(validation_error)``, with Hedge ``criterion.observe()``.

    In eval mode the module is the plain mean cross-entropy. Everything that changes is in its ``state_dict``. It
    follows the logits to their device.
    """

    totals: Tensor  # [1 + K] examples since the last snapshot, and the sum of each basis loss over them
    controls: Tensor  # [U] in force

    def __init__(self, policy: OnlineLearnLoss | HedgePolicy) -> None:
        """
        Args:
            policy: sets the mixture weights from the snapshots of the run, at each ``observe``.
        """
        super().__init__()
        self.policy = policy
        self._snapshots: list[list[float]] = []  # [n][1 + K] e, then phi
        self._context: LossContext | None = None
        self.register_buffer("totals", torch.zeros(1 + len(self.policy.active_basis)))
        self.register_buffer("controls", self._learn(), persistent=False)  # follows from the snapshots

    @untraced  # as AdaptiveLoss.forward
    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean mixture of a batch (in eval mode: the mean cross-entropy).

        Args:
            logits: [n, C] floating point.
            y: [n] int64 labels.

        Raises:
            ConfigError: shapes do not fit, the batch is empty, or a label is out of range (not looked for on a GPU).
        """
        if not self.training:
            return functional.cross_entropy(logits, y)
        check_batch(logits, y)
        if self.totals.device != logits.device:
            self.to(logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
            y = y.to(z.device, torch.int64)
            context = self._task(z)
            controls, active = self.controls[None].to(z.dtype), self.policy.active_basis
            loss, values = mixture_loss(z, y, None, controls, context, active, mean=True)
            with torch.no_grad():
                sums = [values[name].sum() for name in active]
                self.totals += torch.stack([z.new_tensor(len(y)), *sums]).to(self.totals)
            return loss

    def observe(self, validation_error: float | Tensor | None = None) -> None:
        """Tell the model's present validation error, which Hedge does not need, and learn new weights.

        The snapshot is (phi, e): the mean of each basis loss over the training batches since the last call, and the
        error. One that is not finite is left out, so that a model that diverged for a while does no harm.

        Args:
            validation_error: whatever is to be made small on held-out rows, such as their mean cross-entropy.

        Raises:
            ConfigError: no batch has passed since the last call, or LearnLoss is told no error.
        """
        if validation_error is None:
            if isinstance(self.policy, OnlineLearnLoss):
                raise ConfigError("observe: LearnLoss needs the model's validation error; pass it")
            validation_error = torch.nan
        count, *sums = self.totals.double().tolist()
        if not count:
            raise ConfigError("observe: no training batch has passed since the last call; call it every few iterations")
        self._snapshots.append([float(torch.as_tensor(validation_error).detach()), *(total / count for total in sums)])
        self.totals.zero_()
        self.controls.copy_(self._learn())

    @property
    def weights(self) -> dict[str, float]:
        """The mixture weights in force, by basis loss; they sum to 1."""
        return {name: float(self.controls[CONTROL_INDEX[name]]) for name in self.policy.active_basis}

    def get_extra_state(self) -> dict[str, Any]:
        return {"settings": self.policy.settings, "snapshots": [*self._snapshots]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["settings"] != self.policy.settings:
            raise ConfigError(
                f"load_state_dict: the state was saved with {state['settings']}, not with {self.policy.settings}; "
                "make the loss with the same arguments"
            )
        self._snapshots = [list(snapshot) for snapshot in state["snapshots"]]
        self.controls.copy_(self._learn())

    def _learn(self) -> Tensor:
        """Controls [U] from the snapshots."""
        history = torch.tensor(self._snapshots, dtype=torch.float64).view(1, -1, 1 + len(self.policy.active_basis))
        return self.policy.controls(torch.zeros(0), history)[0].float()

    def _task(self, z: Tensor) -> LossContext:
        """The constant facts of the losses, made once per type and place of the logits."""
        known = self._context
        if known is None or known.log_prior_ratio.dtype != z.dtype or known.class_mask.device != z.device:
            mask = torch.ones(1, z.shape[1], dtype=torch.bool, device=z.device)
            self._context = known = LossContext.create(mask, z.new_zeros(1, z.shape[1]))
        return known
