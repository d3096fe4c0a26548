from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.cli_shared import output
from tests.command import SMOKE, Command


def test_help_is_quick_and_says_what_there_is() -> None:
    imported = (
        "import sys; from palf_dist import cli; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["meta-train", "evaluate", "report", "datasets"]),
        (("meta-train",), ["--config", "--set", "--run-dir", "--workers", "--address", "--resume", "--json"]),
        (("evaluate",), ["POLICY", "--config", "--set", "--workers", "--quick", "--json"]),
        (("report",), ["RUN_DIR", "--json"]),
        (("results",), ["RUN_DIR...", "--output", "--json"]),
        (("datasets",), ["list", "show", "fetch"]),
        (("datasets", "fetch"), ["NAME", "--suite", "palf12", "--json", "PALF_CACHE"]),
        (("datasets", "list"), ["--suite", "palf12", "--json"]),
    ],
)
def test_help_of_every_command(cli: Command, arguments: tuple[str, ...], words: list[str]) -> None:
    ended = cli(*arguments, "--help")
    assert ended.code == 0
    assert [word for word in words if word not in ended.out] == []


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "palf_dist", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("palf-dist ")


def test_json_mode_keeps_everything_else_off_stdout() -> None:
    script = """
import os, subprocess
from palf_dist.cli_shared import output
with output(True) as emit:
    print("python")
    os.write(1, b"native\\n")
    subprocess.run(["echo", "child"], check=True)
    emit({"a": 1}, None)
    print("late")
print("after")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == '{"a": 1}\nafter\n'
    assert sorted(done.stderr.split()) == ["child", "late", "native", "python"]


def test_json_mode_gives_stdout_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), output(True):
        1 / 0  # noqa: B018
    print("seen")
    assert capfd.readouterr().out == "seen\n"


def test_datasets_list(cli: Command) -> None:
    records = json.loads(cli("datasets", "list", "--json").out)["datasets"]
    (digits,) = [record for record in records if record["name"] == "digits"]
    assert (digits["family"], digits["rows"], digits["classes"], digits["cached"]) == ("image", 1797, 10, True)
    table = cli("datasets", "list").out
    assert [record["name"] for record in records if record["name"] not in table] == []


def test_datasets_show_and_fetch(cli: Command) -> None:
    shown = json.loads(cli("datasets", "show", "wine", "--json").out)
    assert (shown["rows"], shown["classes"], shown["numeric_columns"]) == (178, 3, 13)
    assert "178" in cli("datasets", "show", "wine").out
    paths = json.loads(cli("datasets", "fetch", "wine", "iris", "--json").out)["paths"]
    assert [pq.read_metadata(paths[name]).num_rows for name in ("wine", "iris")] == [178, 150]


def test_datasets_of_a_suite(cli: Command) -> None:
    records = json.loads(cli("datasets", "list", "--suite", "palf12", "--json").out)["datasets"]
    assert [record["name"] for record in records if record["fold"] == 0][:2] == ["fashion-mnist", "digits"]
    assert {record["fold"] for record in records} == {0, 1, None}
    table = cli("datasets", "list", "--suite", "palf12-hub").out
    assert "fold" in table and "hf://" in table and "fold" not in cli("datasets", "list").out
    suite = {
        "name": "own",
        "datasets": ["wine", "iris"],
        "folds": [["wine"], ["iris"]],
        "conditions": [{"name": "as-is"}],
    }
    (cli.folder / "own.yaml").write_text(json.dumps(suite))
    paths = json.loads(cli("datasets", "fetch", "digits", "--suite", "own.yaml", "--json").out)["paths"]
    assert {name: pq.read_metadata(path).num_rows for name, path in paths.items()} == {
        "wine": 178,
        "iris": 150,
        "digits": 1797,
    }


def test_suites_that_cannot_be_used(cli: Command) -> None:
    for command in ("list", "fetch"):
        assert "unknown suite palf-12: did you mean palf12?" in cli.refused("datasets", command, "--suite", "palf-12")
        assert "config file no.yaml cannot be read" in cli.refused("datasets", command, "--suite", "no.yaml")
    assert "name datasets, or a suite with --suite" in cli.refused("datasets", "fetch")


@pytest.mark.parametrize("command", ["show", "fetch"])
def test_unknown_dataset_names_the_nearest(cli: Command, command: str) -> None:
    assert "unknown dataset irs: did you mean iris?" in cli.refused("datasets", command, "irs")


@pytest.mark.parametrize("flag", [[], ["--json"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config: name the YAML file of the run"),
        (("--config", "none.yaml"), "none.yaml cannot be read (No such file or directory); name a YAML file"),
        (("--config", SMOKE, "--set", "inner.stepz=3"), "inner.stepz: unknown key; did you mean inner.steps?"),
        (("--config", SMOKE, "--set", "inner.steps=-3"), "inner.steps: must be greater than or equal to 1, not -3"),
        (("--config", SMOKE, "--set", "meta_learner.clip=.nan"), "meta_learner.clip: must be a finite number, not NaN"),
        (("--config", SMOKE, "--workers", "-1"), "workers: must be greater than or equal to 0 or 'auto', not -1"),
        (
            ("--config", SMOKE, "--workers", "all"),
            "distributed.workers: must be a valid integer or 'auto', not \"all\"",
        ),
        (("--config", SMOKE, "--set", "data.train=[mars]"), "unknown dataset mars"),
        (("--config", SMOKE, "--set", "evaluation.methods=[policy, tuned]"), "tuned"),
        (("--config", SMOKE, "--set", "tasks.train_size=[900, 900]"), "lower tasks.train_size"),
        (
            ("--config", SMOKE, "--set", "tasks.train_size=[70, 2000]"),
            "iris: a training size of 70 is larger than the data",
        ),
        (("--config", SMOKE, "--run-dir", "/proc/none/run"), "run directory: /proc/none/run cannot be used"),
        (("--resume", "runs/none"), "holds no run (config.yaml is missing); name the folder of an earlier run"),
        (("--resume", "a", "--run-dir", "b"), "--run-dir b: a resumed run goes on in its own folder"),
    ],
)
def test_meta_train_refuses(cli: Command, flag: list[str], arguments: tuple[str, ...], message: str) -> None:
    quick = ["--set", "tracking.enabled=false"] if "--config" in arguments else []
    workers = ["--workers", "0"] if "--workers" not in arguments else []
    assert message in cli.refused("meta-train", *arguments, *workers, *quick, *flag)


GOOD = {"x": np.arange(200) / 7, "label": np.arange(200) % 2}


@pytest.mark.parametrize(
    ("columns", "extra", "message"),
    [
        (None, [], "table.parquet"),
        ({"x": np.zeros(0), "label": np.zeros(0, int)}, [], "the table has no rows"),
        ({**GOOD, "label": np.zeros(200, int)}, [], "1 class(es)"),
        ({"x": GOOD["x"], "outcome": GOOD["label"]}, [], "no label column; name one of x, outcome in columns.label"),
        (GOOD, ["data.train.0.columns.label=y"], "columns.label names y, which the table does not have"),
        ({**GOOD, "label": np.linspace(0, 1, 200)}, [], "the label column label is double"),
        ({**GOOD, "empty": pa.nulls(200)}, [], "every value of column empty is null; list it in columns.drop"),
        ({**GOOD, "label": np.arange(200) % 70}, [], "70 classes, more than data.max_classes (64); raise it"),
        ({**GOOD, "label": np.arange(200) % 70}, ["data.max_classes=8"], "more than data.max_classes (8)"),
        (GOOD, ["tasks.train_size=[300, 300]"], "a training size of 300 is larger than the data allows"),
    ],
)
def test_meta_train_refuses_unfit_tables(
    cli: Command, columns: dict[str, np.ndarray | pa.Array] | None, extra: list[str], message: str
) -> None:
    if columns is not None:
        pq.write_table(pa.table(columns), cli.folder / "table.parquet")
    options = ["tracking.enabled=false", "data.train=[{name: mine, path: table.parquet}]", *extra]
    settings = [part for option in options for part in ("--set", option)]
    text = cli.refused("meta-train", "--config", SMOKE, "--workers", "0", *settings)
    assert message in text and ("mine" in text or "table.parquet" in text)
    assert not list(cli.folder.glob("runs/*")), "no run began, and nothing of it is left"


def test_run_directories_that_hold_something_are_left_alone(cli: Command) -> None:
    (cli.folder / "full").mkdir()
    (cli.folder / "full" / "notes.txt").write_text("mine")
    (cli.folder / "file").write_text("mine")
    start = ("meta-train", "--config", SMOKE, "--workers", "0", "--run-dir")
    assert "is not empty (it holds notes.txt)" in cli.refused(*start, "full")
    assert "cannot be used (Not a directory)" in cli.refused(*start, "file/run")
    assert "cannot be used (File exists)" in cli.refused(*start, "file")
    assert "Unrecognized filesystem type" in cli.refused(*start, "nowhere://bucket/run")
    assert "only meta-train, evaluate and report work on a URI" in cli.refused("tune", "--resume", "s3://bucket/run")
