"""A fleet of simulated workers under a virtual clock: nodes come and go, workers die, stall and dawdle."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from palf_dist.distributed.fleet import Ready, WorkerDied, WorkerRaised
from palf_dist.distributed.pool import Broadcast
from palf_dist.errors import ConfigError
from palf_dist.types import Contribution, Unit

INFINITY = float("inf")


@dataclass(frozen=True)
class Fate:
    """What becomes of one start or one unit, and after how many seconds."""

    seconds: float
    end: Literal["done", "dies", "out of memory", "raises", "refuses", "stalls"] = "done"


@dataclass(frozen=True)
class NodeEvent:
    """At a moment, a node with this many slots joins, is drained or is gone."""

    at: float
    node: str
    what: Literal["joins", "leaves", "dies"]
    slots: int = 1


@dataclass(eq=False)
class SimulatedWorker:
    number: int
    node: str | None = None  # None while there is no room for it
    killed: bool = False
    dead: bool = False
    asked: list[SimulatedAnswer] = field(default_factory=list)


@dataclass(eq=False)
class SimulatedAnswer:
    worker: SimulatedWorker
    due: float = INFINITY
    result: Ready | Contribution | WorkerDied | WorkerRaised | None = None
    taken: bool = False


class SimulatedFleet:
    """Implements Fleet. ``starts`` and ``units``: the fates of the first ones, in the order in which they are begun;
    all others are done after 1 s and 10 s."""

    each = "1 CPU and 0 GPU"

    def __init__(
        self,
        nodes: dict[str, int],
        starts: Iterable[Fate] = (),
        units: Iterable[Fate] = (),
        events: Iterable[NodeEvent] = (),
        grows: bool = False,
    ) -> None:
        self.grows = grows
        self.now = 0.0
        self.runs = 0
        self.workers: list[SimulatedWorker] = []
        self._nodes = dict(nodes)
        self._leaving: set[str] = set()
        self._starts, self._units = iter(starts), iter(units)
        self._events = sorted(events, key=lambda event: event.at)

    @property
    def living(self) -> list[SimulatedWorker]:
        """Workers that have a place and are neither killed nor dead."""
        return [worker for worker in self.workers if worker.node and not worker.killed and not worker.dead]

    def start(self, number: int) -> tuple[SimulatedWorker, SimulatedAnswer]:
        assert number not in [w.number for w in self.workers if not w.killed], "two workers of one number"
        worker = SimulatedWorker(number)
        answer = SimulatedAnswer(worker)
        worker.asked.append(answer)
        self.workers.append(worker)
        self._place()
        return worker, answer

    def run(
        self,
        handle: SimulatedWorker,
        unit: Unit,
        broadcast: Broadcast,
        carried: dict[str, np.ndarray] | None,
        halvings: int,
    ) -> SimulatedAnswer:
        assert not handle.killed and all(answer.taken for answer in handle.asked), "it is not free for work"
        self.runs += 1
        answer = SimulatedAnswer(handle)
        handle.asked.append(answer)
        if handle.dead:
            answer.due, answer.result = self.now, WorkerDied("it was dead before")
        else:
            self._doom(answer, next(self._units, Fate(10.0)), Contribution(unit, broadcast.version, halvings=halvings))
        return answer

    def wait(self, answers: Collection[SimulatedAnswer], timeout: float) -> list[SimulatedAnswer]:
        assert all(not answer.worker.killed and not answer.taken for answer in answers)
        assert timeout < INFINITY
        end = self.now + timeout
        while True:
            ready = [answer for answer in answers if answer.due <= self.now]
            if ready or self.now >= end:
                return ready
            soonest = min([end, *(answer.due for answer in answers), *(event.at for event in self._events[:1])])
            self.now = max(self.now, soonest)
            while self._events and self._events[0].at <= self.now:
                self._happen(self._events.pop(0))

    def take(self, answer: SimulatedAnswer) -> Ready | Contribution:
        assert answer.due <= self.now and not answer.taken
        answer.taken = True
        if isinstance(answer.result, WorkerDied):
            answer.worker.dead = True
        if isinstance(answer.result, Exception):
            raise answer.result
        assert answer.result is not None
        return answer.result

    def kill(self, handle: SimulatedWorker) -> None:
        assert not handle.killed
        handle.killed = True
        self._place()

    def room(self) -> int:
        return sum(slots for node, slots in self._nodes.items() if node not in self._leaving)

    def nodes(self) -> set[str]:
        return self._nodes.keys() - self._leaving

    def clock(self) -> float:
        return self.now

    def _happen(self, event: NodeEvent) -> None:
        if event.what == "joins":
            self._nodes.setdefault(event.node, event.slots)
        elif event.what == "leaves" and event.node in self._nodes:
            self._leaving.add(event.node)
        elif event.what == "dies" and self._nodes.pop(event.node, None) is not None:
            self._leaving.discard(event.node)
            for worker in [worker for worker in self.workers if worker.node == event.node]:
                worker.dead = True
                for answer in worker.asked:
                    if not answer.taken:
                        answer.due, answer.result = self.now, WorkerDied("its node is gone")
        self._place()

    def _place(self) -> None:
        """Give each worker that waits for room a slot, as far as there are any."""
        for worker in self.workers:
            if worker.killed or worker.node is not None:
                continue
            for node, slots in self._nodes.items():
                taken = sum(other.node == node and not other.killed for other in self.workers)
                if node not in self._leaving and taken < slots:
                    worker.node = node
                    fate = next(self._starts, Fate(1.0))
                    self._doom(worker.asked[0], fate, Ready(1000 + len(self.workers), node))
                    break

    def _doom(self, answer: SimulatedAnswer, fate: Fate, result: Ready | Contribution) -> None:
        answer.due = INFINITY if fate.end == "stalls" else self.now + fate.seconds
        if fate.end == "dies":
            answer.result = WorkerDied("in the simulation:\nkilled")
        elif fate.end == "out of memory":
            answer.result = WorkerDied("the monitor killed it", for_memory=True)
        elif fate.end == "refuses":
            answer.result = WorkerRaised(ConfigError("tasks.group_size: too little memory"))
        elif fate.end == "raises":
            answer.result = WorkerRaised(ValueError("raised in the simulation"))
        else:
            answer.result = result
