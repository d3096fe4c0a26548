"""metrics.parquet: one row per outer step, each step exactly once, whatever was killed in between.

Rows are appended to metrics.jsonl as they come; ``compact`` makes them durable and writes the Parquet file from them.
A row that a full disk does not take stays in memory, and is written by the next ``compact`` that succeeds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from palf_dist.atomic import json_lines, sync, write_atomic
from palf_dist.run_directory import METRICS


class MetricsLog:
    """Metrics of the outer steps of one run. Call ``compact`` before each checkpoint and at the end."""

    def __init__(self, run_dir: Path, next_step: int = 0) -> None:
        """Open the log of a run that goes on with outer step ``next_step``; rows of later steps are dropped."""
        self._parquet = run_dir / METRICS
        self._lines = self._parquet.with_suffix(".jsonl")
        self._rows: dict[int, dict[str, float]] = {}
        if self._lines.exists():
            for row in json_lines(self._lines.read_bytes()):
                step = row.pop("outer_step")
                if step < next_step:
                    self._rows[step] = row
        self._file: BinaryIO | None = None
        with contextlib.suppress(OSError):
            self._rewrite()

    def append(self, outer_step: int, metrics: Mapping[str, float]) -> None:
        """Add the row of one outer step. New names may appear at any time: earlier rows are null there."""
        assert outer_step not in self._rows, f"outer step {outer_step} was logged twice"
        self._rows[outer_step] = {name: float(value) for name, value in metrics.items()}
        if self._file is None:
            return
        line = self._encode(outer_step)
        with contextlib.suppress(OSError):
            if self._file.write(line) == len(line):
                return
        self._close_file()  # what follows a torn line would be lost with it

    def latest(self, name: str) -> tuple[int, dict[str, float]] | None:
        """The last outer step with a metric of this name, and its row."""
        return next(((step, row) for step, row in reversed(self._rows.items()) if name in row), None)

    def compact(self) -> None:
        """Force the rows to the disk and write metrics.parquet: int64 outer_step and one float64 column a name.

        Raises OSError where the disk does not take them; both files are then as they were.
        """
        if self._file is None:
            self._rewrite()
        sync(self._lines)
        names = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        columns = {"outer_step": pa.array(list(self._rows), pa.int64())}
        for name in names:
            columns[name] = pa.array([row.get(name) for row in self._rows.values()], pa.float64())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomic(self._parquet, sink.getvalue().to_pybytes())

    def close(self) -> None:
        """Compact for the last time and close the file. Raises as ``compact``."""
        try:
            self.compact()
        finally:
            self._close_file()

    def _rewrite(self) -> None:
        write_atomic(self._lines, b"".join(self._encode(step) for step in self._rows))
        self._file = self._lines.open("ab", buffering=0)  # a buffer would hide where the disk was full

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _encode(self, step: int) -> bytes:
        return json.dumps({"outer_step": step, **self._rows[step]}).encode() + b"\n"
