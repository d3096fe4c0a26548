"""Tracking with a real `mlflow server` that is killed, hangs, comes back, or is not there when the run starts."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palf_dist.tracking import Tracker, deliver_spool, open_tracker
from palf_dist.tracking_spool import Spool
from tests.test_tracking import client, config, history
from tests.tracking_server import Server, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def log(tracker: Tracker, steps: range) -> None:
    """Log known values."""
    for step in steps:
        tracker.log_metrics({"outer_loss": step / 7, "gradient_norm": 1.0 / (step + 1)}, step)


def assert_all_there(uri: str, run_id: str | None, steps: int) -> None:
    assert history(uri, run_id, "outer_loss") == {step: [step / 7] for step in range(steps)}
    assert history(uri, run_id, "gradient_norm") == {step: [1.0 / (step + 1)] for step in range(steps)}


def idle(run_dir: Path) -> bool:
    return next(Spool(run_dir).pending(), None) is None


def test_killed_and_restarted_in_mid_run(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "palf_dist.tracking")
    tracker = open_tracker(tmp_path, config(server.uri))
    log(tracker, range(100))
    wait_for(lambda: idle(tmp_path), 60)
    run_id = tracker.run_id
    assert run_id is not None

    server.kill()
    log(tracker, range(100, 200))
    wait_for(lambda: "MLflow takes no metrics" in caplog.text, 60)
    log(tracker, range(200, 300))
    assert sum(1 for _ in Spool(tmp_path).pending()) == 200, "all of it waits, and nothing was lost"

    server.start()
    log(tracker, range(300, 400))
    policy = tmp_path / "policy.json"
    policy.write_text("{}")
    tracker.log_artifact(policy)
    assert tracker.close(timeout=60) == 0
    assert tracker.run_id == run_id
    assert_all_there(server.uri, run_id, 400)
    run = client(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["name"] == "trial"
    assert [item.path for item in client(server.uri).list_artifacts(run_id)] == ["policy.json"]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1, "one outage, one warning"
    assert "MLflow answers again" in caplog.text


def test_a_server_that_hangs(server: Server, tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, config(server.uri))
    log(tracker, range(50))
    wait_for(lambda: idle(tmp_path), 60)
    server.signal(signal.SIGSTOP)
    try:
        log(tracker, range(50, 500))  # were one of them to wait for the server, all would take an hour
        time.sleep(3)  # long enough for a call that hangs to time out
        log(tracker, range(500, 600))
        assert tracker.close(timeout=2.0) == 550 + 1
    finally:
        server.signal(signal.SIGCONT)
    wait_for(server.answers, 30)
    assert deliver_spool(tmp_path) == 0, "what `palf-dist report` does"
    assert_all_there(server.uri, tracker.run_id, 600)
    assert client(server.uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_down_at_the_start_and_back_at_the_resume(server: Server, tmp_path: Path) -> None:
    server.kill()
    tracker = open_tracker(tmp_path, config(server.uri))
    log(tracker, range(20))
    assert tracker.close("KILLED", timeout=0.5) == 20 + 4
    assert tracker.run_id is None
    server.start()
    resumed = open_tracker(tmp_path, config(server.uri))
    log(resumed, range(15, 40))
    assert resumed.close(timeout=60) == 0
    assert_all_there(server.uri, resumed.run_id, 40)
    found = client(server.uri).search_runs(["1"], f"tags.`palf_dist.run_dir` = '{tmp_path}'")
    assert [run.info.run_id for run in found] == [resumed.run_id], "one run, made once"


def _drive(run_dir: Path, uri: str, first: int, logged: Any) -> None:
    tracker = open_tracker(run_dir, config(uri))
    for step in range(first, first + 30):
        log(tracker, range(step, step + 1))
        logged.send(step)
    time.sleep(600)


def test_a_driver_killed_with_kill_9(server: Server, tmp_path: Path) -> None:
    """Its delivery process goes on without it; the resumed driver goes on with the same MLflow run."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    driver = context.Process(target=_drive, args=(tmp_path, server.uri, 0, sender))
    driver.start()
    while not receiver.poll() or receiver.recv() < 29:
        time.sleep(0.01)
    driver.kill()
    driver.join()
    wait_for(lambda: idle(tmp_path), 60)
    run_id = Spool(tmp_path).run["run_id"]  # type: ignore[index]
    assert client(server.uri).get_run(run_id).info.status == "RUNNING"
    resumed = open_tracker(tmp_path, config(server.uri))
    log(resumed, range(25, 50))
    assert resumed.close(timeout=60) == 0
    assert resumed.run_id == run_id
    assert_all_there(server.uri, run_id, 50)
    assert client(server.uri).get_run(run_id).info.status == "FINISHED"
