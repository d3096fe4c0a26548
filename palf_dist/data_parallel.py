"""What the ranks of a data-parallel training tell each other, by torch.distributed: every rank of the default process
group trains the same model on rows of its own. Each function is what it would be on one rank where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def ranks() -> int:
    """How many there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def joined(*columns: Tensor) -> tuple[Tensor, ...]:
    """Columns [n, ...] of all ranks, those of one rank after those of the other; n may differ. No gradient."""
    world = ranks()
    if world == 1:
        return columns
    own = torch.tensor([len(columns[0])], device=columns[0].device)
    counts = [torch.empty_like(own) for _ in range(world)]
    distributed.all_gather(counts, own)
    rows = torch.cat(counts).tolist()
    return tuple(_gathered(column, rows) for column in columns)


def _gathered(column: Tensor, rows: list[int]) -> Tensor:
    padded = column.new_zeros(max(rows), *column.shape[1:])  # all parts of a gather have one shape
    padded[: len(column)] = column
    parts = [torch.empty_like(padded) for _ in rows]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def last_of_each(index: Tensor) -> Tensor:
    """Where in index [n] each entry's row stands for the last time [n]: so that all that write a row write the same."""
    ordered, order = index.sort(stable=True)
    return order[torch.searchsorted(ordered, index, right=True) - 1]


def whole(value: Tensor) -> Tensor:
    """A value of which each rank may hold a part, as a norm of gradients under FSDP, in one piece."""
    gather = getattr(value, "full_tensor", None)  # of a DTensor, whose import takes seconds
    return value if gather is None else gather()


def of_first_rank(value: Tensor) -> Tensor:
    """``value`` as it is on rank 0; written in place."""
    if ranks() > 1:
        distributed.broadcast(value, 0)
    return value
