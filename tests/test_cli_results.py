"""The published table from the command line, with a small suite in the place of palf12."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from palf_dist.cli_shared import near
from palf_dist.evaluation.results import BLOCK
from tests.command import SMOKE, Command

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evaluation.md"

SUITE: dict[str, Any] = {
    "name": "own",
    "datasets": ["digits", "wine", "iris", "breast_cancer"],
    "folds": [["digits", "wine"], ["iris", "breast_cancer"]],
    "conditions": [
        {"name": "as-is"},
        {"name": "noise-0.4", "noise_rate": 0.4},
        {"name": "shifted", "imbalance": 3.0, "target_prior": "uniform"},
    ],
}
UNTRACKED = ("--set", "tracking.enabled=false")
STAND_IN = """#!{python}
import sys
sys.argv[1:] = ["own.yaml" if word == "palf12" else word for word in sys.argv[1:]]
from palf_dist.cli import main
main()
"""


def make_results(folder: Path) -> str:
    """Run ``make results`` there, with the small suite for palf12; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.installed", "results", "BIN=bin", "ARGS=--workers 0"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_the_published_table_and_the_quick_look(cli: Command) -> None:
    """Every command of the page, and then ``make results``, which finds the runs as they are."""
    Path("own.yaml").write_text(yaml.safe_dump(SUITE))
    Path("configs").mkdir()
    shutil.copy(SMOKE, "configs/palf12.yaml")
    (commands,) = re.findall(r"```sh results\n(.*?)```", PAGE.read_text(), re.DOTALL)
    said = {}
    for line in commands.splitlines():
        program, command, *rest = ["own.yaml" if word == "palf12" else word for word in shlex.split(line)]
        assert program == ".venv/bin/palf-dist"
        workers = () if command == "results" else ("--workers", "0", "--set", "tracking.enabled=false")
        ended = cli(command, *rest, *workers)
        assert ended.code == 0, (line, ended.err)
        said[command] = ended
    assert set(said) == {"meta-train", "results", "evaluate"}

    record = json.loads(Path("docs/results.json").read_text())
    policy = next(each for each in record["table"] if each["method"] == "policy")
    assert set(policy["by_dataset"]) == set(SUITE["datasets"]) and policy["tasks"] == 4 * 3
    assert record["headline"]["diff_vs_tuned_ce"] == policy["diff_vs_ce"]
    assert set(record["not_measured"]) == {name for name, value in record["headline"].items() if value is None}
    known = {"diff_vs_tuned_ce", "diff_shifted_prior", "diff_vs_picked_static", "diff_vs_oracle"}
    assert not known & set(record["not_measured"])
    assert re.search(r"\nheld_out_designs +1\n", said["results"].out) and "mlflow  off" in said["results"].out
    assert "page    docs/results.md" in said["results"].out
    explained = record["interpretation"]
    assert explained["inner_runs"] == 2 * 4 * 2 * 2 and explained["left_out"] == 0, "folds, outer steps, groups, tasks"
    assert {*explained["not_measured"]} == {"phases"}, "three refreshes are too few"
    assert {"time", "entropy", "noise_rate"} < {*explained["importance"]["features"]}
    pictures = {path.stem for path in Path("docs/results").iterdir()}
    assert pictures == {"held_out", "noise", "alpha", "controls", "importance"}
    assert "figures are no results" in " ".join(said["evaluate"].out.split())
    assert "noise-0.4" in said["evaluate"].out

    (cli.folder / "bin").mkdir()
    stand_in = cli.folder / "bin" / "palf-dist"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    (cli.folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (cli.folder / "bin" / "python").chmod(0o755)
    Path("README.md").write_text(f"{BLOCK[0]}\nNot measured yet.\n{BLOCK[1]}\n")
    before = cli.files()
    printed = make_results(cli.folder)
    assert "meta-learned policy" in printed
    after = cli.files()
    shown = after["README.md"]
    assert shown is not None and b"| **meta-learned policy** |" in shown and shown.strip() in after["docs/results.md"]
    before["README.md"] = shown
    assert {name: after[name] for name in before} == before, "no run is done again, and the page is the same"

    Path("runs/palf12/fold-1/results.parquet").unlink()
    complaint = cli.refused("results", "runs/palf12/fold-0", "runs/palf12/fold-1", "--output", "docs")
    assert "runs/palf12/fold-1: has not been evaluated" in complaint
    make_results(cli.folder)
    again = json.loads(Path("docs/results.json").read_text())
    assert again == record, "all but the seconds, which only the page has"


def test_a_quick_evaluation_says_so_in_json_too(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the figures may be quoted is in the record."""
    from palf_dist.distributed import driver
    from palf_dist.policies import policy_file
    from tests.evaluation.synthetic import few_rows

    seen = []

    def evaluate_policy(config: Any, policy: Any, run_dir: Any, resume: bool) -> list[dict[str, Any]]:
        seen.append(config.evaluation.seeds)
        return few_rows()

    monkeypatch.setattr(driver, "evaluate_policy", evaluate_policy)
    monkeypatch.setattr(policy_file, "load_policy", lambda path: None)
    for options, quick in (((), False), (("--quick",), True)):
        ended = cli("evaluate", "policy", "--config", SMOKE, "--set", "evaluation.seeds=3", "--json", *options)
        assert json.loads(ended.out)["quick"] is quick
    assert seen == [3, 1]


def test_what_holds_out_a_family_is_said(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from palf_dist.config import DataConfig, RunConfig
    from palf_dist.evaluation import results, table

    runs = [{"name": "a", "family": None}, {"name": "b", "family": "image"}]
    record = {"headline": {}, "not_measured": {}, "targets": [], "claims": [], "designs": [], "runs": runs}
    config = RunConfig(data=DataConfig(train=("iris",), held_out=("wine",)))
    made = results.Results(Path("r.md"), Path("r.json"), (), (), record, config)
    monkeypatch.setattr(results, "make_results", lambda places, folder: made)
    monkeypatch.setattr(table, "to_rich", lambda comparisons: "")
    said = " ".join(cli("results", "a", "b", "--output", "docs", *UNTRACKED).out.split())
    assert said.count("family ") == 1 and "family image: b trained on none of it: no fold" in said


def test_a_run_that_is_none_is_one_message(cli: Command) -> None:
    foreign = cli.refused("results", "nowhere", "--output", "docs", "--set", "inner.steps=3")
    assert foreign.startswith("error: --set: inner: unknown key; known here: tracking")
    assert "nowhere holds no run" in cli.refused("results", "nowhere", "--output", "docs")
    assert not near(Path("docs").absolute()).exists()
