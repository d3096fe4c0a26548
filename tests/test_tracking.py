"""Tracking without a server: the spool, resumes, unreachable addresses, and that the driver never waits."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import palf_dist
from palf_dist.config import DataConfig, RunConfig, TrackingConfig
from palf_dist.tracking import NullTracker, deliver_spool, open_tracker
from palf_dist.tracking_delivery import Delivery, batches, follow
from palf_dist.tracking_spool import Spool

# MLflow and SQLAlchemy warn about their own insides when they are imported into this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DEAD = "http://127.0.0.1:9"  # nothing listens on the discard port


def config(uri: str | None = None, **tracking: Any) -> RunConfig:
    return RunConfig(
        name="trial", data=DataConfig(train=("iris",), held_out=("wine",)), tracking=TrackingConfig(uri=uri, **tracking)
    )


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(autouse=True)
def private_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes mlruns/ in the working folder of whoever opens a database, this process included."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow has just created: copying it saves each test the 10 s that takes."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    with contextlib.chdir(path.parent):
        client(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


def database(empty_database: Path, path: Path) -> str:
    """The URI of a new database at ``path``."""
    shutil.copy(empty_database, path)
    return f"sqlite:///{path}"


def history(uri: str, run_id: str | None, name: str) -> dict[int, list[float]]:
    """Step -> values, repetitions included."""
    found: dict[int, list[float]] = {}
    for metric in client(uri).get_metric_history(run_id, name):
        found.setdefault(metric.step, []).append(metric.value)
    return found


def deliver_here(run_dir: Path) -> list[str]:
    """Deliver in this process, as the delivery process does; what it reports."""
    messages: list[str] = []
    Delivery(Spool(run_dir), lambda level, message: messages.append(message)).deliver()
    return messages


def test_null_tracker(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, config(enabled=False))
    assert isinstance(tracker, NullTracker) and tracker.run_id is None
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_artifact(tmp_path)
    tracker.set_tags({"a": "b"})
    assert tracker.close() == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_sqlite_from_start_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parameters, metrics, artifacts, tags and status arrive; a resume goes on with the same run, steps done again
    are there once."""
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    run_dir = tmp_path / "run"
    (run_dir / "best").mkdir(parents=True)
    (run_dir / "best" / "policy.json").write_text("{}")
    (run_dir / "note.txt").write_text("note")
    tracker = open_tracker(run_dir, config(uri))
    for step in range(5):
        tracker.log_metrics({"outer_loss": step / 3, "odd": math.nan, "alpha[ce]": 1}, step)
    tracker.log_artifact(run_dir / "best")
    tracker.log_artifact(run_dir / "note.txt", "texts")
    tracker.set_tags({"colour": "blue"})
    assert tracker.close("KILLED", timeout=120) == 0

    run_id = tracker.run_id
    run = client(uri).get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("KILLED", "trial")
    assert run.data.params["meta_learner.learning_rate"] == "0.03"
    assert run.data.params["data.train"].startswith('[{"name": "iris"')
    assert run.data.tags["colour"] == "blue" and run.data.tags["palf_dist.run_dir"] == str(run_dir)
    assert {item.path for item in client(uri).list_artifacts(run_id, "best")} == {"best/policy.json"}
    assert {item.path for item in client(uri).list_artifacts(run_id, "texts")} == {"texts/note.txt"}
    assert (tmp_path / "store" / "mlruns").is_dir(), "artifacts lie beside their database"
    assert math.isnan(run.data.metrics["odd"]) and run.data.metrics["alpha_ce_"] == 1.0

    resumed = open_tracker(run_dir, config(uri))
    for step in range(3, 7):
        resumed.log_metrics({"outer_loss": step / 3}, step)
    assert resumed.close(timeout=120) == 0
    assert resumed.run_id == run_id
    assert history(uri, run_id, "outer_loss") == {step: [step / 3] for step in range(7)}
    assert client(uri).get_run(run_id).info.status == "FINISHED"
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_delivering_twice_changes_nothing(tmp_path: Path, empty_database: Path) -> None:
    """The mark may lag behind what was delivered: a kill between the two repeats the records."""
    uri = database(empty_database, tmp_path / "mlflow.db")
    tracker = open_tracker(tmp_path, config(uri))
    for step in range(60):
        tracker.log_metrics({f"m{index}": step + index / 8 for index in range(5)}, step)
    assert tracker.close(timeout=120) == 0
    spool = Spool(tmp_path)
    spool.delivered = 0
    assert deliver_here(tmp_path) == []
    assert history(uri, tracker.run_id, "m3") == {step: [step + 3 / 8] for step in range(60)}
    experiments = client(uri).search_experiments(filter_string="name = 'palf_dist'")
    assert len(client(uri).search_runs([experiments[0].experiment_id])) == 1


