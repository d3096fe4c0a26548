"""Run directories: what is refused, what is never overwritten, and the lock."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.run_directory import CONFIG, LOCK, create_run_directory, locked, open_run_directory


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root: act as nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_creates_with_parents_and_accepts_an_empty_folder(tmp_path: Path) -> None:
    run_dir = create_run_directory(tmp_path / "a" / "b")
    assert run_dir.is_dir() and not list(run_dir.iterdir())
    assert create_run_directory(str(run_dir)) == run_dir
    with locked(run_dir):
        pass
    assert create_run_directory(run_dir) == run_dir, "a run that was killed before it wrote anything"


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run_directory("r") == tmp_path / "r"


def test_a_folder_in_use_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(RunDirectoryError, match=r"not empty .*thesis\.txt.*--resume.*--run-dir"):
        create_run_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("opener", [create_run_directory, open_run_directory])
def test_uris_are_refused(opener: object) -> None:
    with pytest.raises(RunDirectoryError, match="s3://bucket/run is a URI"):
        opener("s3://bucket/run")  # type: ignore[operator]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirectoryError, match="cannot be used"):
            create_run_directory(path)
        with pytest.raises(RunDirectoryError, match="holds no run"):
            open_run_directory(path)


def test_read_only(tmp_path: Path) -> None:
    for folder in [tmp_path, *tmp_path.parents][:3]:  # let nobody in where pytest's folders are private
        folder.chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "sub").mkdir()
    (run_dir / CONFIG).write_text("")
    (run_dir / LOCK).touch()
    for path in (run_dir / "sub", run_dir):
        path.chmod(0o555)
    (run_dir / LOCK).chmod(0o444)
    with unprivileged():
        for attempt in (
            lambda: create_run_directory(run_dir / "sub"),
            lambda: create_run_directory(run_dir / "new"),
            lambda: open_run_directory(run_dir),
            lambda: locked(run_dir).__enter__(),
        ):
            with pytest.raises(RunDirectoryError, match=r"cannot be used \(Permission denied\)"):
                attempt()
    for path in (run_dir, run_dir / "sub"):
        path.chmod(0o755)


def test_unreachable() -> None:
    with pytest.raises(RunDirectoryError, match=r"/proc/nowhere/run cannot be used"):
        create_run_directory("/proc/nowhere/run")


def test_only_a_run_can_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunDirectoryError, match=r"holds no run \(config.yaml is missing\)"):
            open_run_directory(path)
    assert not (tmp_path / "missing").exists()
    (tmp_path / CONFIG).write_text("name: x\n")
    assert open_run_directory(tmp_path) == tmp_path


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunDirectoryError, match="in use by another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def _hold(run_dir: Path, ready: object) -> None:
    with locked(run_dir):
        ready.set()  # type: ignore[attr-defined]
        signal.pause()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(RunDirectoryError), locked(tmp_path):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path):
        pass
