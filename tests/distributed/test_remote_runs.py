"""Whole runs under an s3:// URI: the same files as a local run's, whatever becomes of the driver and the storage."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palf_dist import faults, storage_lease, storage_mirror
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.driver import evaluate_policy, meta_train
from palf_dist.errors import RunDirectoryError, RunInUseError, StorageError
from palf_dist.policies.policy_file import load_policy
from palf_dist.run_directory import open_run_directory
from palf_dist.storage import Storage, join
from palf_dist.storage_lease import LEASE
from palf_dist.types import Contribution, Unit
from palf_dist.units import Runner
from tests.command import Command
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import fault, small_config
from tests.distributed.test_driver import stop_after, train
from tests.object_store import ObjectStore, object_store
from tests.processes import Spawn, wait_until

__all__ = ["object_store"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    meta_train(small_config(), run_dir)
    return run_dir


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the private copies of this machine's runs go; the datasets are bundled and need no cache. Each run has its
    storage to itself, so its lease need not be waited for."""
    monkeypatch.setattr(storage_lease, "SETTLE_SECONDS", 0.1)
    monkeypatch.setenv("PALF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "staging"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def download(uri: str, folder: Path) -> Path:
    """Everything under the URI."""
    storage = Storage(uri)
    for name in storage.names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(storage.read(name))
    return folder


def test_a_run_on_s3_is_the_run(object_store: ObjectStore, undisturbed: Path, tmp_path: Path, cli: Command) -> None:
    """In process, then stopped and resumed; the commands that read it work on its URI."""
    uri = object_store.uri("whole")
    result, _ = train(small_config(), uri, **stop_after(("meta_gradient", 2, 0)))
    assert result.interrupted and result.run_dir == uri
    result, _ = train(small_config(), uri, resume=True)
    copy = download(uri, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(undisturbed)
    assert names(copy) == names(undisturbed) - {".lock"}
    assert result.policy == join(uri, "best/policy.safetensors") and result.report is not None
    assert result.report.page == join(uri, "report/index.html")
    assert str(result.policy) in (copy / "report" / "index.html").read_text().replace("&amp;", "&")
    assert list(Path(os.environ["PALF_CACHE"], "staging").iterdir()) == []

    kept, best = object_store.uri("kept"), load_policy(undisturbed / "best")
    with pytest.raises(KeyboardInterrupt):
        evaluate_policy(small_config(), best, run_dir=kept, **stop_after(("evaluate", 0, 0)))
    assert {name.split("/")[0] for name in Storage(kept).names()} == {"best", "config.yaml", "units"}
    evaluate_policy(small_config(), best, run_dir=kept, resume=True)
    copied = download(kept, tmp_path / "kept")
    assert names(copied) == {"best/policy.safetensors", "best/policy.json", "config.yaml", "results.parquet"}
    rows = [pq.read_table(folder / "results.parquet").drop_columns(["seconds"]) for folder in (copied, undisturbed)]
    assert rows[0].equals(rows[1])

    with pytest.raises(RunDirectoryError, match=r"is not empty \(it holds best, checkpoints, config\.yaml\)"):
        train(small_config(), uri)
    with pytest.raises(RunDirectoryError, match="holds no run"):
        train(small_config(), object_store.uri("nothing"), resume=True)
    Storage(uri).delete_folder("report")
    record = json.loads(cli("report", uri, "--json").out)
    assert record["page"] == result.report.page
    pictures = {"held_out", "noise", "alpha", "controls", "importance", "outer_loss"}
    assert set(record["pictures"]) == {join(uri, f"report/{name}.png") for name in pictures}
    assert "report/index.html" in Storage(uri).names("report")
    shown = cli("evaluate", str(result.policy), "--workers", "0", "--json")
    assert json.loads(shown.out)["held_out"] == record["held_out"], shown.err
    message = cli.refused("meta-train", "--resume", uri, "--set", "inner.steps=13")
    assert "inner.steps: 12 in the run, 13 now" in message
    assert "only meta-train, evaluate and report work on a URI" in cli.refused("tune", "--resume", uri)


def test_ray_s_workers_write_their_own_trajectories(
    object_store: ObjectStore, share: Share, undisturbed: Path, tmp_path: Path
) -> None:
    uri = object_store.uri("ray")
    train(small_config(distributed={"workers": 2}), uri)
    assert fingerprint(download(uri, tmp_path / "copy")) == fingerprint(undisturbed)
    folder = tmp_path / "mounted"
    result, _ = train(small_config(distributed={"workers": 1}), folder.as_uri())
    assert result.run_dir == folder.as_uri() and fingerprint(folder) == fingerprint(undisturbed)


def test_a_killed_driver_is_resumed_on_another_machine(
    object_store: ObjectStore, undisturbed: Path, spawn: Spawn, tmp_path: Path
) -> None:
    """kill -9 with the lease held; what that driver had on its own disk is not needed."""
    uri, mark = object_store.uri("killed"), tmp_path / "saving"
    (tmp_path / "config.json").write_text(small_config().model_dump_json())
    injected = {faults.VARIABLE: fault("driver_before_checkpoint", ("driver", 3, 0), "hang", mark)}
    process = spawn("tests.faults.drive", str(tmp_path / "config.json"), uri, "new", variables=injected)
    assert wait_until(mark.exists, process), process.communicate()
    with pytest.raises(RunInUseError, match=f"in use by another run .process {process.pid} on "):
        train(small_config(), uri, resume=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # torn besides, as by a crash of storage without atomic writes
    newest = max(name for name in Storage(uri).names("checkpoints") if name.endswith("learner.safetensors"))
    Storage(uri).write(newest, Storage(uri).read(newest)[:-7])
    _, screen = train(small_config(), uri, resume=True)
    assert newest.split("/")[1] in screen and "was skipped" in screen
    copy = download(uri, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(undisturbed) and not (copy / LEASE).exists()


class CutRunner(Runner):
    """The storage cannot be reached from the first of two units on, and can again from the second on."""

    store: ObjectStore
    free_at: tuple[str, int, int] | None = ("meta_gradient", 3, 0)

    def run(self, unit: Unit, *arguments: Any, **named: Any) -> Contribution:
        key = (unit.kind, unit.outer_step, unit.group)
        if key == ("meta_gradient", 1, 0):
            self.store.down.set()
        elif key == self.free_at:
            self.store.down.clear()
        return super().run(unit, *arguments, **named)


def test_storage_that_fails_for_a_while_does_not_end_a_run(
    object_store: ObjectStore, undisturbed: Path, staging: Path, tmp_path: Path
) -> None:
    uri = object_store.uri("cut")
    _, screen = train(small_config(), uri, make_runner=type("Cut", (CutRunner,), {"store": object_store}))
    assert screen.count("takes no writes") == screen.count("the run goes on and delivers later") == 1
    assert screen.count("takes writes again and has everything") == 1
    assert fingerprint(download(uri, tmp_path / "copy")) == fingerprint(undisturbed)
    assert list(staging.iterdir()) == []


def test_storage_that_stays_away_ends_it_and_nothing_is_lost(
    object_store: ObjectStore, undisturbed: Path, staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_mirror, "END_SECONDS", 1.0)
    monkeypatch.setattr(storage_mirror, "PUBLISH_SECONDS", 1.0)
    monkeypatch.setattr(storage_lease, "STALE_SECONDS", 1.0)  # its lease could not be given up either
    uri = object_store.uri("away")
    cut = type("CutForGood", (CutRunner,), {"store": object_store, "free_at": None})
    try:
        with pytest.raises(StorageError, match="which is a run directory as well: go on there with --resume") as error:
            train(small_config(), uri, make_runner=cut)
    finally:
        object_store.down.clear()
    kept = next(staging.iterdir())
    assert str(kept) in str(error.value)
    newest = latest_checkpoint(open_run_directory(kept))
    assert newest is not None and newest.step == 4
    train(small_config(), uri, resume=True)
    assert fingerprint(download(uri, tmp_path / "copy")) == fingerprint(undisturbed)
    assert list(staging.iterdir()) == [kept], "what was not delivered is the user's to remove"
