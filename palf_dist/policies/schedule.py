"""Policies that follow the clock alone."""

from __future__ import annotations

import torch
from torch import Tensor

from palf_dist.policies.base import Policy, WithoutParameters
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
    """Plays, by the clock, the controls that a policy was seen to ask for: of each task those in its own column of the
    table, under that policy's shield."""

    features: tuple[str, ...] = ("time",)

    def __init__(self, table: Tensor, steps: int, policy: Policy) -> None:
        """``table``: controls [R, G, U] of each refresh of a run of ``steps`` inner steps under ``policy``, before the
        shield."""
        assert len(table) == -(-steps // policy.refresh)
        self.table, self.steps, self.policy = table, steps, policy
        self.refresh, self.active_basis, self.shield = policy.refresh, policy.active_basis, policy.shield

    def part(self, tasks: slice) -> RecordedSchedule:
        """The same for some of the tasks."""
        return RecordedSchedule(self.table[:, tasks], self.steps, self.policy)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        moment = (state[:, 0] * (self.steps / self.refresh)).round().long()
        return self.table.to(state)[moment, torch.arange(len(state), device=state.device)]
