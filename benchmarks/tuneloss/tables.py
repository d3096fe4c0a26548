"""The tables of the benchmark, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from benchmarks.tuneloss.methods import METHODS, REFERENCE
from benchmarks.tuneloss.summary import NEAR, UNITS, Row


@dataclass(frozen=True)
class Sheet:
    """A titled table of text; the first column says what a line is about."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def to_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for line in self.lines:
            table.add_row(*line)
        return table

    def to_markdown(self) -> str:
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.lines)]
        return "\n".join([f"### {self.title}", "", *lines, ""])


def comparison_sheets(title: str, rows: Sequence[Row], *, ratios: bool) -> list[Sheet]:
    """For trainings and for gradient evaluations: medians with solved counts and, where they mean anything, ``ratios``
    to the reference."""
    header = ["method", "budget", *[f"to {near:.0%}" for near in NEAR]]
    if ratios:
        header += [f"{REFERENCE}/this {near:.0%}" for near in NEAR]
        header += [f"paired {near:.0%}" for near in NEAR]
    sheets = []
    for unit in UNITS:
        lines = []
        for row in rows:
            needs = [row.needs[unit, near] for near in NEAR]
            line = [row.label, str(row.budget), *[_cell(row, unit, near) for near in NEAR]]
            if ratios:
                line += [("≥ " if need.understated else "") + _ratio(need.ratio) for need in needs]
                line += [_ratio(need.paired) for need in needs]
            lines.append(line)
        sheets.append(Sheet(f"{title}: median {unit} [cases solved]", header, lines))
    return sheets


def problem_sheet(title: str, rows: Mapping[str, Sequence[Row]]) -> Sheet:
    """Median trainings to the nearest distance for each method and problem (columns)."""
    unit, near = UNITS[0], NEAR[0]
    by_problem = [{row.method: row for row in group} for group in rows.values()]
    methods = [method for method in METHODS if any(method in group for group in by_problem)]
    lines = [
        [METHODS[method].label, *[_cell(group[method], unit, near) if method in group else "-" for group in by_problem]]
        for method in methods
    ]
    return Sheet(f"{title}: median {unit} to {near:.0%} [cases solved]", ["method", *rows], lines)


def _cell(row: Row, unit: str, near: float) -> str:
    need = row.needs[unit, near]
    median = f"{need.median:,.0f}" if np.isfinite(need.median) else "∞"
    return f"{median} [{need.solved}/{row.cases}]"


def _ratio(ratio: float) -> str:
    return "-" if np.isnan(ratio) else f"{ratio:.3g}"
