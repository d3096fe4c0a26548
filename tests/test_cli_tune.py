from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import palf_dist
from palf_dist.cli_tune import _seconds
from palf_dist.errors import ConfigError
from palf_dist.search.anytime import read_best
from palf_dist.search.ledger import Ledger
from tests.command import Command

CONFIGS = Path(palf_dist.__file__).parent.parent / "configs"
DIGITS = str(CONFIGS / "tune-digits.yaml")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_time_budgets_have_a_unit(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "0s", "-5m", "1d", "10 minutes", "nan"])
def test_other_time_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--time-budget .*90s, 10m or 1\.5h"):
        _seconds(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--config: name the YAML file of the run, for instance --config configs/tune-digits.yaml"),
        (("--config", DIGITS, "--time-budget", "ten"), "--time-budget ten"),
        (("--config", DIGITS, "--set", "searcher=tpe"), "--set: searcher: must be 'tuneloss', 'optuna' or 'random'"),
        (("--config", DIGITS, "--workers", "0"), "--set: concurrent: must be greater than or equal to 1"),
        (("--config", DIGITS, "--set", "target.dataset=nothing-like-it"), "nothing-like-it"),
        (("--resume", "nowhere"), "holds no run"),
        (
            ("--config", str(CONFIGS / "tune-quick.yaml"), "--set", "searcher=tuneloss"),
            "searcher: tuneloss searches the weights of a loss that is linear in them",
        ),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(cli: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in cli.refused("tune", *arguments)
    assert not [name for name in cli.files() if name.startswith("runs/")]


SMALL = {
    "name": "small",
    "target": {
        "kind": "loss_weights",
        "dataset": "digits",
        "rows": {"train": 60, "validation": 100, "test": 200},
        "model": {"kind": "softmax", "max_iterations": 30},
        "snapshots": 3,
    },
    "searcher": "tuneloss",
    "trials": 5,
    "tracking": {"enabled": False},
}


@pytest.mark.slow
def test_a_search_by_command_is_interrupted_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "palf_dist", "tune", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(CONFIGS.parent), "PALF_CACHE": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    process = start("--config", "small.yaml", "--run-dir", "run", "--json", "--workers", "1")
    end = time.monotonic() + 200
    while read_best(tmp_path / "run") is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name() == "raylet" for child in children), "the test sees too little"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    first = record(output)
    assert first["interrupted"] and "test_error" not in first and first["best_parameters"] is not None
    assert "interrupted and saved; go on with palf-dist tune --resume run" in errors

    before = [trial.parameters for trial in Ledger(tmp_path / "run").trials.values()]
    output, errors = start("--resume", "run", "--set", "trials=6", "--json").communicate(timeout=280)
    result = record(output)
    assert result["trials"] == {"finished": 6, "stopped": 0, "failed": 0, "unfinished": 0}, errors
    assert [trial.parameters for trial in Ledger(tmp_path / "run").trials.values()][: len(before)] == before
    assert 0.0 < result["test_error"] < 0.5 and result["validation_error"] <= first["validation_error"]
    assert set(result["best_parameters"]) == {"l1", "l2", "label_smoothing", "logit_penalty"}
    assert result["certificate"] is None and result["why_no_certificate"]
    assert result["trainings"] == 6 and result["gradient_evaluations"] > 0
    assert (tmp_path / "run" / "report" / "index.html").exists()


def record(output: str) -> dict[str, Any]:
    """The one line that --json prints."""
    (line,) = output.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found
