"""metrics.parquet: one row per outer step, each step exactly once, whatever was killed in between.

Rows are appended to metrics.jsonl as they come; ``compact`` makes them durable and writes the Parquet file from them.
All rows are in memory as columns, 9 bytes a value, so that one that a full disk does not take is written by the next
``compact`` that succeeds.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palf_dist.atomic import json_lines, sync, write_atomic
from palf_dist.run_directory import METRICS


class _Column:
    """The values of one metric, and which rows have one. The first ``rows`` have none."""

    def __init__(self, rows: int) -> None:
        self.values, self.there = array("d", [0.0]) * rows, bytearray(rows)

    def append(self, value: float | None) -> None:
        self.values.append(0.0 if value is None else value)
        self.there.append(value is not None)


class MetricsLog:
    """Metrics of the outer steps of one run. Call ``compact`` before each checkpoint and at the end."""

    def __init__(self, run_dir: Path, next_step: int = 0) -> None:
        """Open the log of a run that goes on with outer step ``next_step``; rows of later steps are dropped."""
        self._parquet = run_dir / METRICS
        self._lines = self._parquet.with_suffix(".jsonl")
        self._steps = array("q")
        self._columns: dict[str, _Column] = {}
        if self._lines.exists():
            for row in json_lines(self._lines.read_bytes()):
                step = row.pop("outer_step")
                if step < next_step:
                    self._add(step, row)
        self._file: BinaryIO | None = None
        with contextlib.suppress(OSError):
            self._rewrite()

    def append(self, outer_step: int, metrics: Mapping[str, float]) -> None:
        """Add the row of one outer step. New names may appear at any time: earlier rows are null there."""
        assert not self._steps or self._steps[-1] < outer_step, f"outer step {outer_step} was logged twice"
        self._add(outer_step, metrics)
        if self._file is None:
            return
        line = self._encode(len(self._steps) - 1)
        with contextlib.suppress(OSError):
            if self._file.write(line) == len(line):
                return
        self._close_file()  # what follows a torn line would be lost with it

    def latest(self, name: str) -> tuple[int, dict[str, float]] | None:
        """The last outer step with a metric of this name, and its row."""
        if name not in self._columns:
            return None
        index = self._columns[name].there.rindex(True)
        return self._steps[index], self._row(index)

    def compact(self) -> None:
        """Force the rows to the disk and write metrics.parquet: int64 outer_step and one float64 column a name.

        Raises OSError where the disk does not take them; both files are then as they were.
        """
        if self._file is None:
            self._rewrite()
        sync(self._lines)
        columns = {"outer_step": pa.array(np.array(self._steps), pa.int64())}
        for name, column in self._columns.items():
            columns[name] = pa.array(np.array(column.values), pa.float64(), mask=np.array(column.there) == 0)
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
        write_atomic(self._lines, b"".join(map(self._encode, range(len(self._steps)))))
        self._file = self._lines.open("ab", buffering=0)  # a buffer would hide where the disk was full

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _add(self, step: int, row: Mapping[str, float]) -> None:
        for name in row:
            if name not in self._columns:
                self._columns[name] = _Column(len(self._steps))
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(row.get(name))

    def _row(self, index: int) -> dict[str, float]:
        return {name: column.values[index] for name, column in self._columns.items() if column.there[index]}

    def _encode(self, index: int) -> bytes:
        return json.dumps({"outer_step": self._steps[index], **self._row(index)}).encode() + b"\n"
