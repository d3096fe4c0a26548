"""What every phase of a run works with: its pool, its progress, its wish to stop, and the wait for contributions."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

import numpy as np

from palf_dist.config import DistributedConfig, RunConfig
from palf_dist.distributed.kept_units import KeptUnits
from palf_dist.distributed.metrics import RunMetrics
from palf_dist.distributed.pool import Broadcast, InProcessPool, RunnerFactory, WorkerPool
from palf_dist.memory import Plan, halved, machine_memory
from palf_dist.progress import Progress
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution, Unit
from palf_dist.workplace import Workplace

POLL_SECONDS = 0.2
"""How long a wish to stop may go unheard while no contribution comes."""

Carried = Mapping[int, dict[str, np.ndarray]]
"""Inner states of the windowed estimators by task group."""


class Stopped(Exception):
    """The user wants the run to end; what is in flight is abandoned."""


@dataclass
class Session:
    """An open pool and the phases' access to it."""

    config: RunConfig
    datasets: Mapping[str, EncodedDataset]
    pool: WorkerPool
    progress: Progress
    stop: threading.Event
    reissued_before: int = 0  # by the processes that worked on this run before
    on_arrival: Callable[[Contribution], None] = lambda _: None  # takes from a contribution what nobody should hold
    metrics: RunMetrics = field(default_factory=RunMetrics)
    kept: KeptUnits | None = None  # where the run has a directory
    _backlog: deque[Contribution] = field(default_factory=deque)

    @property
    def reissued(self) -> int:
        """Units issued again since the run began."""
        return self.reissued_before + self.pool.reissued

    @property
    def in_flight(self) -> int:
        """Units submitted that ``next`` has not given yet."""
        return self.pool.pending + len(self._backlog)

    def next(self) -> Contribution:
        """The next contribution. Raises Stopped when the user wants the run to end."""
        if self._backlog:
            return self._backlog.popleft()
        return self._arrival()

    def gather(
        self,
        units: Sequence[Unit],
        broadcast: Broadcast,
        carried: Carried | None = None,
        *,
        each: Callable[[Contribution], None] = lambda _: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Contribution]:
        """Have ``units`` run and return their contributions in key order; others that arrive wait for ``next``.

        ``each``: told of every one as it arrives. ``meanwhile``: called several times a second while none does.
        """
        for unit in units:
            self.pool.submit(unit, broadcast, (carried or {}).get(unit.group))
        wanted = set(units)
        gathered: list[Contribution] = []
        while len(gathered) < len(units):
            contribution = self._arrival(meanwhile)
            if contribution.unit in wanted:
                gathered.append(contribution)
                each(contribution)
            else:
                self._backlog.append(contribution)
        return sorted(gathered, key=lambda contribution: contribution.unit)

    def _arrival(self, meanwhile: Callable[[], None] = lambda: None) -> Contribution:
        status = self.progress.status
        while True:
            if self.stop.is_set():
                raise Stopped
            contribution = self.pool.next_completed(POLL_SECONDS)
            status.workers = self.pool.alive if self.config.distributed.workers else None
            status.reissued = self.reissued
            self.metrics.workers()
            if contribution is not None:
                status.contributions += 1
                self.metrics.contribution(contribution)
                if contribution.halvings:
                    self.progress.event(halved(contribution))
                self.on_arrival(contribution)
                return contribution
            meanwhile()


@contextlib.contextmanager
def open_session(
    config: RunConfig,
    datasets: Mapping[str, EncodedDataset],
    progress: Progress,
    stop: threading.Event,
    make_runner: RunnerFactory,
    place: Workplace | None = None,
) -> Iterator[Session]:
    """A session with its pool, and with Ray where there are workers. Inside, the first Ctrl-C only sets ``stop``.

    ``place``: the run directory; under a URI Ray's workers write the trajectories of their own units there.
    """
    with contextlib.ExitStack() as stack:
        pool: WorkerPool
        metrics = RunMetrics()
        if config.distributed.workers == 0:
            Plan(config, datasets, machine_memory()).check()
            pool = InProcessPool(config, datasets, make_runner)
        else:
            from palf_dist.distributed.cluster import connect, memory_of_each, nodes  # importing ray takes a while
            from palf_dist.distributed.dispatcher import Dispatcher
            from palf_dist.distributed.ray_fleet import RayFleet

            wanted = config.distributed.workers
            progress.begin("starting workers", 1 if wanted == "auto" else wanted)
            share = stack.enter_context(connect(config.distributed, size_of(datasets)))
            if not share.gpus:  # else each worker checks what its GPU has
                Plan(config, datasets, memory_of_each(nodes(), share, wanted)).check()
            fleet = RayFleet(config, datasets, make_runner, share, place.shared if place else None)
            steady = min(config.meta_learner.outer_steps, most_in_flight(config.distributed))
            pool = Dispatcher(
                fleet, config.distributed, progress.event, steady if config.distributed.mode == "async" else 0
            )
            metrics = RunMetrics.on_ray(config.name, pool)
        stack.callback(pool.close)
        stack.enter_context(signals_stop(stop, progress))
        kept = KeptUnits(place, config, datasets) if place else None
        yield Session(config, datasets, pool, progress, stop, metrics=metrics, kept=kept)


def size_of(datasets: Mapping[str, EncodedDataset]) -> int:
    """Bytes that Ray's object store takes for them."""
    return sum(array.nbytes for dataset in datasets.values() for array in dataset.to_arrays().values())


def most_in_flight(config: DistributedConfig) -> int:
    """Asynchronous mode with ``workers: auto``: with more units in flight than this, most would come too late to be
    applied. Of n in flight the average one is late by n - 1 outer steps."""
    return 2 * (config.max_staleness + 1)


@contextlib.contextmanager
def signals_stop(stop: threading.Event, progress: Progress) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop``, a second one raises KeyboardInterrupt. Only the main thread can see to that.

    To be entered after Ray was started, which puts a SIGTERM handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        progress.event(f"{signal.Signals(number).name}: ending with a checkpoint; once more ends at once")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