@pytest.mark.slow
def test_a_lost_run_record_finds_the_same_run_and_a_lost_database_gets_everything_again(
    tmp_path: Path, empty_database: Path
) -> None:
    uri = database(empty_database, tmp_path / "mlflow.db")
    tracker = open_tracker(tmp_path, config(uri))
    tracker.log_metrics({"a": 1.5}, 0)
    assert tracker.close(timeout=120) == 0
    run_id = tracker.run_id
    Spool(tmp_path).run = None
    Spool(tmp_path).delivered = 0
    deliver_here(tmp_path)
    assert tracker.run_id == run_id, "found by its tag: the answer to a create call may be lost"

    other = database(empty_database, tmp_path / "other.db")
    resumed = open_tracker(tmp_path, config(other))
    resumed.log_metrics({"a": 2.5}, 1)
    assert resumed.close(timeout=120) == 0
    assert resumed.run_id != run_id
    assert history(other, resumed.run_id, "a") == {0: [1.5], 1: [2.5]}

    database(empty_database, tmp_path / "other.db")
    again = open_tracker(tmp_path, config(other))
    assert again.close(timeout=120) == 0
    assert history(other, again.run_id, "a") == {0: [1.5], 1: [2.5]}


@pytest.mark.slow
def test_what_mlflow_refuses_is_reported_and_does_not_hold_up_the_rest(tmp_path: Path, empty_database: Path) -> None:
    uri = database(empty_database, tmp_path / "mlflow.db")
    tracker = open_tracker(tmp_path, config(uri))
    tracker._append("params", values={"name": "another value than before"})
    tracker.log_artifact(tmp_path / "missing.png")
    tracker.log_metrics({"a": 1.0}, 0)
    assert tracker.close(timeout=120) == 0
    Spool(tmp_path).delivered = 0
    messages = deliver_here(tmp_path)
    assert len(messages) == 2
    assert "MLflow refused 1 params record" in messages[0] and "missing.png was gone" in messages[1]
    assert history(uri, tracker.run_id, "a") == {0: [1.0]}


def test_an_unreachable_server_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Said once, not an error; close keeps to its time; the records wait."""
    caplog.set_level(logging.WARNING, "palf_dist.tracking")
    tracker = open_tracker(tmp_path, config(DEAD))
    for step in range(50):
        tracker.log_metrics({"a": float(step)}, step)
    deadline = time.monotonic() + 60
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "MLflow takes no metrics" in caplog.text
    left = tracker.close(timeout=1.0)
    assert left == 50 + 4  # started, parameters, tags, ended
    assert tracker.run_id is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert f"palf-dist report {tmp_path}" in caplog.records[1].getMessage()
    values = [record["values"]["a"] for record, _ in Spool(tmp_path).pending() if record["kind"] == "metrics"]
    assert values == [float(step) for step in range(50)]


def test_logging_never_waits_for_a_server_that_hangs(tmp_path: Path) -> None:
    """A socket that accepts and never answers. Each call only appends to the spool, whatever delivery does: one that
    waited would take seconds, and 2000 of them the whole time limit of the test."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        tracker = open_tracker(tmp_path, config(f"http://127.0.0.1:{hole.getsockname()[1]}"))
        hole.settimeout(60)
        connection, _ = hole.accept()
        for step in range(2000):
            tracker.log_metrics({"a": float(step), "b": 2.0}, step)
        assert tracker.close(timeout=0.5) == 2000 + 4
        connection.close()


