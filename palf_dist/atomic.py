"""The one place that makes writes survive a crash: files and folders that appear whole or not at all, and locks.

Needs nothing but the standard library, so that small helper processes start fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a reader, or a crash at any moment, sees the old file or the new one.

    The temporary name is fixed and hidden (pyarrow datasets skip it), so that a killed writer leaves at most one
    leftover, which the next write takes over. One writer at a time, as the run directory's lock ensures.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def superseded(target: Path) -> Path:
    """Where ``replacing_folder`` keeps the old folder for the instant in which the new one takes its place."""
    return target.with_name(target.name + ".old")


@contextlib.contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill with files; on leaving without an error it becomes ``target``.

    A folder cannot be exchanged for another in one step, so a crash in between leaves the old content under
    ``superseded(target)``: a reader that looks there too always finds the old or the new content whole.
    """
    temporary, old = target.with_name(f".{target.name}.tmp"), superseded(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(temporary, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def json_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; lines torn by a crash are left out."""
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an advisory lock on ``path`` (a folder, or a lock file made when missing); the kernel frees it at any death.

    Raises BlockingIOError when somebody else holds it and ``wait`` is not set. The file is never removed: removing it
    would let two processes hold two different files of one name.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
