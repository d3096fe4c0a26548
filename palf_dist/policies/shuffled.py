"""A control of the evaluation: what a policy is worth when its state says nothing of the task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.policies.base import Policy
from palf_dist.randomness import random_generator


class ShuffledPolicy:
    """A policy that is fed, for each task, the states of another task of the group at the same step: of the same other
    task all along, so that what it sees is a run that there was."""

    def __init__(self, policy: Policy, keys: tuple[int | str, ...]) -> None:
        """``keys``: of the random number generator that chooses who sees whose states."""
        self._policy, self._keys = policy, keys
        self.features, self.refresh, self.active_basis = policy.features, policy.refresh, policy.active_basis
        self.num_parameters, self.reads_history = policy.num_parameters, policy.reads_history
        self.shield = policy.shield

    def initial(self) -> np.ndarray:
        return self._policy.initial()

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        """Raises ConfigError where there is no other task."""
        return self._policy.controls(phi, state[self._others(len(state)).to(state.device)])

    def _others(self, tasks: int) -> Tensor:
        """Whose state each task sees: all tasks in one random cycle."""
        if tasks < 2:
            raise ConfigError(
                "distributed.memory_per_worker: no room for two tasks at a time, as policy_shuffled needs; raise it, "
                "or leave policy_shuffled out of evaluation.methods"
            )
        order = torch.from_numpy(random_generator("shuffled states", *self._keys).permutation(tasks))
        return torch.empty_like(order).index_copy_(0, order, order.roll(1))