def test_the_mark_moves_by_whole_batches(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.open_for_append()
    spool.append({"kind": "status"})
    for step in range(1200):
        spool.append({"kind": "metrics", "step": step, "values": {"a": 1, "b": 2}})
        if step == 700:
            spool.append({"kind": "tags"})
    spool.close()
    found = list(batches(spool.pending()))
    assert [(kind, len(group)) for kind, group, _ in found] == [
        ("status", 1),
        ("metrics", 500),
        ("metrics", 201),
        ("tags", 1),
        ("metrics", 499),
    ]
    for index, (_, _, offset) in enumerate(found):
        spool.delivered = offset
        rest = [record for record, _ in spool.pending()]
        assert rest == [record for _, group, _ in found[index + 1 :] for record in group]


def test_a_record_larger_than_a_batch_stands_alone() -> None:
    large = {"kind": "metrics", "values": {str(index): 0.0 for index in range(2500)}}
    small = {"kind": "metrics", "values": {"a": 0.0}}
    found = list(batches(iter([(small, 1), (large, 2), (small, 3)])))
    assert found == [("metrics", [small], 1), ("metrics", [large], 2), ("metrics", [small], 3)]


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.open_for_append()
    spool.append({"kind": "a"})
    spool._file.write(b'{"kind": "to')
    spool.close()
    assert [record for record, _ in Spool(tmp_path).pending()] == [{"kind": "a"}], "may still be being written"
    again = Spool(tmp_path)
    again.open_for_append()
    again.append({"kind": "b"})
    again.close()
    assert [record["kind"] for record, _ in again.pending()] == ["a", "b"]
    assert [record["kind"] for record in again.records()] == ["a", "b"]
    again.delivered = list(again.pending())[-1][1]
    assert list(again.pending()) == []


def test_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config, then environment, then the default; a resume stays where the run was unless another address is named."""
    from palf_dist.tracking import _destination

    def destination(uri: str | None, before: dict[str, Any] | None) -> dict[str, Any]:
        return _destination(TrackingConfig(uri=uri), "trial", before)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD)
    assert destination("http://a:1", None)["uri"] == "http://a:1"
    first = destination(None, None)
    assert first["uri"] == DEAD
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert destination(None, first) == first
    moved = destination("http://b:1", first)
    assert moved == {**first, "given": "http://b:1", "uri": "http://b:1"}
    default = destination(None, None)
    assert default["uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert destination(None, default) == default
    relative = destination("sqlite:///x.db", None)
    assert relative["uri"] == f"sqlite:///{tmp_path}/elsewhere/x.db"


def test_only_one_process_delivers(tmp_path: Path) -> None:
    tracker = open_tracker(tmp_path, config(DEAD))
    tracker.close(timeout=0.1)
    spool = Spool(tmp_path)
    from palf_dist.atomic import exclusive

    with exclusive(spool.lock):
        assert deliver_spool(tmp_path, timeout=60) == sum(1 for _ in spool.pending()) > 0
        reports: list[str] = []
        waits: list[float] = []

        def ended(seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) == 3

        assert follow(spool, 0.0, lambda level, message: reports.append(message), ended) == 1
    assert reports == [] and waits == [1.0, 1.0, 1.0], "waiting for another deliverer is no failure"


def test_retries_back_off_and_report_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.open_for_append()
    spool.destination = {"uri": "nonsense://x", "experiment": "e", "name": "n", "key": "k", "started": 0}
    spool.append({"kind": "status", "status": "RUNNING", "time": 0})
    spool.close()
    reports: list[tuple[int, str]] = []
    waits: list[float] = []

    def ended(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 7

    assert follow(spool, 0.0, lambda level, message: reports.append((level, message)), ended) == 1
    assert waits == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert len(reports) == 1 and reports[0][0] == logging.WARNING and str(spool.folder) in reports[0][1]


def test_nothing_to_deliver(tmp_path: Path) -> None:
    assert deliver_spool(tmp_path) == 0
    assert not list(tmp_path.iterdir())


def test_the_delivery_process_is_light() -> None:
    """It shares the machine with the training: no torch, no Ray, and MLflow only once there is something to deliver."""
    code = "import sys, palf_dist.tracking_delivery; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    root = Path(palf_dist.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
