"""One driver at a time for a run on object storage: a lease that its holder renews, and that others take when it stops.

Object storage has no locks, and pyarrow no conditional writes: two drivers that start within SETTLE_SECONDS of each
other are told apart by who wrote last, and a driver that was frozen learns only at its next look that it was replaced.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from palf_dist.errors import RunDirectoryError, RunInUseError
from palf_dist.storage import Storage, first_line

logger = logging.getLogger(__name__)

LEASE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A holder that has not renewed its lease for so long is taken for dead. Measured by whoever watches, so that no two
clocks need to agree."""
SETTLE_SECONDS = 2.0


class Lease:
    """Held from ``acquire`` to ``release``; a thread of its own renews it."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._content: dict[str, Any] = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "beat": 0,
        }
        self._ended = threading.Event()
        self._taken = False
        self._thread = threading.Thread(target=self._renew, name="palf-lease", daemon=True)

    def acquire(self) -> None:
        """Take the lease. One that somebody has left behind is watched for STALE_SECONDS first.

        Raises RunInUseError while its holder renews it, RunDirectoryError where the storage does not answer.
        """
        try:
            self._watch(self._read())
            self._write()
            if (now := self._read()) is not None and now["owner"] != self._content["owner"]:
                raise self._in_use(now)
        except OSError as error:
            raise RunDirectoryError(
                f"run directory: {self._storage.uri} cannot be used ({first_line(error)}); check the URI, the "
                "credentials and the network"
            ) from error
        self._thread.start()

    def check(self) -> None:
        """Raises RunInUseError once another driver has been seen to hold the lease."""
        if self._taken:
            raise RunInUseError(
                f"run directory: {self._storage.uri} was taken over by another run while this one did not get through "
                "to it; that one goes on, this one ends"
            )

    def look(self) -> None:
        """Ask the storage who holds the lease, then ``check``. Raises OSError where it does not answer."""
        holder = self._read()
        if holder is not None and holder["owner"] != self._content["owner"]:
            self._taken = True
        self.check()

    def release(self) -> None:
        """Give the lease up, as far as the storage answers; otherwise it becomes stale by itself."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(BEAT_SECONDS)
        if self._taken:
            return
        try:
            self.look()
            self._storage.delete(LEASE)
        except (OSError, RunInUseError):
            return

    def _watch(self, first: dict[str, Any] | None) -> None:
        """Return when nobody holds the lease, or its holder is dead."""
        if first is None:
            return
        if first.get("machine") == self._content["machine"] is not None and _is_gone(first.get("pid")):
            return
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT_SECONDS))
            now = self._read()
            if now is None:
                return
            if now != first:
                raise self._in_use(now)

    def _in_use(self, holder: dict[str, Any]) -> RunInUseError:
        return RunInUseError(
            f"run directory: {self._storage.uri} is in use by another run (process {holder.get('pid')} on "
            f"{holder.get('host')}); wait for it to end, or choose another --run-dir"
        )

    def _renew(self) -> None:
        """A beat that does not get through is left out: the next one may."""
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.look()
                self._content["beat"] += 1
                self._storage.write(LEASE, json.dumps(self._content).encode())
            except RunInUseError:
                return
            except Exception as error:  # the storage's libraries raise whatever they like; the thread has to go on
                logger.warning("the lease of %s was not renewed (%s)", self._storage.uri, first_line(error))

    def _write(self) -> None:
        self._storage.write(LEASE, json.dumps(self._content).encode())
        time.sleep(SETTLE_SECONDS)

    def _read(self) -> dict[str, Any] | None:
        """What the lease says; a damaged one is nobody's."""
        try:
            content = json.loads(self._storage.read(LEASE))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and "owner" in content else None


def _machine() -> str | None:
    """Where a process id means the same process: one boot of one kernel, and one container on it. None: unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _is_gone(pid: Any) -> bool:
    """Whether a process of this machine has ended."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return False
