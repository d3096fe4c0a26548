from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import palf_dist
from palf_dist.cli_tune import _seconds
from palf_dist.errors import ConfigError
from palf_dist.run_directory import CONFIG
from palf_dist.search.anytime import Best, read_best
from palf_dist.search.driver import SearchResult
from palf_dist.search.ledger import LEDGER, Ledger
from palf_dist.search.targets.snapshot import load_arrays
from tests.command import Command
from tests.processes import Process, Spawn, wait_until

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
        (("--config", DIGITS, "--concurrent", "0"), "--set: concurrent: must be greater than or equal to 1"),
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


def test_the_right_command_is_named_for_a_run_of_another(cli: Command) -> None:
    """Also where a run was killed before it wrote anything but its configuration."""
    for name, config in (("search", Path(DIGITS)), ("meta", CONFIGS / "smoke.yaml")):
        (cli.folder / name).mkdir()
        (cli.folder / name / CONFIG).write_bytes(config.read_bytes())
    message = cli.refused("tune", "--resume", "meta")
    assert message == (
        "error: --resume meta: holds no search; go on with palf-dist meta-train --resume meta, or with palf-dist "
        "evaluate --resume meta where it is an evaluation\n"
    )
    message = cli.refused("meta-train", "--resume", "search")
    assert message == "error: --resume search: holds a search; go on with palf-dist tune --resume search\n"
    shown = cli("report", "search")
    assert shown.code == 0 and "No trial has reported a finite error yet." in " ".join(shown.out.split()), shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [("minus_selection_score", {"selection_score": 2.5}), ("validation_error", {"validation_error": -2.5})],
)
def test_the_best_error_has_its_own_name_and_sign(name: str, shown: dict[str, float]) -> None:
    best = Best(trial=1, step=1, error=-2.5, parameters={}, trainings=1, seconds=0.0)
    record = SearchResult(Path("run"), name, best).record()
    assert {key: record[key] for key in ("selection_score", "validation_error") if key in record} == shown


SMALL: dict[str, Any] = {
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


Start = Callable[..., Process]


@pytest.fixture
def start(spawn: Spawn, tmp_path: Path) -> Start:
    """Starts the command in ``tmp_path``."""
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    return lambda *arguments: spawn("palf_dist", "tune", *arguments, cwd=tmp_path)


@pytest.mark.slow
def test_a_search_by_command_is_interrupted_and_resumed(start: Start, tmp_path: Path) -> None:
    process = start("--config", "small.yaml", "--run-dir", "run", "--json", "--concurrent", "1")
    assert wait_until(lambda: read_best(tmp_path / "run") is not None, process)
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


@pytest.mark.slow
def test_a_search_that_is_killed_half_way_ends_as_if_it_had_not_been(start: Start, tmp_path: Path) -> None:
    undisturbed = start("--config", "small.yaml", "--run-dir", "undisturbed", "--json")
    process = start("--config", "small.yaml", "--run-dir", "run", "--json")
    wait_until(lambda: Ledger(tmp_path / "run").ended >= 2, process)
    process.kill()
    process.wait()
    killed = Ledger(tmp_path / "run")
    assert 2 <= killed.ended < SMALL["trials"], "killed too early or too late to show anything"
    before = [trial.parameters for trial in killed.trials.values()]

    output, errors = start("--resume", "run", "--json").communicate(timeout=200)
    result, expected = record(output), record(undisturbed.communicate(timeout=200)[0])
    same = ("best_parameters", "validation_error", "best_trial", "test_error", "trials", "trainings")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}, errors
    ledger = Ledger(tmp_path / "run")
    assert [trial.parameters for trial in ledger.trials.values()][: len(before)] == before
    created = [line for line in (tmp_path / "run" / LEDGER).read_text().splitlines() if '"created"' in line]
    assert [json.loads(line)["trial"] for line in created] == list(range(1, SMALL["trials"] + 1))
    model, card = load_arrays(tmp_path / "run" / "best")
    assert model and card["validation_error"] == result["validation_error"]


def record(output: str) -> dict[str, Any]:
    """The one line that --json prints."""
    (line,) = output.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found
