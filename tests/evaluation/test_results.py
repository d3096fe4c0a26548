"""The joined report: that of one run over the same rows, and figures that plain numpy finds as well."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation import results
from palf_dist.evaluation.overhead import OVERHEAD_JSON
from palf_dist.evaluation.report import make_report
from palf_dist.evaluation.results import BLOCK, _brief_table, _trajectories, make_results
from palf_dist.evaluation.results_file import results_bytes
from palf_dist.evaluation.runs import read_run, read_runs
from palf_dist.evaluation.statistics import compare
from palf_dist.evaluation.table import to_main_markdown
from tests.evaluation.judged import FEW, FOLDS, judged_folds, judged_run, rows_of
from tests.evaluation.synthetic import few_rows, result_rows

KEYS = ["dataset", "architecture", "noise_rate", "condition", "seed"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return make_results(judged_folds(folder / "runs", trajectories=1), folder / "docs")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two runs that are joined at once."""
    folder = tmp_path_factory.mktemp("small")
    return [
        judged_run(folder / name, [{**row, "origin": name} for row in few_rows() if row["dataset"] == name])
        for name in ("iris", "wine")
    ]


def test_the_brief_table_has_the_main_columns_of_the_full_one():
    kinds = [row | {"noise_kind": "pair_flip", "seed": 9} for row in result_rows(noise_rates=(0.3,), seeds=1)]
    comparisons = compare(result_rows(noise_rates=(0.0, 0.2, 0.4), seeds=1) + kinds)
    brief, full = (
        {line.split(" | ")[0]: line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")}
        for text in (_brief_table(comparisons, {"shifted"}), to_main_markdown(comparisons))
    )
    header, columns = ([cell.strip() for cell in cells["| method"]] for cells in (brief, full))
    assert header == ["method", "accuracy %", "difference", "95 % interval", "shifted", "noise 0", "noise 0.4"]
    assert "noise pair-flip 0.3" in columns and list(brief) == list(full)
    for name, cells in brief.items():
        if "---" not in name:
            assert [cell.strip() for cell in cells] == [full[name][columns.index(each)].strip() for each in header]


@pytest.mark.slow
def test_the_joined_report_is_that_of_one_run_over_all_rows(made, tmp_path):
    rows = [*chain.from_iterable(map(rows_of, FOLDS))]
    one = make_report(judged_run(tmp_path / "one", rows))
    table = json.loads((one.folder / "table.json").read_text())
    assert made.record["table"] == table["held_out"] and made.record["pairs"] == table["pairs"]
    page = made.markdown.read_text()
    _, start, rest = page.partition(BLOCK[0] + "\n")
    block, end, after = rest.partition(BLOCK[1] + "\n")
    assert start and end and (one.folder / "table.md").read_text() in after and "| noise 0.3 |" in block
    assert block.startswith("**The meta-learned policy reaches") and "| **meta-learned policy** |" in block
    assert "published here so far, this one among them: 1." in block
    for name in ("held_out", "noise"):
        assert (made.markdown.parent / "results" / f"{name}.png").read_bytes() == (
            one.folder / f"{name}.png"
        ).read_bytes()
        assert f"](results/{name}.png)" in page
    explained = {"alpha.png", "controls.png", "phases.png"}
    assert {path.name for path in made.pictures} == {"held_out.png", "noise.png", *explained}
    assert json.loads(made.json.read_text()) == made.record


def clustered(differences: pd.Series) -> tuple[float, float]:
    """Mean and standard error in points; the index has the dataset."""
    points = 100 * differences
    residuals = (points - points.mean()).groupby(level="dataset").sum()
    count = len(residuals)
    return points.mean(), float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / len(points))


