from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

import pyarrow.parquet as pq
import pytest

from palf_dist.run_directory import CONFIG
from palf_dist.usage import usage
from tests.command import SMOKE, Command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """What ``meta-train --json`` printed for one whole run in the folder ``whole``."""
    command = [sys.executable, "-m", "palf_dist", "meta-train", "--config", SMOKE, "--workers", "0"]
    private = {**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "PALF_CACHE": str(folder / "cache")}
    command += ["--run-dir", "whole", "--json"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=private, timeout=250)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture
def run(folder: Path, result: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the whole run, to spoil."""
    return Path(shutil.copytree(result["run_dir"], tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_json_of_a_run(folder: Path, result: dict[str, Any]) -> None:
    assert Path(result["run_dir"]) == folder / "whole"
    assert result["outer_steps"] == 4
    assert Path(result["policy"]).is_file()
    assert set(result["contributions"]) == {"applied", "reissued", "refused"}
    assert result["contributions"]["applied"] == 8
    assert [set(row) >= {"method", "accuracy", "diff_vs_ce", "se"} for row in result["held_out"]] == [True] * 5
    assert {row["method"] for row in result["held_out"]} == {
        "policy",
        "ce",
        "s5",
        "static_oracle",
        "static_by_validation",
    }
    assert not result["interrupted"]
    assert all(Path(picture).is_file() for picture in result["pictures"])


def test_the_run_is_in_mlflow(folder: Path, result: dict[str, Any]) -> None:
    script = "import mlflow, sys; print(mlflow.MlflowClient('sqlite:///mlflow.db').get_run(sys.argv[1]).info.status)"
    command = [sys.executable, "-c", script, result["mlflow_run_id"]]
    shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "FINISHED"


def test_evaluate_gives_the_run_s_own_table_again(cli: Command, result: dict[str, Any]) -> None:
    ended = cli("evaluate", result["policy"], "--workers", "0", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["held_out"] == result["held_out"]


def test_an_evaluation_that_is_interrupted_goes_on(
    cli: Command, result: dict[str, Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = {"point": "after_unit", "unit": ["evaluate", 0, 1], "action": "interrupt"}
    monkeypatch.setenv("PALF_FAULTS", json.dumps([fault]))
    ended = cli("evaluate", result["policy"], "--workers", "0", "--run-dir", "kept")
    monkeypatch.delenv("PALF_FAULTS")
    assert ended.code == 128 + signal.SIGINT, ended.err
    assert "go on with palf-dist evaluate --resume kept" in ended.err and "Traceback" not in ended.err
    other = cli.refused("evaluate", "--resume", "kept", "--workers", "0", "--set", "inner.steps=13")
    assert "inner.steps: 12 in the run, 13 now" in other
    assert "leave --run-dir out" in cli.refused("evaluate", "--resume", "kept", "--run-dir", "elsewhere")
    assert "--resume kept: --quick gives no results" in cli.refused("evaluate", "--resume", "kept", "--quick")
    assert "go on with palf-dist meta-train --resume" in cli.refused("evaluate", "--resume", str(run))
    assert "palf-dist evaluate --resume kept" in cli.refused("meta-train", "--resume", "kept", "--workers", "0")
    assert "POLICY: name the policy to evaluate" in cli.refused("evaluate")
    assert "holds no search; go on with palf-dist meta-train" in cli.refused("tune", "--resume", "kept")
    begun = cli.folder / "begun" / CONFIG
    begun.parent.mkdir()
    shutil.copy(cli.folder / "kept" / CONFIG, begun)
    assert "begun: holds no policy yet; go on with palf-dist meta-train" in cli.refused("evaluate", "--resume", "begun")
    ended = cli("evaluate", "--resume", "kept", "--workers", "0", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["held_out"] == result["held_out"]


def test_report_again(cli: Command, result: dict[str, Any], run: Path) -> None:
    shutil.rmtree(run / "report")
    shown = cli("report", str(run))
    assert shown.code == 0, shown.err
    assert "meta-learned policy" in shown.out and "run/report/index.html" in shown.out
    record = json.loads(cli("report", str(run), "--json").out)
    assert record["held_out"] == result["held_out"]
    assert Path(record["page"]).is_file()


def test_interrupt_then_resume_gives_the_same_policy(
    cli: Command, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = {"point": "driver_after_apply", "unit": ["driver", 1, 0], "action": "interrupt"}
    start = ("meta-train", "--config", SMOKE, "--workers", "0", "--set", "tracking.enabled=false", "--run-dir", "cut")
    monkeypatch.setenv("PALF_FAULTS", json.dumps([fault]))
    ended = cli(*start)
    monkeypatch.delenv("PALF_FAULTS")
    assert ended.code == 128 + signal.SIGINT, ended.err
    assert "go on with palf-dist meta-train --resume cut" in ended.err
    assert "Traceback" not in ended.err
    ended = cli("meta-train", "--resume", "cut", "--workers", "0")
    assert ended.code == 0, ended.err
    assert indent(usage("cut/best/policy.safetensors"), "    ") in ended.out and "meta-learned policy" in ended.out
    assert (cli.folder / "cut" / "best" / "policy.safetensors").read_bytes() == Path(result["policy"]).read_bytes()


def test_a_run_with_every_outer_term_and_the_shield_tells_what_they_did(cli: Command) -> None:
    terms = {
        "information": 0.1,
        "gamma": 0.1,
        "running_sum": 0.1,
        "entropy": -0.1,
        "total_variation": 1,
        "stability": 1,
    }
    settings = [*(f"outer_loss.{name}={value:.1f}" for name, value in terms.items()), "policy.shield=0.9"]
    options = [part for setting in (*settings, "tracking.enabled=false") for part in ("--set", setting)]
    ended = cli("meta-train", "--config", SMOKE, "--workers", "0", *options, "--run-dir", "rich")
    assert ended.code == 0, ended.err
    assert "AdaptiveLoss" not in ended.out, "it refuses such a policy"
    rows = pq.read_table(cli.folder / "rich" / "metrics.parquet").to_pylist()
    names = {*terms, "validation", "cross_entropy", "gradient_variance"} - {"gamma"}
    wanted = {"shield_share", *(f"outer_{name}" for name in names)}
    assert len(rows) == 4 and all(all(row[name] is not None for name in wanted) for row in rows)
    results = pq.read_table(cli.folder / "rich" / "results.parquet").to_pylist()
    assert all((row["shield_share"] is None) == (row["method"] != "policy") for row in results)


def test_resume_with_another_configuration_names_the_fields(cli: Command, run: Path) -> None:
    before = contents(run)
    changes = ("--set", "inner.steps=13", "--set", "tasks.noise.high=0.5")
    message = cli.refused("meta-train", "--config", SMOKE, "--workers", "0", "--resume", str(run), *changes)
    assert "inner.steps: 12 in the run, 13 now" in message
    assert "tasks.noise.high: 0.6 in the run, 0.5 now" in message
    assert contents(run) == before


def test_a_used_run_directory_is_not_started_over(cli: Command, run: Path) -> None:
    before = contents(run)
    message = cli.refused("meta-train", "--config", SMOKE, "--workers", "0", "--run-dir", str(run))
    assert "is not empty" in message and f"--resume {run}" in message
    assert contents(run) == before


def test_a_torn_checkpoint_is_passed_over(cli: Command, result: dict[str, Any], run: Path) -> None:
    newest = max((run / "checkpoints").iterdir()) / "learner.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    ended = cli("meta-train", "--resume", str(run), "--workers", "0", "--set", "tracking.enabled=false")
    assert ended.code == 0, ended.err
    assert newest.parent.name in ended.err
    assert (run / "best" / "policy.safetensors").read_bytes() == Path(result["policy"]).read_bytes()


def test_a_damaged_configuration_is_refused(cli: Command, run: Path) -> None:
    (run / CONFIG).write_text("inner: {stepz: 3}")
    assert "inner.stepz: unknown key; did you mean inner.steps?" in cli.refused("meta-train", "--resume", str(run))
    assert "inner.stepz" in cli.refused("report", str(run))


def test_policy_files_of_a_newer_version_or_with_other_tensors(cli: Command, run: Path) -> None:
    best = run / "best"
    card = json.loads((best / "policy.json").read_text())
    (best / "policy.json").write_text(json.dumps({**card, "format_version": 99}))
    assert "format_version 99 is newer than" in cli.refused("evaluate", str(best), "--workers", "0")
    (best / "policy.json").write_text(json.dumps(card))
    tensors = bytearray((best / "policy.safetensors").read_bytes())
    tensors[-1] ^= 1
    (best / "policy.safetensors").write_bytes(tensors)
    assert "restore both" in cli.refused("evaluate", str(best), "--workers", "0")
    assert "there is no policy.safetensors" in cli.refused("evaluate", "nowhere", "--workers", "0")


def test_evaluate_needs_a_config_that_fits(cli: Command, run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "best", tmp_path / "elsewhere" / "best"))
    assert "--config: name the YAML file" in cli.refused("evaluate", str(alone))
    other = ("--config", SMOKE, "--set", "policy.kind=palf", "--workers", "0")
    assert "not a policy of this configuration" in cli.refused("evaluate", str(alone), *other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "5000"], "distributed.workers: 5000 workers"),
        (["--workers", "1", "--address", "127.0.0.1:1"], "distributed.address: no Ray head answers at 127.0.0.1:1"),
        (["--workers", "1", "--address", "somewhere"], "'somewhere' is neither 'auto' nor HOST:PORT"),
    ],
)
def test_clusters_that_cannot_be_had(cli: Command, options: list[str], message: str) -> None:
    assert message in cli.refused("meta-train", "--config", SMOKE, "--run-dir", "none", *options)
    assert not (cli.folder / "none" / CONFIG).exists()
