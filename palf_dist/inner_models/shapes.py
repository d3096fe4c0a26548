"""What an inner model must know of a group's inputs to be built: their kinds and padded widths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputShape:
    """Widths of types.Inputs after padding to the group's widest task; what a model does not read is 0 or None."""

    numeric: int = 0  # D numeric columns
    categorical: int = 0  # J categorical columns
    categories: int = 0  # rows of the one table that all J columns share; code 0 = missing or unseen
    image: tuple[int, int, int] | None = None  # height, width, channels
    tokens: int = 0  # words of each text, L
    vocabulary: int = 0  # token codes run from 0 (padding) to vocabulary - 1