@pytest.mark.slow
def test_the_headline_is_what_numpy_finds(made):
    frame = pd.DataFrame([*chain.from_iterable(map(rows_of, FOLDS))])
    wide = frame.pivot(index=KEYS, columns="method", values="accuracy")
    balanced = frame.pivot(index=KEYS, columns="method", values="balanced_accuracy")
    noise, condition = (wide.index.get_level_values(name) for name in ("noise_rate", "condition"))
    ahead = wide["policy"] - wide["ce"]
    mean, se = clustered(ahead)
    statics = ["ce", "s5", "focal"]
    best = "s5"  # by ``tuning_accuracy``
    oracle = wide[statics].max(axis=1)
    looks = frame.pivot(index=KEYS, columns="method", values="validation_accuracy")[statics]
    picked = wide[statics].where(looks.eq(looks.max(axis=1), axis=0)).mean(axis=1)

    def steps(row: pd.Series, target: float) -> float:
        return next((s for s, a in zip(row.curve_steps, row.curve_accuracy, strict=True) if a >= target), 150)

    def mean_curve(method: str) -> pd.Series:
        curves = frame[frame.method == method]
        mean = np.mean([*curves.curve_accuracy], axis=0)
        return pd.Series({"curve_steps": curves.curve_steps.iloc[0], "curve_accuracy": mean})

    rows = frame.set_index([*KEYS, "method"])
    taken = {
        name: np.mean(
            [steps(rows.loc[(*task, name)], max(rows.loc[(*task, "ce")].curve_accuracy)) for task in wide.index]
        )
        for name in ("policy", "ce")
    }
    expected = {
        "diff_vs_tuned_ce": mean,
        "se_clustered": se,
        "diff_vs_ce_by_validation": None,
        "diff_trainval": None,
        "diff_matched_prior": clustered(ahead[condition == "balanced"])[0],
        "diff_at_no_noise": clustered(ahead[(condition == "balanced") & (noise == 0)])[0],
        "diff_at_high_noise": clustered(ahead[(condition == "balanced") & (noise >= 0.3)])[0],
        "diff_shifted_prior": clustered((balanced["policy"] - balanced["ce"])[condition == "shifted"])[0],
        "diff_unseen_noise_pair_flip": None,
        "diff_unseen_noise_class_dependent": None,
        "diff_unseen_noise_instance_dependent": None,
        "noise_cost_regained": None,
        "diff_vs_best_static": clustered(wide["policy"] - wide[best])[0],
        "diff_vs_best_static_imbalanced": None,
        "diff_vs_own_schedule": clustered(wide["policy"] - wide["policy_schedule"])[0],
        "diff_vs_own_schedule_balanced": clustered((wide["policy"] - wide["policy_schedule"])[condition == "balanced"])[
            0
        ],
        "diff_vs_learned_schedule": None,
        "diff_vs_learned_schedule_balanced": None,
        "diff_vs_shuffled": None,
        "diff_vs_picked_static": clustered(wide["policy"] - picked)[0],
        "diff_vs_oracle": clustered(wide["policy"] - oracle)[0],
        "steps_to_ce_best_ratio": taken["policy"] / taken["ce"],
        "steps_to_ce_best_mean_ratio": steps(mean_curve("policy"), mean_curve("ce").curve_accuracy.max())
        / mean_curve("ce").curve_steps[mean_curve("ce").curve_accuracy.argmax()],
        "diff_architecture_transfer": None,
        "diff_horizon_transfer": None,
        "datasets_below_ce_as_is": None,
        "diff_as_is": None,
        "overhead_percent": None,
        "diff_more_tasks": None,
        "falls_with_more_tasks": None,
        "held_out_designs": 1,
    }
    assert made.record["headline"] == {
        name: value if value is None else pytest.approx(value, abs=1e-4) for name, value in expected.items()
    }
    assert list(made.record["headline"]) == list(expected)
    assert set(made.record["not_measured"]) == {name for name, value in expected.items() if value is None}
    details = made.record["headline_details"]
    assert details["diff_vs_best_static"]["against"] == "best_static"
    shifted = clustered((balanced["policy"] - balanced["ce"])[condition == "shifted"])[1]
    assert details["diff_shifted_prior"]["se"] == pytest.approx(shifted, abs=1e-4)
    assert details["diff_at_no_noise"]["tasks"] == ((condition == "balanced") & (noise == 0)).sum() == 8
    assert details["diff_vs_tuned_ce"]["unit"] == "points"
    assert details["steps_to_ce_best_ratio"]["unit"] == "inner steps"
    page = made.markdown.read_text()
    assert (
        f"| `diff_vs_tuned_ce` | all tasks, against tuned CE | {mean:+.2f} (" in page
        and "| `overhead_percent` | not measured: " in page
    )


@pytest.mark.slow
def test_equal_runs_give_equal_bytes_whatever_their_order_and_place(tmp_path, small):
    one, two = tmp_path / "one", tmp_path / "elsewhere" / "two"
    make_results(small, one)
    again = [str(Path(run).rename(tmp_path / Path(run).name)) for run in small]
    make_results(again[::-1], two)
    for new, old in zip(again, small, strict=True):
        Path(new).rename(old)
    first = contents(one)
    assert first == contents(two)
    make_results(small, one)
    assert contents(one) == first, "nor does a second time change anything"


