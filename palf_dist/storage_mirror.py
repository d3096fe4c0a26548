"""The copy of a run's working folder under a URI: a complete run directory at each checkpoint, whatever fails.

A thread uploads what has changed, content before what refers to it, so that a crash at any moment leaves a state that
a resume can start from. While the storage takes nothing the run goes on, and the thread tries again and again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from palf_dist.errors import RunDirectoryError, RunInUseError, StorageError
from palf_dist.run_directory import BEST, CHECKPOINTS, CONFIG, METRICS, REPORT, RESULTS, TRACKING, TRAJECTORIES
from palf_dist.storage import Storage, first_line, safe_name
from palf_dist.storage_lease import Lease

PUBLISH_SECONDS = 30.0
"""How long an outer step waits at most for an upload that is on its way."""

END_SECONDS = 120.0
"""How long the end of a run waits for storage that takes nothing."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts at storage that takes nothing."""

ORDER = (TRAJECTORIES, CONFIG, TRACKING, METRICS, CHECKPOINTS, BEST, RESULTS, REPORT)
"""What is uploaded first; what is not named here goes with the metrics."""

UNDELIVERED = ".undelivered"
"""In a folder that holds what the storage has not taken: wherever its driver ends, nobody clears it away."""

VOUCHING = (".json", ".html")
"""Files that vouch for those beside them (state.json, policy.json, index.html) come last in their folder."""

OnEvent = Callable[[str], None]


