"""Where a driver works on a run: the run's own folder, or for a URI a private copy that a mirror keeps it in step with.

A disk that is full or fails for a while does not end a run: what could not be written is told and written later.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from palf_dist.atomic import exclusive
from palf_dist.errors import PalfError, RunDirectoryError, StorageError
from palf_dist.run_directory import (
    CONFIG,
    LOCK,
    TRAJECTORIES,
    create_run_directory,
    discard_unused,
    locked,
    no_run,
    not_empty,
    open_run_directory,
)
from palf_dist.storage import Storage, first_line, is_remote, is_uri, join
from palf_dist.storage_lease import LEASE, Lease
from palf_dist.storage_mirror import UNDELIVERED, Mirror, OnEvent

GRACE_SECONDS = 60.0
"""How long the end of a run waits for a disk that takes nothing."""

STAGING = "staging"
PREFIX = "run-"


class Workplace:
    """A run directory that is held for one driver."""

    def __init__(self, folder: Path, location: str | Path, on_event: OnEvent, mirror: Mirror | None = None) -> None:
        self.folder = folder
        """Where to read and write."""
        self.location = location
        """The run directory as its user knows it: a path, or a URI."""
        self._on_event, self._mirror = on_event, mirror
        self._failing = False

    @property
    def shared(self) -> str | None:
        """The URI under which every node can write files of the run; None for a path, which may be this machine's."""
        return str(self.location) if is_uri(self.location) else None

    def at(self, path: Path) -> str | Path:
        """Where a file of the folder is for the user."""
        name = path.relative_to(self.folder).as_posix()
        return join(self.location, name) if self._mirror else path

    def attempt(self, write: Callable[[], object], *, whole: bool = False) -> bool:
        """Write something that may as well be written later; whether it was. The first failure is told, and the first
        success after it of a write that is the ``whole`` of what there is to save."""
        try:
            write()
        except OSError as error:
            if not self._failing:
                self._on_event(
                    f"run directory: {self.folder} takes no writes ({first_line(error)}); the run goes on and saves at "
                    "the next checkpoint"
                )
            self._failing = True
            return False
        if whole and self._failing:
            self._failing = False
            self._on_event(f"run directory: {self.folder} takes writes again and everything is saved")
        return True

    def insist(self, write: Callable[[], object]) -> None:
        """Write something without which the run cannot end. Raises StorageError after GRACE_SECONDS of failures."""
        end, wait = time.monotonic() + GRACE_SECONDS, 0.5
        while True:
            try:
                write()
                return
            except OSError as error:
                if time.monotonic() + wait > end:
                    raise StorageError(
                        f"run directory: {self.folder} takes no writes ({first_line(error)}); what it holds is whole: "
                        f"make room, then go on with --resume {self.location}"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, 8.0)

    def publish(self) -> None:
        """Have what is in the folder where others can read it, now or as soon as the storage takes it. Raises
        RunInUseError once another driver has taken the run over."""
        if self._mirror:
            self._mirror.publish()

    def finish(self) -> None:
        """As ``publish``, for good. Raises StorageError where the storage takes nothing, naming the private copy."""
        if self._mirror:
            try:
                self._mirror.finish()
            except StorageError as error:
                raise StorageError(
                    f"{error}; what it lacks is in {self.folder}, which is a run directory as well: go on there with "
                    f"--resume {self.folder}, or once the storage is back with --resume {self.location}"
                ) from error


@contextlib.contextmanager
def open_workplace(run_dir: str | Path, *, resume: bool, cache: Path, on_event: OnEvent) -> Iterator[Workplace]:
    """Hold a run directory: a new or empty one, or with ``resume`` that of an earlier run.

    ``cache``: where the private copy of a URI goes. Raises RunDirectoryError, and RunInUseError while another driver
    has the run.
    """
    if is_remote(run_dir):
        with _remote_workplace(str(run_dir), resume, cache, on_event) as workplace:
            yield workplace
        return
    folder = open_run_directory(run_dir) if resume else create_run_directory(run_dir)
    with locked(folder):
        _remove_torn(folder)
        try:
            yield Workplace(folder, str(run_dir) if is_uri(run_dir) else folder, on_event)
        finally:
            discard_unused(folder)  # a mistake found before the run began leaves nothing behind


@contextlib.contextmanager
def _remote_workplace(uri: str, resume: bool, cache: Path, on_event: OnEvent) -> Iterator[Workplace]:
    storage = Storage(uri)
    _check(storage, resume)  # nothing is written to what is not fit for it
    with _private_folder(cache) as folder, contextlib.ExitStack() as stack:
        lease = Lease(storage)
        lease.acquire()
        stack.callback(lease.release)
        mirror = Mirror(folder, storage, lease, on_event)
        try:
            _check(storage, resume)
            if resume:
                mirror.pull()
            yield Workplace(folder, uri, on_event, mirror)
        except BaseException:
            with contextlib.suppress(PalfError):
                mirror.finish(seconds=5.0)
            raise
        finally:
            if not mirror.close():
                (folder / UNDELIVERED).touch()
                on_event(f"run directory: what {uri} has not taken is in {folder}")


def _check(storage: Storage, resume: bool) -> None:
    try:
        names = [name for name in storage.names(recursive=False) if name != LEASE]
    except OSError as error:
        raise RunDirectoryError(
            f"run directory: {storage.uri} cannot be reached ({first_line(error)}); check the URI, the credentials and "
            "the network"
        ) from error
    if resume and CONFIG not in names:
        raise no_run(storage.uri)
    if not resume and names:
        raise not_empty(storage.uri, names)


@contextlib.contextmanager
def _private_folder(cache: Path) -> Iterator[Path]:
    """A folder in the cache that goes with this process, unless something in it has not been delivered."""
    staging = cache / STAGING
    with contextlib.ExitStack() as stack:
        try:
            staging.mkdir(parents=True, exist_ok=True)
            with exclusive(staging, wait=True):
                _remove_abandoned(staging)
                folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=staging))
                stack.enter_context(exclusive(folder / LOCK))
        except OSError as error:
            raise RunDirectoryError(
                f"run directory: its private copy cannot be made in {staging} ({first_line(error)}); name another "
                "cache folder in data.cache or $PALF_CACHE"
            ) from error
        try:
            yield folder
        finally:
            if not (folder / UNDELIVERED).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _remove_torn(folder: Path) -> None:
    """Remove what workers had begun to write when they were killed; a name is not used twice."""
    for path in (folder / TRAJECTORIES).glob("*/.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_abandoned(staging: Path) -> None:
    """Remove the copies of drivers that were killed: nobody holds their lock, and a resume begins with another one."""
    for lock in staging.glob(f"{PREFIX}*/{LOCK}"):
        if not (lock.parent / UNDELIVERED).exists():
            with contextlib.suppress(OSError), exclusive(lock):
                shutil.rmtree(lock.parent, ignore_errors=True)
