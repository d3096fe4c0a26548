"""The best answer so far, there at any moment: the folder best/ and the curve anytime.parquet of a search."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from palf_dist.atomic import replacing_folder, superseded, write_atomic
from palf_dist.run_directory import BEST
from palf_dist.search.ledger import Heard
from palf_dist.search.trial import ON_THE_FLY, Parameters, Report

ANYTIME = "anytime.parquet"
BEST_RECORD = "best.json"


@dataclass(frozen=True)
class Best:
    """best.json: where the best answer comes from."""

    trial: int
    step: int
    error: float
    parameters: Parameters
    trainings: int  # trials that had reported by then
    seconds: float  # of work on the search by then


class Anytime:
    """Keeps best/ and anytime.parquet of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Go on from what is there: best/ is written before the ledger, so nothing that is recorded is better."""
        self._folder, self._curve = run_dir / BEST, run_dir / ANYTIME
        if not self._folder.exists():
            with contextlib.suppress(FileNotFoundError):  # killed in the instant of the exchange
                os.replace(superseded(self._folder), self._folder)
        self.best = read_best(run_dir)
        self._artefacts = self._folder.exists() and len(os.listdir(self._folder)) > 1  # whether the target gives any

    def offer(self, report: Report, trial: int, parameters: Parameters, trainings: int, seconds: float) -> bool:
        """Make the report's artefact the content of best/ where none was as good; whether it was so.

        A target that gives artefacts gives none with a report that it has a better one than: best/ stays as it is."""
        self._artefacts |= report.artefact is not None
        if not math.isfinite(report.error) or (self.best is not None and report.error >= self.best.error):
            return False
        if report.artefact is None and self._artefacts:
            return False
        used = parameters_used(parameters, report)
        best = Best(trial, report.step, float(report.error), used, trainings, round(seconds, 3))
        with replacing_folder(self._folder) as folder:
            if report.artefact is not None:
                shutil.copytree(report.artefact, folder, dirs_exist_ok=True)
            (folder / BEST_RECORD).write_text(json.dumps(asdict(best), indent=1))
        self.best = best
        return True

    def write_curve(self, history: Sequence[Heard]) -> None:
        """One row a report: seconds, trainings, trial, step, its error (null where it is not finite), and the best
        error so far (null before there is one)."""
        rows, best = [], math.inf
        for heard in history:
            finite = math.isfinite(heard.error)
            best = min(best, heard.error) if finite else best
            rows.append({**asdict(heard), "error": heard.error if finite else None, "best": best})
        columns = {
            name: pa.array([row[name] if row[name] != math.inf else None for row in rows], kind)
            for name, kind in _COLUMNS.items()
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomic(self._curve, sink.getvalue().to_pybytes())


_COLUMNS: dict[str, Any] = {
    "seconds": pa.float64(),
    "trainings": pa.int64(),
    "trial": pa.int64(),
    "step": pa.int64(),
    "error": pa.float64(),
    "best": pa.float64(),
}


def parameters_used(parameters: Parameters, report: Report) -> dict[str, Any]:
    """The values of what is searched, as they were at a report."""
    names = [name for name in parameters if name != ON_THE_FLY]
    values = [parameters[name] for name in names] if report.weights is None else report.weights
    return dict(zip(names, values, strict=True))


def read_best(run_dir: Path) -> Best | None:
    """The best answer so far of a search, also of one that is under way; None before there is one."""
    folder = run_dir / BEST
    for _ in range(2):  # between the two places and the exchange a reader can miss the folder once
        for place in (folder, superseded(folder)):
            with contextlib.suppress(FileNotFoundError):
                return Best(**json.loads((place / BEST_RECORD).read_text()))
    return None
