"""Policies that follow the clock alone."""

from __future__ import annotations

import torch
from torch import Tensor

from palf_dist.policies.base import WithoutParameters
from palf_dist.policies.static import control_vector


class CurriculumPolicy(WithoutParameters):
    """Easy to hard: label smoothing first, cross-entropy in the middle, the focal loss (which stresses hard examples)
    at the end, mixed linearly in between."""

    features: tuple[str, ...] = ("time",)
    active_basis: tuple[str, ...] = ("ce", "focal", "label_smoothing")

    def __init__(self, refresh: int = 10) -> None:
        self.refresh = refresh
        self._knots = torch.stack([control_vector({name: 1.0}) for name in ("label_smoothing", "ce", "focal")])

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        time = state[:, :1].clamp(0, 1)
        start, middle, end = self._knots.to(state)
        first = (1 - 2 * time) * start + 2 * time * middle
        second = (2 - 2 * time) * middle + (2 * time - 1) * end
        return torch.where(time < 0.5, first, second)


class RecordedSchedule(WithoutParameters):
    """Plays controls that were recorded: the same at each refresh, whatever the task."""

    features: tuple[str, ...] = ("time",)

    def __init__(self, table: Tensor, steps: int, refresh: int, active_basis: tuple[str, ...]) -> None:
        """``table``: controls [R, U] of each refresh of a run of ``steps`` inner steps."""
        assert len(table) == -(-steps // refresh)
        self.table, self.refresh, self.active_basis = table, refresh, active_basis
        self._refreshes = steps / refresh

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self.table.to(state)[(state[:, 0] * self._refreshes).round().long()]
