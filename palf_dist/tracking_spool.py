"""The spool between the driver and MLflow: an append-only file of records, and how much of it was delivered.

The driver only ever appends; the delivery process only ever reads and moves the mark. Both survive kill -9.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palf_dist.atomic import json_lines, write_atomic
from palf_dist.run_directory import TRACKING

BUFFER_BYTES = 1 << 20
"""Records that a full disk does not take wait in memory up to this size."""


class Spool:
    """Records of one MLflow run, and of those below it, in order.

    A record with the key "run" belongs to the trial of that number, one without to the run itself. Files: spool.jsonl,
    delivered (byte offset), destination.json, run.json.
    """

    def __init__(self, run_dir: Path) -> None:
        """Look at the spool of a run; nothing is made or changed."""
        self.folder = run_dir / TRACKING
        self.lock = self.folder / ".lock"
        self.log = self.folder / "delivery.log"
        self._records = self.folder / "spool.jsonl"
        self._mark = self.folder / "delivered"
        self._destination = self.folder / "destination.json"
        self._run = self.folder / "run.json"
        self._file: Any = None

    def open_for_append(self) -> None:
        """Make the folder where it is missing; start on a fresh line should a crash have torn the last one."""
        self.folder.mkdir(exist_ok=True)
        self._file = self._records.open("ab", buffering=BUFFER_BYTES)
        if self.delivered > self._file.tell():  # a copy that was made while records were delivered
            self.delivered = 0
        if self._file.tell() > 0:
            self._file.write(b"\n")

    def append(self, record: dict[str, Any]) -> None:
        """Hand a record to the operating system: it survives this process, and costs microseconds. Where the disk is
        full it waits in memory for the next one."""
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the driver's end, with all records on the disk, if that takes them: tracking ends no run."""
        with contextlib.suppress(OSError):
            self._file.flush()
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()

    def pending(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Undelivered records, each with the offset that marks it and all before it as delivered."""
        if not self._records.exists():
            return
        offset = self.delivered
        with self._records.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written, or torn: the next driver ends it
                offset += len(line)
                for record in json_lines(line):
                    yield record, offset

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, delivered or not."""
        if self._records.exists():
            with self._records.open("rb") as file:
                for line in file:
                    yield from json_lines(line)

    @property
    def delivered(self) -> int:
        """Bytes of the spool that MLflow has confirmed."""
        return int(self._mark.read_bytes()) if self._mark.exists() else 0

    @delivered.setter
    def delivered(self, offset: int) -> None:
        write_atomic(self._mark, str(offset).encode())

    @property
    def destination(self) -> dict[str, Any] | None:
        """Where to: given, uri, experiment, name, key. Written by the driver."""
        return _read(self._destination)

    @destination.setter
    def destination(self, value: dict[str, Any]) -> None:
        write_atomic(self._destination, json.dumps(value, indent=1).encode())

    @property
    def run(self) -> dict[str, Any] | None:
        """The MLflow run that was made: uri, run_id, trials (number -> run id); None until then. Written by the
        delivery process."""
        return _read(self._run)

    @run.setter
    def run(self, value: dict[str, Any] | None) -> None:
        write_atomic(self._run, json.dumps(value, indent=1).encode())

    @property
    def run_ids(self) -> dict[str | None, str]:
        """MLflow's run ids: of the run itself under None, of the trials under their numbers; none until made."""
        run = self.run
        return {} if run is None else {None: run["run_id"], **run.get("trials", {})}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.exists() else None
