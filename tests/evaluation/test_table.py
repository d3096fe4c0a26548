"""The table holds the numbers of the comparison, in three forms, and says what is missing from it."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.console import Console

from palf_dist.evaluation.derived import PICKS, held_out
from palf_dist.evaluation.inference import clustered_mean
from palf_dist.evaluation.methods import METHODS
from palf_dist.evaluation.statistics import compare
from palf_dist.evaluation.table import (
    interval,
    signed,
    to_main_markdown,
    to_markdown,
    to_pair_records,
    to_records,
    to_rich,
)
from tests.evaluation.synthetic import few_rows, result_rows


@pytest.fixture(scope="module")
def rows():
    return result_rows()


def rendered(comparisons, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(to_rich(comparisons))
    return console.file.getvalue()


def markdown_cells(text, number=0):
    """Header and rows by label of one of the tables."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number].splitlines()]
    return table[0], {row[0].strip("*"): row for row in table[2:]}


def test_records_are_json_in_points_with_the_reference_first(rows):
    records = json.loads(json.dumps(to_records(compare(rows)), allow_nan=False))
    assert [record["method"] for record in records[:3]] == ["ce", "policy_trainval", "policy"]
    assert {record["method"] for record in records} == set(METHODS)
    ce, _, policy = records[:3]
    assert (ce["diff_vs_ce"], ce["se"]) == (0, 0)
    assert 50 < ce["accuracy"] < 100
    assert policy["accuracy"] - ce["accuracy"] == pytest.approx(policy["diff_vs_ce"], abs=1e-3)
    assert policy["ci95"][0] < policy["diff_vs_ce"] < policy["ci95"][1]
    assert (policy["tasks"], policy["datasets"], policy["clusters"]) == (96, 4, 4)
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


def test_datasets_that_share_rows_are_told_from_independent_ones(rows):
    related = [row | {"origin": "wine" if row["dataset"] == "iris" else row["dataset"]} for row in rows]
    text = to_markdown(compare(related))
    assert "over 96 tasks of 4 held-out datasets, 3 of them independent (the others share their rows)." in text
    assert "with 3 independent datasets as the units" in text
    assert "over 96 tasks of 4 held-out datasets." in to_markdown(compare(rows))


def test_only_the_policy_is_bold(rows):
    _, cells = markdown_cells(to_markdown(compare(rows)))
    assert {name for name, row in cells.items() if row[0].startswith("**")} == {METHODS["policy"].label}


def test_the_console_table_fits_80_columns_without_cutting(rows):
    compared, _ = held_out(rows)
    text = rendered(compared)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for method in (*METHODS.values(), *PICKS.values()):
        assert text.count(f"\n {method.label} ") == 5  # on one line, in every table


def test_missing_and_failed_tasks_are_named_under_every_table(rows):
    broken = [dict(row) for row in rows if not (row["method"] == "focal" and row["dataset"] == "wine")]
    next(row for row in broken if row["method"] == "focal")["accuracy"] = math.nan
    note = "focal: 24 tasks without a result and 1 with a non-finite accuracy are not in its means."
    assert note in to_markdown(compare(broken))
    assert note in " ".join(rendered(compare(broken)).split())
    assert "not in its means" not in to_markdown(compare(rows))


def test_tasks_that_a_measure_lacks_are_counted_for_it(rows):
    """Diverged runs have an accuracy, but no likelihood."""
    diverged = [dict(row) for row in rows]
    for row in [row for row in diverged if row["method"] == "focal"][:7]:
        row["nll"], row["auc"] = None, math.nan
    next(row for row in diverged if row["method"] == "focal")["accuracy"] = math.nan
    comparisons = compare(diverged)
    measures = {record["method"]: record["measures"] for record in to_records(comparisons)}
    got = [(measures["focal"][name]["non_finite"], measures["focal"][name]["tasks"]) for name in ("nll", "auc")]
    assert got == [(7, 89), (7, 89)] and measures["s5"]["nll"]["non_finite"] == measures["focal"]["nll"]["missing"] == 0
    text = to_markdown(comparisons)
    (note,) = re.findall(r"- focal: beside .*", text)
    assert "6 by AUC %, 6 by NLL." in note


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


def test_the_other_measures_and_the_pairs_are_in_tables_of_their_own(rows):
    compared, pairs = held_out(rows)
    text = to_markdown(compared, pairs)
    records = json.loads(json.dumps(to_records(compared), allow_nan=False))
    header, cells = markdown_cells(text, 1)
    names = {"balanced %": "balanced_accuracy", "NLL": "nll", "to best": "steps_to_best"}
    for record in records:
        assert "seconds" not in record["measures"], "the same run would give other records"
        for title, name in names.items():
            assert "p" in record["measures"][name] and "p_holm" not in record["measures"][name], "accuracy alone claims"
            measured, shown = record["measures"][name], cells[record["label"]][header.index(title)].strip("*")
            wanted = measured["value"] if record["method"] == "ce" else measured["difference"]
            assert float(shown.split()[0]) == pytest.approx(wanted, abs=0.006)
            assert measured["ratio"] == pytest.approx(
                measured["value"] / records[0]["measures"][name]["value"], abs=2e-4
            )
    policy = next(record for record in records if record["method"] == "policy")
    tally = "-".join(map(str, policy["won_tied_lost"]))
    assert cells[policy["label"]][-1].strip("*") == tally and sum(policy["won_tied_lost"]) == 4
    assert policy["p"] <= policy["p_holm"] <= 1
    shifted = policy["measures"]["balanced_accuracy"]["by_condition"]["shifted"]["difference"]
    column = header.index("balanced % shifted")
    assert float(cells[policy["label"]][column].strip("*").split()[0]) == pytest.approx(shifted, abs=0.006)
    _, against = markdown_cells(text, 2)
    for record in to_pair_records(pairs):
        assert record["method"] == "policy"
        other = next(each for each in records if each["method"] == record["against"])
        assert record["difference"] == pytest.approx(policy["diff_vs_ce"] - other["diff_vs_ce"], abs=2e-4)
        assert float(against[other["label"]][1].split()[0]) == pytest.approx(record["difference"], abs=0.006)


def test_what_no_noise_mixes_is_said():
    few = [row | {"condition": "as-is" if row["noise_rate"] == 0 else "noisy"} for row in few_rows()]
    few += [row | {"condition": "few-rows"} for row in few_rows() if row["noise_rate"] == 0]
    text = to_main_markdown(compare(few))
    assert "noise 0: all tasks to which no label noise was added, of the conditions as-is, few-rows;" in text
    assert "noise 0: all" not in to_main_markdown(compare(few_rows()))


def test_zero_has_one_sign():
    estimate = clustered_mean([-0.003, 0.001], "ab")
    assert signed(estimate).startswith("+0.00 (") and interval(clustered_mean([-0.001, -0.001], "ab")).count("-") == 0