@pytest.mark.slow
def test_results_alone_give_the_page_of_their_runs(tmp_path, small):
    """Of runs without trajectories, all of it."""
    files = []
    for index, run in enumerate(map(read_run, small)):
        files.append(tmp_path / f"any-{index}.parquet")
        files[-1].write_bytes(results_bytes(run.rows, run.config, run.card))
    of_runs, of_files = (
        make_results([*map(str, places)], tmp_path / name) for name, places in (("a", small), ("b", files))
    )
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and of_runs.record == of_files.record
    assert of_files.record["interpretation"] is None


def test_designs_are_counted_and_never_dropped(tmp_path, small):
    docs = tmp_path / "docs"
    assert make_results(small, docs).record["headline"]["held_out_designs"] == 1

    def changed(*overrides):
        """The same results by another configuration."""
        names = ("iris", "wine")
        rows = {name: [{**row, "origin": name} for row in few_rows() if row["dataset"] == name] for name in names}
        folder = tmp_path / "-".join(overrides).replace("/", "")
        return [judged_run(folder / name, rows[name], *overrides) for name in names]

    same = make_results(changed("policy.seed=3", "name=other"), docs).record
    assert same["headline"]["held_out_designs"] == 1 and [each["name"] for each in same["designs"]] == ["other"]
    assert same["designs"][0]["datasets"] == ["iris", "wine"] and same["designs"][0]["seed"] == 0
    record = make_results(changed("policy.hidden=8", "name=narrow"), docs).record
    assert [each["name"] for each in record["designs"]] == ["other", "narrow"]
    assert record["headline"]["held_out_designs"] == 2 == len({each["digest"] for each in record["designs"]})
    assert record["designs"][1]["diff_vs_tuned_ce"] == record["headline"]["diff_vs_tuned_ce"]
    back = make_results(small, docs)
    assert [each["name"] for each in back.record["designs"]] == ["suite", "narrow"], "in the place it had"
    assert back.markdown.read_text().count("this one among them: 2.\n") == 1
    earlier = json.loads(back.json.read_text())
    earlier["designs"][0]["diff_vs_tuned_ce"] = -1.5
    back.json.write_text(json.dumps(earlier))
    again = make_results(small, docs).markdown.read_text()
    assert "this one among them: 3. The same one, trained or judged at other times: -1.50 points against" in again


def test_trajectories_of_two_versions_are_named(small, monkeypatch):
    folds = read_runs(small).folds
    one = pa.table({"inner_step": [0], "alpha_ce": [1.0]})
    tables = {folds[0].place: one, folds[1].place: one.append_column("alpha_elr", pa.array([0.0]))}
    monkeypatch.setattr(results, "last_trajectories", tables.get)
    with pytest.raises(RunDirectoryError, match=rf"{folds[1].place}: its trajectories have other columns than .*iris"):
        _trajectories(folds)
    tables[folds[1].place] = one
    assert _trajectories(folds)["run"].to_pylist() == [0, 1]


def test_an_output_elsewhere_is_refused_and_makes_no_folder(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match="--output s3://bucket/docs: is no local folder"):
        make_results(small, "s3://bucket/docs")
    assert not contents(tmp_path)


@pytest.mark.parametrize("text", ["{torn", "[]", '{"designs": 3}', '{"designs": [{"name": "a"}]}', "{}"])
def test_a_file_whose_designs_would_be_lost_is_not_replaced(tmp_path, small, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"results\.json: is no file of this command .*restore it"):
        make_results(small, tmp_path)
    assert contents(tmp_path) == {"results.json": text.encode()}


def test_an_output_that_cannot_be_written_is_named(tmp_path, small):
    (tmp_path / "docs").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"--output .*docs: cannot be written"):
        make_results(small, tmp_path / "docs")


