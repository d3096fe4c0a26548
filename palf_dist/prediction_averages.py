"""What the drop-in remembers of each training row: its averaged prediction, in buffers that grow with the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from palf_dist.errors import ConfigError


class LateBuffers(nn.Module):
    """A module whose buffers take their shapes from the data; a state_dict brings its own."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None:
                self._buffers[name] = buffer.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PredictionAverages(LateBuffers):
    """Moving average of the predicted probabilities of each training row. Grows with the largest row index."""

    averaged: Tensor  # [N, C] float32, 1 / C where not seen
    labels: Tensor  # [N] int64
    seen: Tensor  # [N] bool

    def __init__(self, decay: float, rows: int) -> None:
        super().__init__()
        self.decay, self.rows = decay, rows
        self.register_buffer("averaged", torch.zeros(0, 0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))

    def reserve(self, index: Tensor, classes: int) -> None:
        """Make room for rows ``index`` [n]."""
        if not len(index):
            return
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0:
            raise ConfigError(f"index: row {low} is negative; give each example's position in the training set")
        have = len(self.seen)
        if high >= have:
            rows = max(high + 1, self.rows, 2 * have)
            averaged = self.averaged.new_full((rows, classes), 1 / classes)
            labels, seen = self.labels.new_zeros(rows), self.seen.new_zeros(rows)
            averaged[:have], labels[:have], seen[:have] = self.averaged.view(have, classes), self.labels, self.seen
            self.averaged, self.labels, self.seen = averaged, labels, seen

    def recall(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Averaged predictions of rows ``index`` [n, C], and whether each has been seen [n]."""
        return self.averaged.index_select(0, index), self.seen.index_select(0, index)

    def update(self, index: Tensor, labels: Tensor, before: Tensor, p: Tensor) -> None:
        """Take in the current predictions p [n, C] of rows whose averages were ``before``; rows of NaN, of a model that
        overflowed, change nothing."""
        now, lost = torch.lerp(p.to(before.dtype), before, self.decay), p[:, 0].isnan()
        self.labels.index_copy_(0, index, labels)
        if lost.is_cuda or lost.any():
            now = torch.where(lost[:, None], before, now)
            self.seen.index_copy_(0, index, self.seen.index_select(0, index) | ~lost)
        else:
            self.seen.index_fill_(0, index, True)
        self.averaged.index_copy_(0, index, now)
