"""A search in MLflow: one run with a child per trial, through one spool, whatever is killed on the way."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from palf_dist.config import TrackingConfig
from palf_dist.tracking import MLflowTracker, SearchTracker, open_search_tracker
from palf_dist.tracking_delivery import batches
from palf_dist.tracking_spool import Spool
from tests.test_tracking import DEAD, client, deliver_here, history

# MLflow and SQLAlchemy warn about their own insides when they are imported into this process.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def private_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes mlruns/ in the working folder of whoever opens a database, this process included."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests of this file; whoever comes first makes its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def open_search(run_dir: Path, uri: str, **tracking: Any) -> SearchTracker:
    return open_search_tracker(
        run_dir,
        name="search",
        tracking=TrackingConfig(uri=uri, **tracking),
        params={"searcher": "tuneloss", "space": {"ce": {"low": 0.01, "high": 1}}},
    )


def spooled(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in Spool(run_dir).records() if record["kind"] == kind]


def runs(uri: str, run_dir: Path) -> dict[str, Any]:
    """The search's run under its name, and all below it under theirs, each found once."""
    api = client(uri)
    (experiment,) = api.search_experiments(filter_string="name = 'palf_dist'")
    (search,) = api.search_runs([experiment.experiment_id], f"tags.`palf_dist.run_dir` = '{run_dir}'")
    below = api.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{search.info.run_id}'")
    named = {run.info.run_name: run for run in [search, *below]}
    assert len(named) == 1 + len(below), "no trial has two runs"
    return named


def statuses(named: dict[str, Any]) -> dict[str, str]:
    return {name: run.info.status for name, run in named.items()}


def wait_for_trials(run_dir: Path, count: int) -> dict[str, str]:
    """The run ids of the trials, once there are ``count`` of them and nothing is left to deliver."""
    spool = Spool(run_dir)
    deadline = time.monotonic() + 120
    while len(spool.run_ids) < 1 + count or next(spool.pending(), None) is not None:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return {name: run_id for name, run_id in spool.run_ids.items() if name is not None}


def test_nothing_is_tracked_where_it_is_switched_off(tmp_path: Path) -> None:
    search = open_search(tmp_path, DEAD, enabled=False)
    trial = search.child("00000", {"ce": 0.5})
    trial.log_metrics({"error": 0.1}, 1)
    trial.set_tags({"a": "b"})
    trial.close("FAILED")
    assert (trial.run_id, search.run_id, search.close("KILLED")) == (None, None, 0)
    assert not list(tmp_path.iterdir())


def test_records_of_trials_carry_their_number(tmp_path: Path) -> None:
    search = open_search(tmp_path, DEAD)
    search.log_metrics({"best_error": 0.2}, 1)
    trial = search.child("00007", {"weights": {"ce": 0.5}, "kind": "start"})
    trial.log_metrics({"error": 0.2}, 3)
    trial.set_tags({"a": "b"})
    trial.close("FAILED")
    assert trial.run_id is None and search.close(timeout=0) > 0
    own = [record for record in Spool(tmp_path).records() if record.get("run") == "00007"]
    assert [record["kind"] for record in own] == ["status", "params", "metrics", "tags", "status"]
    assert own[1]["values"] == {"weights.ce": "0.5", "kind": "start"}
    assert [record["status"] for record in own if record["kind"] == "status"] == ["RUNNING", "FAILED"]
    assert [record["values"] for record in spooled(tmp_path, "params") if "run" not in record] == [
        {"searcher": "tuneloss", "space.ce.low": "0.01", "space.ce.high": "1"}
    ]


def test_a_resume_opens_the_same_trials_and_the_end_closes_them(tmp_path: Path) -> None:
    """Parameters are said once, a step done again keeps its time, and no trial is left running by either end."""
    first = open_search(tmp_path, DEAD)
    first.child("00000", {"ce": 0.5}).close()
    for number in ("00001", "00002"):
        first.child(number, {"ce": 0.1}).log_metrics({"error": 0.3}, 1)
    first.close("KILLED", timeout=0)
    second = open_search(tmp_path, DEAD)
    second.child("00001", {"ce": 0.7}).log_metrics({"error": 0.3}, 1)
    second.close(timeout=0)
    status = [(record.get("run"), record["status"]) for record in spooled(tmp_path, "status")]
    assert status == [
        *[(None, "RUNNING"), ("00000", "RUNNING"), ("00000", "FINISHED"), ("00001", "RUNNING"), ("00002", "RUNNING")],
        *[("00001", "KILLED"), ("00002", "KILLED"), (None, "KILLED")],
        *[(None, "RUNNING"), ("00001", "RUNNING"), ("00001", "KILLED"), (None, "FINISHED")],
    ]
    assert [record.get("run") for record in spooled(tmp_path, "params")] == [None, "00000", "00001", "00002"]
    again = [record for record in spooled(tmp_path, "metrics") if record["run"] == "00001"]
    assert len(again) == 2 and again[0] == again[1]
    assert {"run": "00002"}.items() <= spooled(tmp_path, "metrics")[1].items()


