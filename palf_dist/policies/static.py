"""Policies that do not change during training: one static loss, or a fixed mixture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from palf_dist.types import BASIS_LOSSES, CONTROLS, DEFAULT_HYPERPARAMETERS, NUM_BASIS


def control_vector(alpha: Mapping[str, float], hyperparameters: Mapping[str, float] | None = None) -> Tensor:
    """Controls [U] with the given mixture weights (others 0) and hyper-parameters (others at their defaults)."""
    values = dict.fromkeys(BASIS_LOSSES, 0.0) | dict(alpha) | DEFAULT_HYPERPARAMETERS | dict(hyperparameters or {})
    return torch.tensor([values[name] for name in CONTROLS])


class StaticPolicy:
    """The same controls at every step of every task."""

    features: tuple[str, ...] = ()
    num_parameters = 0
    reads_history = False

    def __init__(self, controls: Tensor, refresh: int = 1_000_000_000) -> None:
        assert controls.shape == (len(CONTROLS),)
        self.vector = controls
        self.refresh = refresh
        self.active_basis = tuple(
            name for name, weight in zip(BASIS_LOSSES, controls[:NUM_BASIS].tolist(), strict=True) if weight > 0
        )

    def initial(self) -> np.ndarray:
        return np.zeros(0, np.float32)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self.vector.to(state).expand(state.shape[0], -1)
