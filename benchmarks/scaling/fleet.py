"""Simulated workers for the real driver. Time is the driver's own, which passes, and the workers', which is skipped:
what the driver computes costs what it costs here, and nobody waits for a simulated training."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from palf_dist.distributed.fleet import Ready, WorkerDied
from palf_dist.distributed.pool import Broadcast
from palf_dist.types import Contribution, Unit

NODE = "simulated"


@dataclass(frozen=True)
class Latencies:
    """The distributions that everything is drawn from, in seconds."""

    median: float = 20.0  # of a unit: log-normal
    spread: float = 0.2  # standard deviation of its logarithm
    straggling: float = 0.01  # share of the units that take ``slower`` times as long
    slower: float = 8.0
    dying: float = 0.002  # share of the units whose worker dies half-way
    start: float = 15.0  # of a worker

    def __str__(self) -> str:
        return (
            f"a unit takes {self.median:g} s (log-normal, sigma {self.spread:g}), one in {1 / self.straggling:.0f} "
            f"{self.slower:g} times as long; the worker of one in {1 / self.dying:.0f} dies half-way; a new worker "
            f"takes {self.start:g} s to start"
        )

    def unit(self, generator: np.random.Generator) -> float:
        slow = self.slower if generator.random() < self.straggling else 1.0
        return slow * self.median * float(np.exp(self.spread * generator.normal()))


@dataclass(eq=False)
class Worker:
    number: int
    killed: bool = False


@dataclass(eq=False)
class Answer:
    worker: Worker
    due: float
    result: Callable[[], Ready | Contribution]
    dies: bool = False


@dataclass
class SimulatedFleet:
    """Implements Fleet. ``contribution``: what a unit gives, of the size of a real one."""

    contribution: Callable[[Unit, Broadcast], Contribution]
    latencies: Latencies
    generator: np.random.Generator
    workers: int
    grows: bool = False
    each: str = "one slot"
    skipped: float = 0.0  # seconds in which the driver had nothing to do
    worked: float = 0.0  # seconds that units took whose answers were taken
    _due: list[tuple[float, int, Answer]] = field(default_factory=list)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    def start(self, number: int) -> tuple[Worker, Answer]:
        worker = Worker(number)
        return worker, self._promise(worker, self.latencies.start, lambda: Ready(number, NODE))

    def run(
        self, handle: Worker, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None, halvings: int
    ) -> Answer:
        seconds = self.latencies.unit(self.generator)
        dies = self.generator.random() < self.latencies.dying

        def result() -> Contribution:
            self.worked += seconds
            return self.contribution(unit, broadcast)

        return self._promise(handle, seconds / 2 if dies else seconds, result, dies)

    def wait(self, answers: Collection[Answer], timeout: float) -> list[Answer]:
        end = self.clock() + timeout
        soonest = min(end, self._due[0][0] if self._due else end)
        self.skipped += max(0.0, soonest - self.clock())
        ready = []
        while self._due and self._due[0][0] <= self.clock():
            answer = heapq.heappop(self._due)[2]
            if not answer.worker.killed:
                ready.append(answer)
        return ready

    def take(self, answer: Answer) -> Ready | Contribution:
        if answer.dies:
            raise WorkerDied("killed in the simulation")
        return answer.result()

    def kill(self, handle: Worker) -> None:
        handle.killed = True

    def room(self) -> int:
        return self.workers

    def nodes(self) -> set[str]:
        return {NODE}

    def clock(self) -> float:
        return time.perf_counter() + self.skipped

    def _promise(
        self, worker: Worker, seconds: float, result: Callable[[], Ready | Contribution], dies: bool = False
    ) -> Answer:
        answer = Answer(worker, self.clock() + seconds, result, dies)
        heapq.heappush(self._due, (answer.due, next(self._number), answer))
        return answer
