"""Prints how meta-training scales and, with --write-docs, saves the tables: ``python -m benchmarks.scaling``"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.machine import cpu_model
from benchmarks.scaling.efficiency import ROUNDS, Efficiency, measure
from benchmarks.scaling.fleet import Latencies
from benchmarks.scaling.simulated import Simulation, simulate
from benchmarks.screen import shown
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.tasks.datasets import load_all

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "results_scaling.md"
WORKERS = (10, 100, 1000, 4000, 10000)
UNITS = 8
"""Of each simulated worker."""
SATURATION = (20.0, 4.0, 2.0, 1.0, 0.5)
"""Median seconds of a unit: the shorter, the more contributions the same workers make."""
SATURATION_WORKERS = 4000

Rows = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def settings() -> RunConfig:
    """The quick preset, shortened: 4 groups an outer step, no tuning of learning rates, nothing tracked."""
    changes = ("meta_learner.outer_steps=6", "meta_learner.groups_per_step=4", "evaluation.select_every=6")
    fixed = ("inner.learning_rate=0.01", "inner.weight_decay=0.0", "tracking.enabled=false")
    return load_config(ROOT / "configs" / "quick.yaml", [*changes, *fixed])


def efficiency_rows(measured: Iterable[Efficiency]) -> Rows:
    head = ("workers", "seconds of an outer step", "min - max", "of the ideal")
    rows = [
        (
            str(row.workers) if row.workers else "in process",
            f"{row.seconds:.2f}",
            f"{row.least:.2f} - {row.most:.2f}",
            "" if math.isnan(row.share) else f"{100 * row.share:.0f} %",
        )
        for row in measured
    ]
    return head, rows


def simulation_rows(simulations: Iterable[Simulation]) -> Rows:
    head = (
        "mode",
        "workers",
        "late units twice",
        "contributions/s",
        "workers' time used",
        "driver busy",
        "driver ms each",
        "driver MB over the run",
        "re-issued",
        "twice",
    )
    rows = [
        (
            item.mode,
            f"{item.workers:,}",
            "yes" if item.duplicates else "no",
            f"{item.rate:.1f}",
            f"{100 * item.efficiency:.0f} %",
            f"{100 * item.driver_busy:.0f} %",
            f"{item.driver_milliseconds:.1f}",
            " ".join(f"{value:.0f}" for value in item.memory),
            str(item.reissued),
            str(item.duplicated),
        )
        for item in simulations
    ]
    return head, rows


def simulations(workers: Sequence[int], rounds: int) -> Iterable[Simulation]:
    config = settings()
    datasets = load_all(config.data)
    for count in workers:
        for mode, duplicates in (("sync", False), ("sync", True), ("async", True)):
            yield simulate(config, datasets, mode=mode, workers=count, rounds=rounds, duplicates=duplicates)


def saturation(unit_seconds: Sequence[float], workers: int, rounds: int) -> Iterable[tuple[float, Simulation]]:
    """Asynchronous mode with more and more contributions a second, until the driver is busy all the time."""
    config = settings()
    datasets = load_all(config.data)
    for seconds in unit_seconds:
        latencies = Latencies(median=seconds, start=0.0)
        yield seconds, simulate(config, datasets, mode="async", workers=workers, rounds=rounds, latencies=latencies)


def saturation_rows(simulations: Iterable[tuple[float, Simulation]]) -> Rows:
    head = ("workers", "seconds of a unit", "ideal/s", "contributions/s", "workers' time used", "driver busy")
    rows = [
        (
            f"{item.workers:,}",
            f"{seconds:g}",
            f"{item.workers * item.contributions / item.worked:.0f}",
            f"{item.rate:.0f}",
            f"{100 * item.efficiency:.0f} %",
            f"{100 * item.driver_busy:.0f} %",
        )
        for seconds, item in simulations
    ]
    return head, rows


def markdown(rows: Rows) -> str:
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(real: Rows, simulated: Rows, saturated: Rows, rounds: int) -> str:
    return f"""# Scaling, as measured

Written by `python -m benchmarks.scaling --write-docs` on {cpu_model()} with {os.cpu_count()} cores. What follows
from it is in [scaling](scaling.md).

## Real workers

Outer steps of configs/quick.yaml with 4 task groups, in alternating rounds; medians. Ideal: w workers take a w-th of
the time that one process takes in the same round.

{markdown(real)}

## Simulated workers

The real driver; {Latencies()}. {rounds} units of each worker; in synchronous mode an outer step has as many groups as
there are workers. Trajectories are written by the workers.

{markdown(simulated)}

## Where the driver saturates

Asynchronous mode with shorter and shorter units, {rounds} of each simulated worker. Otherwise as above, but for workers
that start in no time. Ideal: contributions a second if all were at work all the time.

{markdown(saturated)}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), help="simulated workers")
    parser.add_argument("--units", type=int, default=UNITS, help="of each simulated worker")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the comparison of real workers; 0: none")
    parser.add_argument("--write-docs", action="store_true", help=f"also write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    console = Console()
    real = efficiency_rows(measure(settings(), options.rounds) if options.rounds else [])
    console.print(shown(real))
    done = []
    with console.status("simulated workers") as status:
        for item in simulations(options.workers, options.units):
            done.append(item)
            status.update(f"{len(done)} simulations are done, the last one with {item.workers:,} workers")
    simulated = simulation_rows(done)
    console.print(shown(simulated))
    with console.status("where the driver saturates"):
        most = min(SATURATION_WORKERS, max(options.workers))
        saturated = saturation_rows(saturation(SATURATION, most, options.units))
    console.print(shown(saturated))
    if options.write_docs:
        PAGE.write_text(page(real, simulated, saturated, options.units))


if __name__ == "__main__":
    main()
