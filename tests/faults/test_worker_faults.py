"""Whole runs on one Ray whose workers are killed and stopped at every point of a unit's way, several in one run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from palf_dist import faults
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import connect
from palf_dist.distributed.driver import RunResult, meta_train
from palf_dist.meta_learner import REFUSAL_CAUSES
from palf_dist.progress import Progress
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config

pytestmark = [pytest.mark.slow, pytest.mark.alone]

WORKERS = 3
SIZE: dict[str, dict[str, Any]] = {
    "inner": {"steps": 60, "batch_size": 8, "grids": {"adam": {"learning_rate": [0.01], "weight_decay": [0.0]}}},
    "meta_learner": {"outer_steps": 9, "groups_per_step": WORKERS},
}
"""An unroll takes longer than ``kill_soon``."""

Fault = tuple[str, int, int, str]  # point, outer step and group of the unit, action


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    with connect(DistributedConfig(workers=WORKERS)):
        yield


def run(
    run_dir: Path, planned: list[Fault], monkeypatch: pytest.MonkeyPatch, **distributed: Any
) -> tuple[RunResult, str]:
    """A run with these faults, each of which must have happened once; and what it had to say."""
    marks = [run_dir.with_name(f"fired-{number}") for number in range(len(planned))]
    injected = [
        {"point": point, "unit": ["meta_gradient", step, group], "action": action, "once_file": str(mark)}
        for (point, step, group, action), mark in zip(planned, marks, strict=True)
    ]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(injected))
    screen = io.StringIO()
    config = small_config(**SIZE, distributed={"workers": WORKERS, **distributed})
    result = meta_train(config, run_dir, progress=Progress(Console(file=screen, width=200)))
    assert all(mark.exists() for mark in marks), [mark.name for mark in marks if not mark.exists()]
    return result, screen.getvalue()


def stopped_processes() -> list[psutil.Process]:
    family = psutil.Process().children(recursive=True)
    return [process for process in family if process.status() == psutil.STATUS_STOPPED]


def test_synchronous_runs_end_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta_train(small_config(**SIZE), tmp_path / "undisturbed")
    one_by_one: list[Fault] = [
        ("before_unit", 0, 0, "kill"),
        ("in_unit", 1, 0, "kill_soon"),  # inside the unroll
        ("after_unit", 2, 0, "kill"),  # computed, not delivered
        ("driver_before_take", 3, 0, "kill"),  # delivered, not yet acknowledged: Ray has it, the driver has not read it
    ]
    two: list[Fault] = [("in_unit", 4, group, "kill_soon") for group in range(2)]
    everybody: list[Fault] = [("in_unit", 5, group, "kill") for group in range(WORKERS)]
    slow: list[Fault] = [("in_unit", 7, 1, "stop")]
    result, shown = run(tmp_path / "run", one_by_one + two + everybody + slow, monkeypatch)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "undisturbed")
    assert shown.count("died; it is replaced") == 9
    assert shown.count("it is issued a second time") >= 1 and "unit meta_gradient 7/1 has been with" in shown
    assert result.contributions["applied"] == 9 * WORKERS
    assert 8 <= result.contributions["reissued"] <= 9  # what was delivered is not done again
    psutil.wait_procs(stopped_processes(), timeout=15)
    assert not stopped_processes(), "a stopped worker outlived its run"


def test_asynchronous_runs_apply_every_contribution_at_most_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Fault] = [
        ("before_unit", 0, 1, "kill"),
        ("in_unit", 1, 0, "kill_soon"),
        ("after_unit", 1, 1, "nan"),
        ("after_unit", 1, 2, "kill"),
        ("driver_before_take", 2, 0, "kill"),
        ("in_unit", 2, 2, "stop"),
    ]
    steps = {**SIZE["meta_learner"], "outer_steps": 18}
    monkeypatch.setitem(SIZE, "meta_learner", steps)
    result, shown = run(tmp_path / "run", planned, monkeypatch, mode="async", unit_timeout=10)
    assert shown.count("died; it is replaced") >= 4
    assert result.contributions["reissued"] >= 3
    applied, refused = result.contributions["applied"], result.contributions["refused"]
    assert refused["non_finite"] >= 1 and refused["duplicate"] == 0
    assert applied + refused["non_finite"] + refused["outlier"] == result.outer_steps == 18
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert len(np.unique(checkpoint.learner["ledger"], axis=0)) == applied, "a unit was applied twice"
    assert checkpoint.state["issued"] == applied + sum(refused.values()), "a drop was not counted"
    assert len(list((tmp_path / "run" / "trajectories").rglob("*.parquet"))) == checkpoint.state["issued"]
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    assert sum(metrics["applied"]) == applied and max(metrics["applied"]) == 1
    assert {cause: sum(metrics[f"refused_{cause}"]) for cause in REFUSAL_CAUSES} == refused
