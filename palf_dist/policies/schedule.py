"""Policies that follow the clock alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palf_dist.policies.static import control_vector


class CurriculumPolicy:
    """Easy to hard: label smoothing first, cross-entropy in the middle, the focal loss (which stresses hard examples)
    at the end, mixed linearly in between."""

    features: tuple[str, ...] = ("time",)
    active_basis: tuple[str, ...] = ("ce", "focal", "label_smoothing")
    num_parameters = 0
    reads_history = False

    def __init__(self, refresh: int = 10) -> None:
        self.refresh = refresh
        self._knots = torch.stack([control_vector({name: 1.0}) for name in ("label_smoothing", "ce", "focal")])

    def initial(self) -> np.ndarray:
        return np.zeros(0, np.float32)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        time = state[:, :1].clamp(0, 1)
        start, middle, end = self._knots.to(state)
        first = (1 - 2 * time) * start + 2 * time * middle
        second = (2 - 2 * time) * middle + (2 * time - 1) * end
        return torch.where(time < 0.5, first, second)
