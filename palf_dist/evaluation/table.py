"""The held-out comparison as a table: on a console, in Markdown and as JSON records, all in percentage points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from palf_dist.evaluation.derived import DESCRIBED
from palf_dist.evaluation.inference import holm
from palf_dist.evaluation.measures import SECONDS
from palf_dist.evaluation.methods import POLICY, REFERENCE
from palf_dist.evaluation.statistics import CONDITIONS, Comparison, Estimate, Slice

NOTHING = "-"

Column = tuple[str, list[Slice]]
Cells = tuple[list[str], list[list[str]]]

CONSOLE_COLUMNS = 4
"""Columns of a table that a console has room for."""

CONSOLE_TABLES = {
    "Balanced accuracy": ("balanced %", "balanced % matched", "balanced % shifted"),
    "Finished models by other measures": ("AUC %", "AP %", "ECE %", "NLL"),
    "Along the run": ("curve %", "to best", "to 95 %", "seconds"),
}
"""The columns that a console has room for."""


def label_of(method: str) -> str:
    """The label of a method; a method that this version does not know goes by its own name."""
    return DESCRIBED[method].label if method in DESCRIBED else method


def is_policy(method: str) -> bool:
    """Whether this is the row that tables and plots bring out."""
    return method == POLICY


def to_records(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The ``held_out`` list of the JSON output, in points; what cannot be computed is None, so it is valid JSON."""
    return [
        {
            "method": item.method,
            "label": label_of(item.method),
            "accuracy": number(item.overall.value),
            **_difference(item.overall.difference),
            "by_noise": _slices({str(noise): part for noise, part in item.by_noise.items()}),
            "by_condition": _slices(item.by_condition),
            "by_condition_and_noise": _slices(
                {f"{name} {rate:g}": part for (name, rate), part in item.by_cell.items()}
            ),
            "by_dataset": _slices(item.by_dataset),
            "by_dataset_within": _within(item),
            **_test(item),
            **({"chosen": list(item.chosen)} if item.chosen else {}),
            "measures": {name: _measured(other) for name, other in item.others.items() if name != SECONDS.name},
            "tasks": item.overall.difference.tasks,
            "datasets": item.datasets,
            "clusters": item.overall.difference.clusters,
            "missing": item.missing,
            "non_finite": item.non_finite,
        }
        for item in comparisons
    ]


