"""Tuned baselines in whole runs: found once, kept over a stop, the same for any workers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palf_dist.checkpoint import latest_checkpoint
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.driver import evaluate_policy, train_policy
from palf_dist.progress import Progress
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config
from tests.distributed.test_driver import stop_after, train

COMPARED = {
    "evaluation": {
        **{"methods": ["policy", "ce", "elr", "focal_tuned"], "noise_rates": [0.3], "conditions": ["balanced"]},
        **{"seeds": 1, "select_every": 2, "select_tasks": 2},
    }
}


def found(run_dir: Path) -> dict[str, Any]:
    """What the newest checkpoint keeps of the tuning."""
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    return newest.state["prepared"].get("baselines", {})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    _, screen = train(small_config(**COMPARED), run_dir)
    assert "tuning baselines 28/28" in screen, "4 groups of ce and elr as they are, and of five values of gamma"
    return run_dir


def test_what_is_found_is_in_the_checkpoints_the_rows_and_the_report(undisturbed: Path) -> None:
    tuned = found(undisturbed)
    assert set(tuned) == {"ce", "elr", "focal_tuned"}
    (chosen,) = tuned["focal_tuned"].values()
    best = max(tuned, key=lambda method: tuned[method]["0/adam"]["accuracy"])
    table = json.loads((undisturbed / "report" / "table.json").read_text())
    records = {record["method"]: record for record in table["held_out"]}
    assert records["focal_tuned"]["chosen"] == [f"gamma = {chosen['hyperparameters']['gamma']:g} (mlp)"]
    assert any(best in text for text in records["best_static"]["chosen"])
    assert "best_static" in {pair["against"] for pair in table["pairs"]}
    assert "as chosen on meta-training tasks: gamma = " in (undisturbed / "report" / "index.html").read_text()


@pytest.mark.parametrize("unit", [("tune", 0, 20), ("meta_gradient", 1, 0), ("evaluate", 0, 0)], ids=str)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    unit: tuple[str, int, int], undisturbed: Path, tmp_path: Path
) -> None:
    """Once there is a checkpoint, nothing is tuned again."""
    config = small_config(**COMPARED)
    result, _ = train(config, tmp_path / "run", **stop_after(unit))
    assert result.interrupted
    _, screen = train(config, tmp_path / "run", resume=True)
    assert ("tuning baselines" in screen) == (unit[0] == "tune")
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed) and found(tmp_path / "run") == found(undisturbed)


def test_a_comparison_of_the_policy_alone_finds_the_same(undisturbed: Path) -> None:
    progress = Progress(Console(file=io.StringIO()))
    rows = evaluate_policy(small_config(**COMPARED), undisturbed / "best", progress=progress)
    (of_run,) = found(undisturbed)["focal_tuned"].values()
    assert {json.loads(row["tuned"])["gamma"] for row in rows if row["method"] == "focal_tuned"} == {
        of_run["hyperparameters"]["gamma"]
    }


def test_nothing_is_tuned_where_no_comparison_follows_and_all_of_it_where_one_does(
    undisturbed: Path, tmp_path: Path
) -> None:
    """A trial of a search, and the same taken up as a run of its own."""
    config = small_config(**COMPARED)
    for _ in train_policy(config, tmp_path / "run", progress=Progress(Console(file=io.StringIO()))):
        pass
    assert found(tmp_path / "run") == {}
    _, screen = train(config, tmp_path / "run", resume=True)
    assert "tuning baselines 28/28" in screen
    results = [fingerprint(run_dir)["results"] for run_dir in (tmp_path / "run", undisturbed)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(share: Share, undisturbed: Path, tmp_path: Path) -> None:
    train(small_config(**COMPARED, distributed={"workers": 2}), tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed) and found(tmp_path / "run") == found(undisturbed)
