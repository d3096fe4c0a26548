"""The held-out comparison as a table: on a console, in Markdown and as JSON records, all in percentage points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from palf_dist.evaluation.methods import METHODS, REFERENCE
from palf_dist.evaluation.statistics import Comparison, Estimate, Slice

NOTHING = "-"

Column = tuple[str, list[Slice]]


def label_of(method: str) -> str:
    """The label of a method; a method that this version does not know goes by its own name."""
    return METHODS[method].label if method in METHODS else method


def is_policy(method: str) -> bool:
    """Whether this is the row that tables and plots bring out."""
    return method in METHODS and METHODS[method].uses_policy


def to_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The ``held_out`` list of the JSON output, in points; what cannot be computed is None, so it is valid JSON."""
    return [
        {
            "method": item.method,
            "label": label_of(item.method),
            "accuracy": _number(item.overall.accuracy),
            **_difference(item.overall.difference),
            "by_noise": _slices({f"{rate:g}": part for rate, part in item.by_noise.items()}),
            "by_condition": _slices(item.by_condition),
            "by_condition_and_noise": _slices(
                {f"{name} {rate:g}": part for (name, rate), part in item.by_cell.items()}
            ),
            "by_dataset": _slices(item.by_dataset),
            "tasks": item.overall.difference.tasks,
            "datasets": item.overall.difference.clusters,
            "missing": item.missing,
            "non_finite": item.non_finite,
        }
        for item in comparisons
    ]


def to_cells(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """The table with all columns as text: its header, and one row of cells per comparison."""
    parts = [*condition_columns(comparisons), *noise_columns(comparisons)]
    header = ["method", "accuracy %", "difference", "95 % interval", *(name for name, _ in parts)]
    rows = [
        [label_of(item.method), _accuracy(item.overall), _difference_cell(item), _interval(item)]
        + [_cell(item, slices[index]) for _, slices in parts]
        for index, item in enumerate(comparisons)
    ]
    return header, rows


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """One Markdown table with all columns, the policy in bold, and the notes below it."""
    header, rows = to_cells(comparisons)
    lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
    for item, cells in zip(comparisons, rows, strict=True):
        lines.append(_markdown_row([f"**{cell}**" for cell in cells] if is_policy(item.method) else cells))
    return "\n".join([*lines, "", *(f"- {note}" for note in table_notes(comparisons))]) + "\n"


def to_rich(comparisons: Sequence[Comparison]) -> RenderableType:
    """Two tables for a console of 80 columns or more: by condition, and by label noise; then the notes."""
    overall: Column = ("all", [item.overall for item in comparisons])
    return Group(
        _rich_table(
            f"Held-out datasets against {label_of(REFERENCE)}", comparisons, [overall, *condition_columns(comparisons)]
        ),
        _rich_table("By label noise, all conditions", comparisons, noise_columns(comparisons)),
        *(Text(f"- {note}", style="dim") for note in table_notes(comparisons)),
    )


def condition_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """Per condition its name and the slice of every comparison."""
    return [(name, [item.by_condition[name] for item in comparisons]) for name in comparisons[0].by_condition]


def noise_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """Per noise rate a header and the slice of every comparison."""
    return [(f"noise {rate:g}", [item.by_noise[rate] for item in comparisons]) for rate in comparisons[0].by_noise]


def table_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know to read the table, and every result that is not in it."""
    reference = comparisons[0]
    assert reference.method == REFERENCE
    tasks, datasets = reference.overall.difference.tasks, reference.overall.difference.clusters
    notes = [
        f"{label_of(REFERENCE)} shows its accuracy in %; every other row its paired difference to that in points "
        f"(standard error clustered by dataset), over {tasks} tasks of {datasets} held-out dataset"
        f"{'' if datasets == 1 else 's'}.",
        "balanced: class frequencies as the data has them. matched: imbalanced training and test rows. "
        "shifted: imbalanced training rows, balanced test rows.",
    ]
    if datasets == 1:
        notes.append("With one dataset there is no standard error: hold out two or more.")
    known = [METHODS[item.method] for item in comparisons if item.method in METHODS]
    notes += [f"{method.label}: {method.note}." for method in known if method.note]
    for item in comparisons:
        if item.missing or item.non_finite:
            notes.append(
                f"{label_of(item.method)}: {item.missing} tasks without a result and {item.non_finite} with a "
                "non-finite accuracy are not in its means."
            )
    return notes


def _cell(item: Comparison, part: Slice) -> str:
    """The reference's accuracy, or another method's difference to it with the standard error."""
    return _accuracy(part) if item.method == REFERENCE else _signed(part.difference)


def _difference_cell(item: Comparison) -> str:
    return NOTHING if item.method == REFERENCE else _signed(item.overall.difference)


def _signed(estimate: Estimate) -> str:
    """As "+4.30 (.83)"."""
    if math.isnan(estimate.mean):
        return NOTHING
    error = "" if math.isnan(estimate.se) else f" ({estimate.se:.2f})".replace("(0.", "(.")
    return f"{estimate.mean:+.2f}{error}"


def _accuracy(part: Slice) -> str:
    return NOTHING if math.isnan(part.accuracy) else f"{part.accuracy:.2f}"


def _interval(item: Comparison) -> str:
    estimate = item.overall.difference
    if item.method == REFERENCE or math.isnan(estimate.se):
        return NOTHING
    return f"{estimate.low:+.2f} to {estimate.high:+.2f}"


def _rich_table(title: str, comparisons: Sequence[Comparison], parts: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")  # the only column that may wrap
    for header, _ in parts:
        table.add_column(header, justify="right", no_wrap=True)
    for index, item in enumerate(comparisons):
        cells = [_cell(item, slices[index]) for _, slices in parts]
        style = "bold green" if is_policy(item.method) else "dim" if item.method == REFERENCE else ""
        table.add_row(label_of(item.method), *cells, style=style)
    return table


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _slices(parts: Mapping[str, Slice]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "accuracy": _number(part.accuracy),
            **_difference(part.difference),
            "tasks": part.difference.tasks,
        }
        for name, part in parts.items()
    }


def _difference(estimate: Estimate) -> dict[str, Any]:
    return {
        "diff_vs_ce": _number(estimate.mean),
        "se": _number(estimate.se),
        "ci95": None if math.isnan(estimate.se) else [_number(estimate.low), _number(estimate.high)],
    }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