def test_a_trial_left_running_by_a_kill_is_ended_with_the_resumed_search(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.open_for_append()
    for run in (None, "00000", "00001"):
        spool.append({"kind": "status", "status": "RUNNING", "time": 1, **({"run": run} if run else {})})
    spool.append({"kind": "status", "status": "FAILED", "time": 2, "run": "00001"})
    spool.close()  # the driver was killed here
    open_search(tmp_path, DEAD).close(timeout=0)
    ended = [(record.get("run"), record["status"]) for record in spooled(tmp_path, "status")][4:]
    assert ended == [(None, "RUNNING"), ("00000", "KILLED"), (None, "FINISHED")]


def test_metrics_of_several_trials_share_a_batch(tmp_path: Path) -> None:
    search = open_search(tmp_path, DEAD)
    trials = [search.child(f"{index:05}", {}) for index in range(4)]
    for step in range(100):
        for trial in trials:
            trial.log_metrics({"error": 0.5, "loss": 0.1}, step)
    search.close(timeout=0)
    sizes = [len(group) for kind, group, _ in batches(Spool(tmp_path).pending()) if kind == "metrics"]
    assert sizes == [400], "one hand-over of 800 values, not 400 of two"


@pytest.mark.slow
def test_a_search_with_its_delivery_killed_half_way(tmp_path: Path, store: str) -> None:
    """What MLflow holds after a search that was stopped, lost its delivery process, and was resumed."""
    search = open_search(tmp_path, store)
    trials = {number: search.child(number, {"ce": float(number)}) for number in ("00000", "00001")}
    for step in range(3):
        for trial in trials.values():
            trial.log_metrics({"error": 1 / (step + 1)}, step)
    before = wait_for_trials(tmp_path, 2)
    assert {number: trial.run_id for number, trial in trials.items()} == before
    assert isinstance(search, MLflowTracker)
    search._process._process.kill()
    trials["00000"].close()
    search.child("00002", {"ce": 2.0}).log_metrics({"error": 0.5}, 0)
    assert search.close("KILLED") == 7, "ended; started, parameters, metrics; two ended with the search, which ended"
    assert statuses(runs(store, tmp_path)) == {"search": "RUNNING", "trial-00000": "RUNNING", "trial-00001": "RUNNING"}

    resumed = open_search(tmp_path, store)
    trial = resumed.child("00001", {"ce": 1.0})
    for step in range(1, 5):
        trial.log_metrics({"error": 1 / (step + 1)}, step)
    trial.close("FAILED")
    resumed.log_metrics({"best_error": 0.2}, 4)
    (tmp_path / "anytime.png").write_bytes(b"picture")
    resumed.log_artifact(tmp_path / "anytime.png", "report")
    assert resumed.close(timeout=120) == 0

    named = runs(store, tmp_path)
    ended = {"search": "FINISHED", "trial-00000": "FINISHED", "trial-00001": "FAILED", "trial-00002": "KILLED"}
    assert statuses(named) == ended
    ids = {name: run.info.run_id for name, run in named.items()}
    assert ids["search"] == search.run_id == resumed.run_id
    assert {"00000": ids["trial-00000"], "00001": ids["trial-00001"]} == before
    assert named["search"].data.params == {"searcher": "tuneloss", "space.ce.low": "0.01", "space.ce.high": "1"}
    assert named["search"].data.metrics == {"best_error": 0.2}
    assert [item.path for item in client(store).list_artifacts(ids["search"], "report")] == ["report/anytime.png"]
    assert [named[f"trial-0000{index}"].data.params for index in range(3)] == [
        {"ce": f"{index}.0"} for index in range(3)
    ]
    assert history(store, before["00001"], "error") == {step: [1 / (step + 1)] for step in range(5)}

    # A mark that lags behind, and the ids lost too: everything is sent again, and found again.
    Spool(tmp_path).run, Spool(tmp_path).delivered = None, 0
    assert deliver_here(tmp_path) == []
    assert {name: run.info.run_id for name, run in runs(store, tmp_path).items()} == ids
    assert statuses(runs(store, tmp_path)) == ended
    assert history(store, before["00001"], "error") == {step: [1 / (step + 1)] for step in range(5)}


def _drive(run_dir: Path, uri: str, ready: Any) -> None:
    search = open_search(run_dir, uri)
    for number in ("00000", "00001", "00002"):
        trial = search.child(number, {"ce": 1.0})
        trial.log_metrics({"error": 0.5}, 0)
        if number == "00000":
            trial.close()
    ready.send(True)
    time.sleep(600)


@pytest.mark.slow
def test_a_driver_killed_with_kill_9_leaves_no_trial_running(tmp_path: Path, store: str) -> None:
    """The resumed search goes on with the runs of its trials, also of the one that it does not come back to."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    driver = context.Process(target=_drive, args=(tmp_path, store, sender))
    driver.start()
    assert receiver.poll(120)
    driver.kill()
    driver.join()
    before = wait_for_trials(tmp_path, 3)
    running = {"search": "RUNNING", "trial-00000": "FINISHED", "trial-00001": "RUNNING", "trial-00002": "RUNNING"}
    assert statuses(runs(store, tmp_path)) == running

    resumed = open_search(tmp_path, store)
    trial = resumed.child("00001", {"ce": 1.0})
    trial.log_metrics({"error": 0.25}, 1)
    trial.close()
    resumed.child("00003", {"ce": 3.0}).close()
    assert resumed.close("KILLED", timeout=120) == 0
    named = runs(store, tmp_path)
    assert statuses(named) == {
        "search": "KILLED",
        **{f"trial-0000{index}": "FINISHED" for index in (0, 1, 3)},
        "trial-00002": "KILLED",
    }
    assert {number: named[f"trial-{number}"].info.run_id for number in before} == before
    assert history(store, before["00001"], "error") == {0: [0.5], 1: [0.25]}
    assert json.loads((tmp_path / "tracking" / "run.json").read_text())["trials"].keys() == {*before, "00003"}
