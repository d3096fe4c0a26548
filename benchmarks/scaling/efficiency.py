"""Real workers on this machine: outer steps with one and two Ray workers against the same ones in process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from palf_dist.config import RunConfig
from palf_dist.distributed.driver import train_policy
from palf_dist.run_directory import METRICS

WORKERS = (0, 1, 2)
ROUNDS = 5


@dataclass(frozen=True)
class Efficiency:
    """Seconds of an outer step: the median over all rounds, and the least and the most of the rounds' medians."""

    workers: int
    seconds: float
    least: float
    most: float
    share: float  # of the ideal: in-process seconds / (workers * seconds), median of the rounds; nan in process


def measure(config: RunConfig, rounds: int = ROUNDS) -> list[Efficiency]:
    """The three take turns, ``rounds`` times, and each is compared with its own round: the machine's pace drifts."""
    times: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _ in range(rounds):
        for workers in WORKERS:
            times[workers].append(_outer_step(config, workers))

    def share(workers: int) -> float:
        pairs = zip(times[0], times[workers], strict=True)
        return median(alone / (workers * seconds) for alone, seconds in pairs) if workers else float("nan")

    return [
        Efficiency(workers, median(seconds), min(seconds), max(seconds), share(workers))
        for workers, seconds in times.items()
    ]


def _outer_step(config: RunConfig, workers: int) -> float:
    """Median seconds of one, without the first, in which everything is new, and without those that end with a
    selection."""
    settings = config.distributed.model_copy(update={"workers": workers})
    config = config.model_copy(update={"distributed": settings})
    with tempfile.TemporaryDirectory() as folder:
        for _ in train_policy(config, Path(folder) / "run"):
            pass
        rows = pq.read_table(Path(folder) / "run" / METRICS).to_pylist()
    return median(row["seconds"] for row in rows[1:] if row.get("selection_score") is None)