class Mirror:
    """Keeps what is under a URI as the folder is. To be closed."""

    def __init__(self, folder: Path, storage: Storage, lease: Lease, on_event: OnEvent) -> None:
        self._folder, self._storage, self._lease, self._on_event = folder, storage, lease, on_event
        self._known: dict[str, tuple[int, int]] = {}  # files in the storage, as they were here when they went there
        self._changed = threading.Condition()
        self._asked = self._done = 0  # rounds asked for, and how many of these have been seen through
        self._problem = ""
        self._lost: RunInUseError | None = None
        self._hurry = self._closed = self._passed_over = False
        self._thread = threading.Thread(target=self._work, name="palf-mirror", daemon=True)
        self._thread.start()

    def pull(self) -> None:
        """Fill the folder with all that a resume needs. Raises RunDirectoryError where the storage does not give it."""
        names = pull(self._storage, self._folder, leave_out=(TRAJECTORIES, REPORT))
        self._known = {name: _signature(self._folder / name) for name in names}

    def publish(self) -> None:
        """Have everything that is in the folder now uploaded. Waits for it, but not while the storage takes nothing.

        Raises RunInUseError once another driver has taken the run over.
        """
        with self._changed:
            wanted = self._ask()
            self._changed.wait_for(lambda: self._done >= wanted or self._problem or self._lost, PUBLISH_SECONDS)
            if self._lost:
                raise self._lost

    def finish(self, seconds: float | None = None) -> None:
        """As ``publish``, and wait. Raises StorageError where the storage does not take everything in ``seconds``
        (END_SECONDS)."""
        seconds = END_SECONDS if seconds is None else seconds
        with self._changed:
            wanted, self._hurry = self._ask(), True
            done = self._changed.wait_for(lambda: self._done >= wanted or self._lost, seconds)
            self._hurry = False
            if self._lost:
                raise self._lost
            if not done:
                problem = self._problem or f"an upload has taken more than {seconds:g} s"
                raise StorageError(f"run directory: {self._storage.uri} takes no writes ({problem})")

    def close(self) -> bool:
        """End the thread; whether the storage has everything."""
        with self._changed:
            complete = not self._problem and not self._lost and self._done >= self._asked
            self._closed = True
            self._changed.notify_all()
        try:
            return complete and not self._differences(self._scan())
        except OSError:
            return False

    def _ask(self) -> int:
        self._asked += 1
        self._changed.notify_all()
        return self._asked

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._done < self._asked)
                if self._closed:
                    return
                wanted = self._asked
            try:
                self._upload()
            except RunInUseError as error:
                with self._changed:
                    self._lost = error
                    self._changed.notify_all()
                return
            except Exception as error:  # the storage's libraries raise whatever they like; the thread has to go on
                failures += 1
                self._failed(first_line(error), failures)
            else:
                failures = 0
                self._succeeded(wanted)

    def _failed(self, problem: str, failures: int) -> None:
        with self._changed:
            with contextlib.suppress(OSError):
                (self._folder / UNDELIVERED).touch()  # now, as a driver that is killed leaves no word
            first, self._problem = not self._problem, problem
            self._changed.notify_all()
        if first:
            self._on_event(
                f"run directory: {self._storage.uri} takes no writes ({problem}); the run goes on and delivers later "
                f"what is in {self._folder}"
            )
        end = time.monotonic() + min(2.0**failures, LONGEST_WAIT)
        with self._changed:  # asking again does not make it answer sooner, the end of the run has no time to lose
            while not self._closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
                if self._hurry:
                    return

    def _succeeded(self, wanted: int) -> None:
        with self._changed:
            if not self._closed:
                with contextlib.suppress(OSError):
                    (self._folder / UNDELIVERED).unlink(missing_ok=True)
            again, self._problem, self._done = bool(self._problem), "", wanted
            self._changed.notify_all()
        if again:
            self._on_event(f"run directory: {self._storage.uri} takes writes again and has everything")

    def _upload(self) -> None:
        """One round. Raises OSError where the storage fails, RunInUseError where the run is another driver's now."""
        self._lease.look()
        here = self._scan()
        for name in self._differences(here):
            path = self._folder / name
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # pruned meanwhile
            self._storage.write(name, content)
            if name.startswith(TRAJECTORIES):
                path.unlink(missing_ok=True)  # nobody needs it here any more
            else:
                self._known[name] = here[name]
        gone = self._known.keys() - here.keys()
        for folder in sorted({name.rpartition("/")[0] for name in gone if name.startswith(f"{CHECKPOINTS}/")}):
            if not any(name.startswith(f"{folder}/") for name in here):
                self._storage.delete_folder(folder)
                self._known = {name: kept for name, kept in self._known.items() if not name.startswith(f"{folder}/")}
        for name in sorted(gone & self._known.keys()):
            self._storage.delete(name)
            del self._known[name]

    def _scan(self) -> dict[str, tuple[int, int]]:
        """Files of the folder that belong to the run, and what tells their versions apart."""

        def vanished(error: OSError) -> None:
            """A folder that was pruned just now is gone; one that cannot be read is not, nor are its files."""
            if not isinstance(error, FileNotFoundError) or error.filename == str(self._folder):
                raise error

        found = {}
        for parent, folders, names in os.walk(self._folder, onerror=vanished):
            folders[:] = filter(_lasting, folders)
            for path in (Path(parent, name) for name in names if _lasting(name)):
                try:
                    name = safe_name(path.relative_to(self._folder).as_posix())
                except OSError as error:
                    self._pass_over(error)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file():
                        found[name] = _signature(path)
        return found

    def _pass_over(self, error: OSError) -> None:
        """Tell once that there are files which are nobody's to upload."""
        if not self._passed_over:
            self._passed_over = True
            self._on_event(f"run directory: {self._folder} holds what is not uploaded ({first_line(error)})")

    def _differences(self, here: dict[str, tuple[int, int]]) -> list[str]:
        """Files that the storage does not have as they are, in the order in which they go there."""
        return sorted((name for name in here if self._known.get(name) != here[name]), key=_rank)


def pull(storage: Storage, folder: Path, leave_out: Collection[str]) -> list[str]:
    """Copy a run into an empty folder, without what is right in it and named in ``leave_out``; the files' names.

    Raises RunDirectoryError where the storage does not give them.
    """
    pulled = []
    try:
        for name in storage.names_without(leave_out):
            path = folder / safe_name(name)
            with contextlib.suppress(FileNotFoundError):  # pruned just now
                content = storage.read(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                pulled.append(name)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory: {storage.uri} cannot be read ({first_line(error)}); check the credentials and the "
            "network, then try again"
        ) from error
    return pulled


def _lasting(part: str) -> bool:
    """Whether part of a name is not a lock's, nor of what is being written or replaced."""
    return not part.startswith(".") and not part.endswith(".old")


def _signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _rank(name: str) -> tuple[int, str, bool, str]:
    top, folder, suffix = name.split("/")[0], name.rpartition("/")[0], PurePosixPath(name).suffix
    return ORDER.index(top if top in ORDER else METRICS), folder, suffix in VOUCHING, name