@pytest.mark.slow
def test_families_and_a_learned_schedule_are_measured_where_there_are_runs_of_them(tmp_path):
    folds = judged_folds(tmp_path)
    family = judged_run(tmp_path / "images", rows_of(["fashion_mnist"]), train=("iris", "newsgroups"))
    slower = [
        judged_run(
            tmp_path / f"schedule-{index}",
            [row | {"accuracy": row["accuracy"] - 0.01 * (row["method"] == "policy")} for row in rows_of(datasets)],
            "policy.kind=schedule",
        )
        for index, datasets in enumerate(FOLDS)
    ]
    made = make_results([*slower, family, *folds], tmp_path / "docs")
    record = made.record
    assert record["headline"]["diff_vs_learned_schedule"] == 1.0
    methods = {each["method"]: each for each in record["table"]}
    assert set(methods) >= {*FEW, "learned_schedule"} and methods["learned_schedule"]["tasks"] == 32
    assert record["families"][0]["method"] == "ce"
    assert {run["family"] for run in record["runs"]} == {None, "image"}
    page = made.markdown.read_text()
    alone = page[page.index("## Families never seen") : page.index("## The claims of the paper")]
    ahead = record["family_headline"]["diff_vs_tuned_ce"]
    assert f"| `diff_vs_tuned_ce` | all tasks, against tuned CE | {ahead:+.2f} |" in alone
    (target,) = (each for each in record["targets"] if "families never seen" in each["target"])
    assert target["verdict"] == "not measured" and target["measured"].startswith(f"{ahead:+.2f}")
    assert "1 independent datasets" in target["measured"]
    assert "## Families never seen" in page and "learned schedule (t/T only)" in page
    (claim,) = (each for each in record["claims"] if "families never seen" in each["claim"])
    assert claim["verdict"] == "not measured" and "1 independent datasets" in claim["measured"]
    assert (
        record["family_headline"]["diff_vs_tuned_ce"] == methods["policy"]["by_dataset"]["fashion_mnist"]["diff_vs_ce"]
    )


def test_datasets_as_they_are_and_the_overhead_are_on_the_page(tmp_path):
    conditions = "evaluation.suite_conditions=[{name: balanced}]"
    rows = [row for row in few_rows() if row["noise_rate"] == 0]
    worse = [
        row
        | {"origin": row["dataset"], "seed": seed, "accuracy": 0.7 - (row["method"] == "policy") * (0.1 + seed / 99)}
        for row in rows
        for seed in range(3)
    ]
    run = judged_run(tmp_path / "run", worse, conditions)
    docs = tmp_path / "docs"
    docs.mkdir()
    asked = {"policy": "robust", "refresh": 100}
    cell = asked | {"model": "MLP", "batch": 64, "percent": 4.25, "ci95": [3.0, 5.0], "plain": 100}
    measured = asked | {"digest": "ab" * 32, "threads": 1, "torch": "2.9.1"}
    (docs / OVERHEAD_JSON).write_text(json.dumps({"rounds": 31, **measured, "cells": [cell]}))
    made = make_results([run], docs)
    record, page = made.record, made.markdown.read_text()
    assert record["as_is"]["significantly_below"] == ["iris", "wine"] and record["headline"]["overhead_percent"] == 4.25
    assert record["headline"]["datasets_below_ce_as_is"] == 2
    section = page[page.index("## Datasets as they are") : page.index("## The claims of the paper")]
    assert "The unit here is the task" in section and "\n| wine | -11.01 (" in section
    assert "points on every dataset): iris, wine | 2 |" in page
    assert "| 3.2 % of additional training time (5.2) | 4.2 percent of additional training time, MLP" in page
    assert "\n| tuned CE, matched prior | +3.0 or more | " in page
    (docs / OVERHEAD_JSON).write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"results_overhead\.json: is no file of"):
        make_results([run], docs)


def test_what_the_rows_do_not_hold_is_null_with_a_reason(tmp_path):
    def poor(datasets):
        rows = rows_of(datasets, ("policy", "ce"))
        kept = [{**row, "noise_rate": 0.15} for row in rows if (row["condition"], row["noise_rate"]) == ("balanced", 0)]
        return [{name: value for name, value in row.items() if not name.startswith("curve_")} for row in kept]

    runs = [judged_run(tmp_path / str(index), poor(datasets)) for index, datasets in enumerate(FOLDS)]
    record = make_results(runs, tmp_path / "docs").record
    measured = {name for name, value in record["headline"].items() if value is not None}
    assert measured == {
        "diff_vs_tuned_ce",
        "se_clustered",
        "diff_matched_prior",
        "held_out_designs",
    }
    assert set(record["not_measured"]) == set(record["headline"]) - measured
    assert all(len(reason) > 20 for reason in record["not_measured"].values())