def to_pair_records(pairs: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The ``pairs`` list of the JSON output: one method against each other one, in points of accuracy."""
    return [{"method": item.method, "against": item.reference, **_measured(item)} for item in pairs]


def to_cells(comparisons: Sequence[Comparison]) -> Cells:
    """The table by accuracy with all columns as text: its header, and one row of cells per comparison."""
    parts = [*condition_columns(comparisons), *noise_columns(comparisons)]
    header = ["method", "accuracy %", "difference", "95 % interval", *(name for name, _ in parts)]
    rows = [
        [label_of(item.method), _accuracy(item.overall), _difference_cell(item), _interval(item)]
        + [_cell(item, slices[index]) for _, slices in parts]
        for index, item in enumerate(comparisons)
    ]
    return header, rows


def to_measure_cells(comparisons: Sequence[Comparison]) -> Cells:
    """As ``to_cells``, by the other measures, over all tasks; and how sure the difference by accuracy is."""
    parts = measure_columns(comparisons)
    header = ["method", *(name for name, _ in parts), "bootstrap", "p (Holm)", "won-tied-lost"]
    rows = [
        [label_of(item.method), *(_cell(item, slices[index]) for _, slices in parts), *certainty(item)]
        for index, item in enumerate(comparisons)
    ]
    return header, rows


def to_pair_cells(pairs: Sequence[Comparison]) -> Cells:
    """One method against each other one (``compare_each``)."""
    header = ["against", "difference", "95 % interval", "bootstrap", "p (Holm)", "won-tied-lost"]
    rows = [
        [label_of(item.reference), signed(item.overall.difference), _interval(item), *certainty(item)] for item in pairs
    ]
    return header, rows


def to_markdown(comparisons: Sequence[Comparison], pairs: Sequence[Comparison] = ()) -> str:
    """Markdown tables with all columns, the policy in bold, and the notes below each; ``pairs`` as a last one."""
    return "\n".join([to_main_markdown(comparisons), to_other_markdown(comparisons, pairs)])


def to_main_markdown(comparisons: Sequence[Comparison]) -> str:
    """The first table of ``to_markdown``, by accuracy, with its notes."""
    return "\n".join([_bold_table(to_cells(comparisons), comparisons), markdown_notes(table_notes(comparisons))])


def to_other_markdown(comparisons: Sequence[Comparison], pairs: Sequence[Comparison] = ()) -> str:
    """What comes after it in ``to_markdown``."""
    parts = [_bold_table(to_measure_cells(comparisons), comparisons), markdown_notes(measure_notes(comparisons))]
    if pairs:
        title = f"The {label_of(pairs[0].method)} against each of the others, in points of accuracy:\n"
        parts += [title, markdown_table(to_pair_cells(pairs))]
    return "\n".join(parts)


def to_rich(comparisons: Sequence[Comparison]) -> RenderableType:
    """Tables for a console of 80 columns or more: by condition, by label noise, and by the other measures; then the
    notes."""
    overall: Column = ("all", [item.overall for item in comparisons])
    return Group(
        *_rich_tables(
            f"Held-out datasets against {label_of(REFERENCE)}", comparisons, [overall, *condition_columns(comparisons)]
        ),
        *_rich_tables("By label noise, all conditions", comparisons, noise_columns(comparisons)),
        *(
            _rich_table(title, comparisons, parts)
            for title, names in CONSOLE_TABLES.items()
            if (parts := [part for part in measure_columns(comparisons) if part[0] in names])
        ),
        *(Text(f"- {note}", style="dim") for note in (*table_notes(comparisons), *measure_notes(comparisons))),
    )


def condition_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """Per condition its name and the slice of every comparison."""
    return [(name, [item.by_condition[name] for item in comparisons]) for name in comparisons[0].by_condition]


def noise_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """Per kind and rate of noise a header and the slice of every comparison."""
    return [(f"noise {noise}", [item.by_noise[noise] for item in comparisons]) for noise in comparisons[0].by_noise]


def measure_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """Per measure that there is beside accuracy its label and the slice of every comparison, over all tasks; balanced
    accuracy, by which imbalanced conditions are judged as well, in each of these too."""
    columns: list[Column] = []
    for name, of_reference in comparisons[0].others.items():
        label = of_reference.measure.label
        columns.append((label, [item.others[name].overall for item in comparisons]))
        for condition in of_reference.by_condition if name == "balanced_accuracy" else ():
            if condition != "balanced":
                slices = [item.others[name].by_condition[condition] for item in comparisons]
                columns.append((f"{label} {condition}", slices))
    return columns


def measure_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What the columns of the table by other measures are."""
    clusters = comparisons[0].overall.difference.clusters
    measures = [other.measure for other in comparisons[0].others.values()]
    left_out = []
    for item in comparisons:
        undefined = {other.measure.label: other.non_finite - item.non_finite for other in item.others.values()}
        found = [f"{count} by {label}" for label, count in undefined.items() if count > 0]
        if found:
            left_out.append(
                f"{label_of(item.method)}: beside those without a finite accuracy, tasks on which a value of it or of "
                f"{label_of(REFERENCE)} is not defined are not in its means: {', '.join(found)}."
            )
    return [
        *(f"{each.label}: {each.meaning}." for each in measures),
        *left_out,
        "bootstrap: 95 % interval of the difference in accuracy when datasets are drawn anew. p (Holm): of its t test "
        f"with {clusters} independent datasets as the units, corrected for all methods; oracles and controls are none. "
        "won-tied-lost: datasets; a tie is one where the 95 % interval over its own tasks holds zero, which speaks of "
        "this dataset's rows only: its tasks draw on one pool.",
    ]


def table_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What a reader must know to read the table, and every result that is not in it."""
    reference = comparisons[0]
    assert reference.method == REFERENCE
    notes = [
        f"{label_of(REFERENCE)} shows its accuracy in %; every other row its paired difference to that in points "
        f"(standard error clustered by dataset), over {extent(reference)}.",
    ]
    if any(name in CONDITIONS for name in reference.by_condition):
        notes.append(
            "balanced: class frequencies as the data has them. matched: imbalanced training and test rows. "
            "shifted: imbalanced training rows, balanced test rows."
        )
    without_noise = [name for name, rate in reference.by_cell if rate == 0]
    if without_noise and set(without_noise) != set(reference.by_condition):
        notes.append(
            f"noise 0: all tasks to which no label noise was added, of the conditions {', '.join(without_noise)}; each "
            "kind of noise has columns of its own."
        )
    if reference.overall.difference.clusters == 1:
        notes.append("With one dataset there is no standard error: hold out two or more that share no rows.")
    known = [DESCRIBED[item.method] for item in comparisons if item.method in DESCRIBED]
    notes += [f"{method.label}: {method.note}." for method in known if method.note]
    for item in comparisons:
        if item.chosen:
            notes.append(f"{label_of(item.method)}, as chosen on meta-training tasks: {'; '.join(item.chosen)}.")
        if item.missing or item.non_finite:
            notes.append(
                f"{label_of(item.method)}: {item.missing} tasks without a result and {item.non_finite} with a "
                "non-finite accuracy are not in its means."
            )
    return notes


def extent(item: Comparison) -> str:
    """How many tasks, of how many held-out datasets, and how many of these count as independent."""
    estimate = item.overall.difference
    shared = f", {estimate.clusters} of them independent (the others share their rows)"
    return (
        f"{estimate.tasks} tasks of {item.datasets} held-out dataset{'' if item.datasets == 1 else 's'}"
        f"{shared if estimate.clusters < item.datasets else ''}"
    )


def _cell(item: Comparison, part: Slice) -> str:
    """The reference's accuracy, or another method's difference to it with the standard error."""
    return _accuracy(part) if item.method == REFERENCE else signed(part.difference)


def _difference_cell(item: Comparison) -> str:
    return NOTHING if item.method == REFERENCE else signed(item.overall.difference)


def signed(estimate: Estimate) -> str:
    """As "+4.30 (.83)"."""
    if math.isnan(estimate.mean):
        return NOTHING
    error = "" if math.isnan(estimate.se) else f" ({estimate.se:.2f})".replace("(0.", "(.")
    return f"{estimate.mean:+z.2f}{error}"


def _accuracy(part: Slice) -> str:
    return NOTHING if math.isnan(part.value) else f"{part.value:.2f}"


def _interval(item: Comparison) -> str:
    return NOTHING if item.method == item.reference else interval(item.overall.difference)


def interval(estimate: Estimate) -> str:
    """The 95 % interval, as "+2.40 to +6.20"."""
    if math.isnan(estimate.se):
        return NOTHING
    return f"{estimate.low:+z.2f} to {estimate.high:+z.2f}"


def _rich_tables(title: str, comparisons: Sequence[Comparison], parts: Sequence[Column]) -> list[Table]:
    """As many tables as it takes for the columns to fit a console."""
    widest = CONSOLE_COLUMNS if max(len(header) for header, _ in parts) <= 12 else CONSOLE_COLUMNS // 2
    cuts = range(0, len(parts), widest)
    return [_rich_table(title, comparisons, parts[start : start + widest]) for start in cuts]


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


def certainty(item: Comparison) -> list[str]:
    """Bootstrap interval, corrected p-value and tally."""
    low, high = item.bootstrap
    if item.method == item.reference or math.isnan(low):
        return [NOTHING] * 3
    tally = item.tally
    return [f"{low:+z.2f} to {high:+z.2f}", p_value(item.adjusted_p), f"{tally.wins}-{tally.ties}-{tally.losses}"]


def p_value(p: float) -> str:
    """As ".034"."""
    if math.isnan(p):
        return NOTHING
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def _bold_table(cells: Cells, comparisons: Sequence[Comparison]) -> str:
    return markdown_table(cells, [is_policy(item.method) for item in comparisons])


def markdown_table(table: Cells, bold: Sequence[bool] | None = None, texts: int = 1) -> str:
    """The cells as a Markdown table, rows that are ``bold`` in bold; the first columns are ``texts``, then numbers."""
    header, rows = table
    lines = [_markdown_row(header), _markdown_row(["---"] * texts + ["---:"] * (len(header) - texts))]
    looks = bold or [False] * len(rows)
    lines += [_markdown_row([f"**{c}**" for c in row] if b else row) for row, b in zip(rows, looks, strict=True)]
    return "\n".join(lines) + "\n"


def markdown_notes(notes: Sequence[str]) -> str:
    """The notes below a table, as a Markdown list."""
    return "".join(f"- {note}\n" for note in notes)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _slices(parts: Mapping[str, Slice]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "accuracy": number(part.value),
            **_difference(part.difference),
            "tasks": part.difference.tasks,
        }
        for name, part in parts.items()
    }


def _within(item: Comparison) -> dict[str, dict[str, Any]]:
    """By condition and noise the difference on each dataset, over its tasks there; p_holm: over the datasets."""
    found = {}
    for (condition, rate), parts in item.by_dataset_cell.items():
        adjusted = holm({name: part.difference.p for name, part in parts.items()})
        found[f"{condition} {rate:g}"] = {
            name: {**record, "p": number(parts[name].difference.p, 9), "p_holm": number(adjusted[name], 9)}
            for name, record in _slices(parts).items()
        }
    return found


def _difference(estimate: Estimate) -> dict[str, Any]:
    return {
        "diff_vs_ce": number(estimate.mean),
        "se": number(estimate.se),
        "ci95": None if math.isnan(estimate.se) else [number(estimate.low), number(estimate.high)],
    }


def _test(item: Comparison) -> dict[str, Any]:
    low, high = (number(end) for end in item.bootstrap)
    return {
        "ci95_bootstrap": None if low is None else [low, high],
        "p": number(item.overall.difference.p, 9),
        "p_holm": number(item.adjusted_p, 9),
        "won_tied_lost": [item.tally.wins, item.tally.ties, item.tally.losses],
    }


def _measured(item: Comparison) -> dict[str, Any]:
    """The comparison by another measure. ``ratio``: of the method's mean to the reference's, on the same tasks."""

    def part(each: Slice) -> dict[str, Any]:
        difference = each.difference
        reference = each.value - difference.mean
        interval = None if math.isnan(difference.se) else [number(difference.low), number(difference.high)]
        return {
            "value": number(each.value),
            "difference": number(difference.mean),
            "se": number(difference.se),
            "ci95": interval,
            "ratio": number(each.value / reference) if reference else None,
        }

    by_condition = {name: part(each) for name, each in item.by_condition.items()}
    test = _test(item)
    if item.measure.name != "accuracy":
        del test["p_holm"]  # the other measures describe; what is claimed is claimed of accuracy
    return {
        **part(item.overall),
        **test,
        "by_condition": by_condition,
        "tasks": item.overall.difference.tasks,
        "missing": item.missing,
        "non_finite": item.non_finite,
    }


def number(value: float | None, digits: int = 4) -> float | None:
    """As JSON takes it."""
    return None if value is None or not math.isfinite(value) else round(value, digits)
