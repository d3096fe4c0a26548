"""Runs every (problem, seed, method) in processes of its own and keeps each result as one Parquet file, written whole
or not at all: an interrupted benchmark goes on where it was."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tuneloss.methods import METHODS
from benchmarks.tuneloss.problems import CASES
from palf_dist.atomic import write_atomic

SCHEMA = pa.schema(
    {
        "problem": pa.string(),
        "seed": pa.int64(),
        "method": pa.string(),
        "training": pa.int64(),
        "error": pa.float64(),
        "cost": pa.int64(),
        "snapshots": pa.int64(),
        "kind": pa.string(),
        "weights": pa.list_(pa.float64()),
        "seconds": pa.float64(),
    }
)
"""One row per training; ``seconds`` is the wall time of the whole run."""


ON_THE_FLY = "on_the_fly"  # kind of a training
LOOK_SECONDS = 0.2  # between two looks for a Ctrl-C


@dataclass(frozen=True)
class Run:
    """One method on one problem."""

    problem: str
    seed: int
    method: str
    trainings: int

    @property
    def budget(self) -> int:
        """Trainings that the method gets."""
        return min(self.trainings, METHODS[self.method].most_trainings or self.trainings)

    def path(self, folder: Path) -> Path:
        return folder / "runs" / self.method / f"{self.problem}-{self.seed}.parquet"

    def is_done(self, folder: Path) -> bool:
        """True where a result with as many trainings, or more, is kept. More serve for fewer: no method looks at its
        budget."""
        path = self.path(folder)
        return path.exists() and pq.read_metadata(path).num_rows >= self.budget


@dataclass(frozen=True)
class Curve:
    """What one run found."""

    problem: str
    seed: int
    method: str
    errors: np.ndarray  # [n] best so far after each training; infinite before the first that did not fail
    costs: np.ndarray  # [n] gradient evaluations up to each training, summed
    starts_on_the_fly: bool = False

    @property
    def case(self) -> tuple[str, int]:
        return self.problem, self.seed

    @property
    def spent(self) -> tuple[float, float]:
        """Trainings and gradient evaluations in all."""
        return float(len(self.errors)), float(self.costs[-1])

    def until(self, error: float) -> tuple[float, float]:
        """Trainings and gradient evaluations until the best so far is at most ``error``; infinite if never."""
        reached = np.flatnonzero(self.errors <= error)
        return (float(reached[0] + 1), float(self.costs[reached[0]])) if len(reached) else (np.inf, np.inf)


def run_all(runs: Iterable[Run], folder: Path, processes: int) -> Iterator[str]:
    """Do the runs that are not done; yields a line about each, in the order in which they end."""
    # Every process keeps to one thread: the libraries read this when they are imported, in the new process.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    interrupted = threading.Event()
    # No exception, which Python drops where it comes in a callback: its processes, which die of the same signal, would
    # then be taken for broken ones.
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), _quiet) as pool:
            left = {pool.submit(_do, run, folder) for run in runs}
            try:
                while left:
                    done, left = wait(left, LOOK_SECONDS, FIRST_COMPLETED)
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    for future in done:
                        yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        signal.signal(signal.SIGINT, before)


def load_curve(run: Run, folder: Path) -> Curve:
    """The kept result of a run that is done, cut to its budget."""
    table = pq.read_table(run.path(folder))[: run.budget]
    errors = np.minimum.accumulate(_finite(table["error"]))
    costs = table["cost"].to_numpy() + _looks(run, table)
    return Curve(run.problem, run.seed, run.method, errors, np.cumsum(costs), table["kind"][0].as_py() == ON_THE_FLY)


def _looks(run: Run, table: pa.Table) -> np.ndarray:
    """Gradient evaluations [n] that a method's looks at validation rows are worth: a forward pass is a third of one,
    and there are more rows to validate than to train. Searchers look once per training; TuneLoss without derivatives at
    each snapshot, with them only on the fly."""
    train, validate = CASES[run.problem].rows
    snapshots = table["snapshots"].to_numpy()
    on_the_fly = np.array([kind == ON_THE_FLY for kind in table["kind"].to_pylist()])
    learns = run.method.startswith("tuneloss") and METHODS[run.method].derivatives == "none"
    return np.where(on_the_fly | learns, snapshots, 1) * validate / (3 * train)


def best_found(folder: Path) -> dict[tuple[str, int], float]:
    """(problem, seed) -> lowest error of any training of any method that is kept in the folder."""
    best: dict[tuple[str, int], float] = {}
    for path in sorted((folder / "runs").rglob("*.parquet")):
        table = pq.read_table(path, columns=["problem", "seed", "error"])
        case = (table["problem"][0].as_py(), table["seed"][0].as_py())
        best[case] = min(best.get(case, np.inf), _finite(table["error"]).min())
    return best


def _finite(column: pa.ChunkedArray) -> np.ndarray:
    """Errors with failed trainings as infinite."""
    errors = column.to_numpy()
    return np.where(np.isfinite(errors), errors, np.inf)


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a process in the middle of a run, which is not kept
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)


def _do(run: Run, folder: Path) -> str:
    method = METHODS[run.method]
    begun = time.perf_counter()
    done = method.run(CASES[run.problem].make(run.seed, method.derivatives), run.budget, run.seed)
    seconds = time.perf_counter() - begun
    assert len(done) == run.budget, f"{run.method} did {len(done)} trainings of {run.budget}"
    rows = [
        {
            "problem": run.problem,
            "seed": run.seed,
            "method": run.method,
            "training": number,
            "error": trial.error,
            "cost": trial.cost,
            "snapshots": trial.snapshots,
            "kind": trial.kind,
            "weights": trial.weights.tolist(),
            "seconds": seconds,
        }
        for number, trial in enumerate(done, 1)
    ]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), content)
    path = run.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())
    best = min((trial.error for trial in done if np.isfinite(trial.error)), default=np.nan)
    return f"{run.problem} seed {run.seed}, {method.label}: best {best:.4f}, {seconds:.0f} s"
