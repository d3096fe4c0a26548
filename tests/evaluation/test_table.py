"""The table holds the numbers of the comparison, in three forms, and says what is missing from it."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from palf_dist.evaluation.methods import METHODS
from palf_dist.evaluation.statistics import compare
from palf_dist.evaluation.table import to_markdown, to_records, to_rich
from tests.evaluation.synthetic import result_rows


@pytest.fixture(scope="module")
def rows():
    return result_rows()


def rendered(comparisons, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(to_rich(comparisons))
    return console.file.getvalue()


def markdown_cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return table[0], {row[0].strip("*"): row for row in table[2:]}


def test_records_are_json_in_points_with_the_reference_first(rows):
    records = json.loads(json.dumps(to_records(compare(rows)), allow_nan=False))
    assert [record["method"] for record in records[:3]] == ["ce", "policy", "s5"]
    assert {record["method"] for record in records} == set(METHODS)
    ce, policy = records[:2]
    assert (ce["diff_vs_ce"], ce["se"]) == (0, 0)
    assert 50 < ce["accuracy"] < 100
    assert policy["accuracy"] - ce["accuracy"] == pytest.approx(policy["diff_vs_ce"], abs=1e-3)
    assert policy["ci95"][0] < policy["diff_vs_ce"] < policy["ci95"][1]
    assert (policy["tasks"], policy["datasets"]) == (96, 4)
    assert list(policy["by_noise"]) == ["0", "0.15", "0.3", "0.5"]
    assert list(policy["by_condition"]) == ["balanced", "matched", "shifted"]
    assert policy["by_condition_and_noise"]["shifted 0.5"]["tasks"] == 8
    mean = sum(part["diff_vs_ce"] for part in policy["by_condition"].values()) / 3
    assert mean == pytest.approx(policy["diff_vs_ce"], abs=1e-3)


def test_markdown_holds_the_numbers_of_the_records(rows):
    comparisons = compare(rows)
    header, cells = markdown_cells(to_markdown(comparisons))
    for record in to_records(comparisons):
        row = cells[record["label"]]
        assert len(row) == len(header)
        assert float(row[header.index("accuracy %")].strip("*")) == pytest.approx(record["accuracy"], abs=0.006)
        if record["method"] == "ce":
            assert row[header.index("difference")] == "-"
            assert float(row[header.index("shifted")]) == pytest.approx(
                record["by_condition"]["shifted"]["accuracy"], abs=0.006
            )
        else:
            value, error = row[header.index("shifted")].strip("*").split()
            assert float(value) == pytest.approx(record["by_condition"]["shifted"]["diff_vs_ce"], abs=0.006)
            assert float(error.strip("()")) == pytest.approx(record["by_condition"]["shifted"]["se"], abs=0.006)


def test_only_the_policy_is_bold(rows):
    _, cells = markdown_cells(to_markdown(compare(rows)))
    assert {name for name, row in cells.items() if row[0].startswith("**")} == {METHODS["policy"].label}


def test_the_console_table_fits_80_columns_without_cutting(rows):
    text = rendered(compare(rows))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for method in METHODS.values():
        assert text.count(f"\n {method.label} ") == 2  # on one line, in both tables


def test_missing_and_failed_tasks_are_named_under_every_table(rows):
    broken = [dict(row) for row in rows if not (row["method"] == "focal" and row["dataset"] == "wine")]
    next(row for row in broken if row["method"] == "focal")["accuracy"] = math.nan
    note = "focal: 24 tasks without a result and 1 with a non-finite accuracy are not in its means."
    assert note in to_markdown(compare(broken))
    assert note in " ".join(rendered(compare(broken)).split())
    assert "not in its means" not in to_markdown(compare(rows))


def test_a_method_without_any_result_has_empty_cells_and_null_records(rows):
    failed = [{**row, "accuracy": math.inf} if row["method"] == "s5" else row for row in rows]
    comparisons = compare(failed)
    header, cells = markdown_cells(to_markdown(comparisons))
    assert cells[METHODS["s5"].label][1:] == ["-"] * (len(header) - 1)
    record = json.loads(json.dumps(to_records(comparisons)[-1], allow_nan=False))
    assert record["method"] == "s5" and record["tasks"] == 0
    assert [record[name] for name in ("accuracy", "diff_vs_ce", "se", "ci95")] == [None] * 4


def test_one_dataset_gives_no_standard_error_and_says_so():
    comparisons = compare(result_rows(datasets=("iris",)))
    text = to_markdown(comparisons)
    assert "With one dataset there is no standard error" in text
    _, cells = markdown_cells(text)
    assert "(" not in "".join(cells[METHODS["focal"].label])
    assert to_records(comparisons)[1]["se"] is None
