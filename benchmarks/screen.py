"""Tables as benchmarks print them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table


def shown(cells: tuple[Sequence[str], Sequence[Sequence[str]]], title: str | None = None) -> Table:
    """``cells``: a header, and rows as wide."""
    header, rows = cells
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
