"""The lease and the mirror, on storage that is a folder: what holds for every storage needs no server."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from palf_dist import storage_lease, storage_mirror, workplace
from palf_dist.checkpoint import latest_checkpoint, prune, save_checkpoint
from palf_dist.errors import CheckpointError, RunDirectoryError, RunInUseError, StorageError
from palf_dist.metrics_log import MetricsLog
from palf_dist.storage import Storage
from palf_dist.storage_lease import LEASE, Lease
from palf_dist.storage_mirror import UNDELIVERED, Mirror, pull
from palf_dist.workplace import Workplace, open_workplace


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of a cluster in seconds."""
    monkeypatch.setattr(storage_lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(storage_lease, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(storage_lease, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(storage_mirror, "LONGEST_WAIT", 0.05)


class Failing(Storage):
    """Storage that takes ``left`` writes and then none; None: all. It never takes a lease's."""

    left: int | None = None
    error: Exception = OSError("no space left")

    def write(self, name: str, content: bytes) -> None:
        if self.left is not None and name != LEASE:
            if self.left == 0:
                raise self.error
            self.left -= 1
        super().write(name, content)


@contextmanager
def mirrored(folder: Path, storage: Storage, events: list[str] | None = None) -> Iterator[Mirror]:
    lease = Lease(storage)
    lease.acquire()
    mirror = Mirror(folder, storage, lease, (events if events is not None else []).append)
    try:
        yield mirror
    finally:
        mirror.close()
        lease.release()


def write_step(folder: Path, step: int) -> None:
    """What a run writes down between two checkpoints."""
    log = MetricsLog(folder, next_step=step)
    log.append(step, {"loss": float(step)})
    log.close()
    (folder / "best").mkdir(exist_ok=True)
    for name in ("policy.safetensors", "policy.json"):
        (folder / "best" / name).write_text(f"{name} of {step}")
    trajectory = folder / "trajectories" / f"step={step:06d}" / "group-0000.parquet"
    trajectory.parent.mkdir(parents=True)
    trajectory.write_text(f"trajectory of {step}")
    arrays = {"policy": np.full(3, step, np.float32), "momentum": np.zeros(3)}
    save_checkpoint(folder, step, arrays, {"step": step})
    prune(folder, 2)


def files(folder: Path) -> dict[str, bytes]:
    """All but the lease, which is written beside the run, in a file that is then renamed."""
    paths = (path for path in folder.rglob("*") if LEASE not in path.name and path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_the_storage_follows_the_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / ".lock").touch()
    with mirrored(here, Storage(there.as_uri())) as mirror:
        for step in range(4):
            write_step(here, step)
            mirror.publish()
            assert not list((here / "trajectories").glob("*/*")), "delivered for good"
            copy = {name: content for name, content in files(there).items() if not name.startswith("trajectories/")}
            assert copy == {name: content for name, content in files(here).items() if name != ".lock"}
        assert sorted(path.name for path in (there / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert len(list((there / "trajectories").glob("*/*.parquet"))) == 4
    assert not (there / LEASE).exists()


def test_a_crash_at_any_write_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    """The newest checkpoint there is whole, or the one before it is; what was logged before it is there."""
    writes = 0
    newest = []
    while True:
        here, there, again = (tmp_path / f"{name}-{writes}" for name in ("here", "there", "again"))
        here.mkdir(), again.mkdir()
        storage = Failing(there.as_uri())
        with mirrored(here, storage) as mirror:
            write_step(here, 0)
            mirror.publish()
            write_step(here, 1)
            storage.left = writes
            mirror.publish()
            done = storage.left > 0
        pull(Storage(there.as_uri()), again, leave_out=("trajectories",))
        checkpoint = latest_checkpoint(again)
        assert checkpoint is not None and checkpoint.learner["policy"][0] == checkpoint.step
        log = MetricsLog(again, checkpoint.step + 1)
        assert log.latest("loss") == (checkpoint.step, {"loss": checkpoint.step})
        log.close()
        newest.append(checkpoint.step)
        if done:
            break
        writes += 1
    assert newest == sorted(newest) and set(newest) == {0, 1} and writes >= 7


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("no space left")])
def test_what_the_storage_did_not_take_is_told_once_and_delivered_later(tmp_path: Path, error: Exception) -> None:
    here, there, events = tmp_path / "here", tmp_path / "there", []
    here.mkdir()
    storage = Failing(there.as_uri())
    storage.error = error
    with mirrored(here, storage, events) as mirror:
        for step in range(3):
            assert (here / UNDELIVERED).exists() == (step == 2), "nobody clears away what is only here"
            storage.left = None if step == 0 else 0
            write_step(here, step)
            mirror.publish()
        assert not (there / "checkpoints" / "step-000002").exists()
        with pytest.raises(StorageError, match=r"takes no writes \(no space left\)"):
            mirror.finish(0.5)
        storage.left = None
        mirror.finish()
        assert not (here / UNDELIVERED).exists()
        assert mirror.close(), "nothing is left to deliver"
    assert [event.split(str(there))[1] for event in events] == [
        " takes no writes (no space left); the run goes on and delivers later what is in " + str(here),
        " takes writes again and has everything",
    ]
    assert (there / "checkpoints" / "step-000002" / "state.json").exists()


def test_folders_and_files_that_come_and_go_do_not_disturb_it(tmp_path: Path) -> None:
    here, there, events = tmp_path / "here", tmp_path / "there", []
    here.mkdir()
    write_step(here, 0)
    stopped = threading.Event()

    def churn() -> None:
        while not stopped.is_set():
            for part in ("a", "b", "c"):
                (here / "checkpoints" / "passing" / part).mkdir(parents=True)
            shutil.rmtree(here / "checkpoints" / "passing")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        with mirrored(here, Storage(there.as_uri()), events) as mirror:
            for _ in range(100):
                mirror.publish()
    finally:
        stopped.set()
        thread.join()
    assert events == [] and (there / "checkpoints" / "step-000000" / "state.json").exists()


def test_files_with_other_names_are_told_once_and_left_out(tmp_path: Path) -> None:
    here, there, events = tmp_path / "here", tmp_path / "there", []
    here.mkdir()
    write_step(here, 0)
    (here / "a b").touch(), (here / "best" / "c d").touch(), (here / "best" / ".hidden").touch()
    with mirrored(here, Storage(there.as_uri()), events) as mirror:
        mirror.publish()
        mirror.publish()
        assert mirror.close()
    assert len(events) == 1 and "is no name of a file of a run" in events[0] and " d'" not in events[0]
    assert (there / "best" / "policy.json").exists() and not (there / "a b").exists()


def test_a_folder_that_cannot_be_read_deletes_nothing(tmp_path: Path) -> None:
    here, there, events = tmp_path / "here", tmp_path / "there", []
    here.mkdir()
    write_step(here, 0)
    with mirrored(here, Storage(there.as_uri()), events) as mirror:
        mirror.publish()
        here.rename(tmp_path / "elsewhere")
        mirror.publish()
        assert not mirror.close()
    assert len(events) == 1 and "No such file" in events[0]
    assert (there / "checkpoints" / "step-000000" / "state.json").exists()


def test_a_beat_that_fails_in_any_way_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Moody(Storage):
        calm = False

        def read(self, name: str) -> bytes:
            if threading.current_thread() is not threading.main_thread() and not self.calm:
                raise RuntimeError("a library's own")
            return super().read(name)

    storage = Moody(tmp_path.as_uri())
    lease = Lease(storage)
    lease.acquire()
    while "was not renewed (a library's own)" not in caplog.text:
        time.sleep(0.01)
    storage.calm = True
    while not json.loads(storage.read(LEASE))["beat"]:
        time.sleep(0.01)
    lease.release()
    assert storage.names() == []


def test_what_killed_workers_left_behind_goes_when_the_run_is_opened(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    step = tmp_path / "trajectories" / "step=000000"
    step.mkdir(parents=True)
    for name in ("group-0000.parquet", ".group-0001.parquet.0123.tmp"):
        (step / name).touch()
    with open_workplace(tmp_path.as_uri(), resume=True, cache=tmp_path, on_event=lambda event: None):
        assert [path.name for path in step.iterdir()] == ["group-0000.parquet"]


def test_a_live_lease_is_refused_and_a_stale_one_is_taken(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    first, second = Lease(storage), Lease(storage)
    first.acquire()
    with pytest.raises(RunInUseError, match=rf"in use by another run \(process {os.getpid()} on "):
        second.acquire()
    first.release()
    dead = {"owner": "somebody", "host": "elsewhere", "pid": 1, "machine": "another", "beat": 7}
    for content in (json.dumps(dead).encode(), b"torn", b"[]", json.dumps(dead | {"machine": 3, "pid": "x"}).encode()):
        storage.write(LEASE, content)
        lease = Lease(storage)
        lease.acquire()
        lease.look()
        lease.release()
        assert storage.names() == []


def test_a_holder_that_was_replaced_ends(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    storage = Storage(there.as_uri())
    with mirrored(here, storage) as mirror:
        write_step(here, 0)
        mirror.publish()
        storage.write(LEASE, json.dumps({"owner": "another"}).encode())
        write_step(here, 1)
        with pytest.raises(RunInUseError, match="was taken over by another run"):
            mirror.publish()
    assert json.loads(storage.read(LEASE)) == {"owner": "another"}, "nobody releases what is not his"
    assert not (there / "checkpoints" / "step-000001").exists()


def test_objects_with_other_names_are_left_alone(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("config.yaml", "checkpoints/.step-000003.tmp/state.json", "best/a b"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).touch()
    assert pull(Storage(there.as_uri()), here, leave_out=()) == ["config.yaml"]


def test_storage_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = Storage((tmp_path / "file" / "run").as_uri())
    with pytest.raises(RunDirectoryError, match="cannot be used"):
        Lease(storage).acquire()


def full(times: int) -> Callable[[], None]:
    """A write that fails so many times."""
    left = iter(range(times))

    def write() -> None:
        if next(left, None) is not None:
            raise OSError(28, "No space left on device")

    return write


def test_a_full_disk_is_told_once_until_everything_is_saved(tmp_path: Path) -> None:
    events: list[str] = []
    place = Workplace(tmp_path, tmp_path, events.append)
    write = full(2)
    assert not place.attempt(write) and not place.attempt(write, whole=True) and len(events) == 1
    assert place.attempt(write) and len(events) == 1, "a small file may fit in where a checkpoint does not"
    assert place.attempt(write, whole=True)
    assert events == [
        f"run directory: {tmp_path} takes no writes (No space left on device); the run goes on and saves at the next "
        "checkpoint",
        f"run directory: {tmp_path} takes writes again and everything is saved",
    ]


def test_the_end_of_a_run_waits_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workplace(tmp_path, tmp_path, lambda event: None)
    place.insist(full(1))
    monkeypatch.setattr(workplace, "GRACE_SECONDS", 0.1)
    with pytest.raises(StorageError, match=rf"No space left.*make room, then go on with --resume {tmp_path}"):
        place.insist(full(9))


def test_checkpoints_that_name_other_files_are_refused(tmp_path: Path) -> None:
    """Such a name could lead out of the run directory."""
    from palf_dist.checkpoint import _canonical, _digest

    folder = save_checkpoint(tmp_path / "run", 1, {"policy": np.zeros(1), "x": np.zeros(1)}, {})
    (tmp_path / "secret").write_bytes(b"x")
    document = json.loads((folder / "state.json").read_bytes())
    document["content"]["files"]["../../../secret"] = _digest(b"x")
    document["sha256"] = _digest(_canonical(document["content"]))
    (folder / "state.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="it names the files"):
        latest_checkpoint(tmp_path / "run")
