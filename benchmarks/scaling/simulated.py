"""The real dispatcher, session, meta-learner, metrics log and checkpoints, with simulated workers: what the driver can
take, what stragglers and dead workers cost, and whether its memory stays flat."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from rich.console import Console

from benchmarks.scaling.fleet import Latencies, SimulatedFleet
from palf_dist import units
from palf_dist.config import RunConfig
from palf_dist.distributed import dispatcher
from palf_dist.distributed.dispatcher import Dispatcher
from palf_dist.distributed.meta_training import MetaTraining
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.session import Session
from palf_dist.progress import Progress
from palf_dist.randomness import random_generator
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tracking import NullTracker
from palf_dist.types import Contribution, Unit
from palf_dist.workplace import Workplace

MEASURED = 4
"""Moments, evenly spread over the outer steps, at which the driver's memory is read."""


@dataclass(frozen=True)
class Simulation:
    """What one simulated meta-training came to."""

    mode: str
    workers: int
    duplicates: bool
    contributions: int  # applied
    seconds: float  # of the run: the driver's own and the skipped ones
    busy: float  # seconds in which the driver computed
    worked: float  # seconds of all the workers' units that were answered
    memory: tuple[float, ...]  # MB of the driver's process, at MEASURED moments
    reissued: int
    duplicated: int
    refused: int

    @property
    def rate(self) -> float:
        """Contributions a second."""
        return self.contributions / self.seconds

    @property
    def efficiency(self) -> float:
        """Share of the workers' time that went into contributions."""
        return self.worked / (self.workers * self.seconds)

    @property
    def driver_busy(self) -> float:
        return self.busy / self.seconds

    @property
    def driver_milliseconds(self) -> float:
        """The driver's time for one contribution."""
        return 1e3 * self.busy / self.contributions


class Templates:
    """Contributions of the real runner, one of each kind, which the simulated workers repeat under other keys.

    Trajectories are left out, as where the run directory is a URI: the workers write them.
    """

    def __init__(self, config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
        self._runner, self._done = units.Runner(config, datasets), dict[str, Contribution]()
        self._generator = random_generator("simulated contributions")

    def __call__(self, unit: Unit, broadcast: Broadcast) -> Contribution:
        if unit.kind not in self._done:
            made = self._runner.run(unit, broadcast.policy, broadcast.version, broadcast.prepared)
            self._done[unit.kind] = replace(made, trajectory=None)
        template = self._done[unit.kind]
        gradient = template.gradient
        if gradient is not None:
            gradient = gradient * self._generator.uniform(0.5, 1.5)
        return replace(template, unit=unit, policy_version=broadcast.version, gradient=gradient)


def simulate(
    config: RunConfig,
    datasets: Mapping[str, EncodedDataset],
    *,
    mode: str,
    workers: int,
    rounds: int,
    duplicates: bool = True,
    latencies: Latencies | None = None,
) -> Simulation:
    """A meta-training of ``rounds`` units per worker. ``duplicates``: whether late units are issued a second time."""
    synchronous = mode == "sync"
    learner = {
        "groups_per_step": workers if synchronous else 1,
        "outer_steps": rounds if synchronous else rounds * workers,
    }
    config = _changed(
        config,
        meta_learner=learner,
        distributed={"mode": mode, "workers": workers, "max_staleness": 10 * workers, "unit_timeout": 3600.0},
        evaluation={"select_every": learner["outer_steps"], "select_tasks": config.tasks.group_size},
        checkpoint={"every": 5 if synchronous else 5 * workers},
    )
    templates = Templates(config, datasets)
    fleet = SimulatedFleet(templates, latencies or Latencies(), random_generator("scaling", mode, workers), workers)
    process, memory = psutil.Process(), list[float]()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(dispatcher, "STRAGGLER_FACTOR", dispatcher.STRAGGLER_FACTOR if duplicates else float("inf")),
    ):
        progress = Progress(Console(file=io.StringIO()))
        pool = Dispatcher(fleet, config.distributed, progress.event)
        session = Session(config, datasets, pool, progress, threading.Event())
        place = Workplace(Path(folder), Path(folder), progress.event)
        training = MetaTraining(session, place, NullTracker(), None)
        moments = [round(config.meta_learner.outer_steps * (part + 1) / MEASURED) for part in range(MEASURED)]
        finish = training._finish_step

        def finished(*arguments: Any) -> dict[str, float]:
            metrics = finish(*arguments)
            if training.learner.version in moments:
                memory.append(process.memory_info().rss / 1e6)
            return metrics

        with patch.object(training, "_finish_step", finished):
            for unit in (*units.select_units(config, 0)[:1], *units.meta_gradient_units(config, 0)[:1]):
                templates(unit, training._broadcast())  # a real one, which is no work of the driver's
            worked, began, skipped = fleet.worked, time.perf_counter(), fleet.skipped
            for _ in training.run():
                pass
        busy = time.perf_counter() - began
        pool.close()
    return Simulation(
        mode=mode,
        workers=workers,
        duplicates=duplicates,
        contributions=training.learner.applied,
        seconds=busy + fleet.skipped - skipped,
        busy=busy,
        worked=fleet.worked - worked,
        memory=tuple(memory),
        reissued=pool.reissued,
        duplicated=pool.duplicated,
        refused=sum(training.learner.refused.values()),
    )


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    whole = config.model_dump()
    return RunConfig.model_validate(
        {**whole, **{name: {**whole[name], **section} for name, section in sections.items()}}
    )
