"""The workers of a pool, and what its dispatcher has to know for every contribution: who is idle, whose answer is
awaited, which deadline comes next. It is kept up to date where a worker changes and never looked for among all of them,
so that a contribution costs the same with ten workers and with ten thousand.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from palf_dist.distributed.fleet import Answer, Handle, Ready
from palf_dist.distributed.pool import Broadcast
from palf_dist.types import Unit


@dataclass(eq=False)
class Issue:
    """A unit on its way through the pool."""

    unit: Unit
    broadcast: Broadcast
    carried: dict[str, np.ndarray] | None
    attempts: int = 0
    raised: int = 0
    halvings: int = 0  # times that it had its worker killed for memory
    seats: list[Seat] = field(default_factory=list)  # those at work on it now: two where it was late
    given: bool = False


@dataclass(eq=False)
class Seat:
    """One worker, from its start to its end. ``Seats`` changes it."""

    order: int  # of its start, among all that there ever were
    number: int
    handle: Handle
    answer: Answer | None  # to its start, to the unit it works on, or to nothing
    since: float  # when it began what it does now, be it nothing
    lost: float | None = None  # when its forerunner was found lost
    ready: Ready | None = None  # None while it starts
    issue: Issue | None = None
    there: bool = False  # its answer is there, and not taken yet
    leaving: bool = False  # its node is gone or soon will be: it gets no more work

    def __lt__(self, other: Seat) -> bool:
        return self.order < other.order

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" (pid {self.ready.pid})" if self.ready else "")


class SeatQueue:
    """Seats by a key, least first, of equal ones the older first: a heap from which any seat can be taken out."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, Seat]] = []
        self._entries: dict[Seat, tuple[float, Seat]] = {}  # what else is in the heap was taken out

    @property
    def first(self) -> Seat | None:
        return self._top()[1]

    @property
    def least(self) -> float:
        """The key of the first one; inf where there is none."""
        return self._top()[0]

    def put(self, seat: Seat, key: float) -> None:
        self._entries[seat] = entry = (key, seat)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:  # else one seat that stays would keep all that came after it
            self._heap = sorted(self._entries.values())

    def discard(self, seat: Seat) -> None:
        self._entries.pop(seat, None)

    def _top(self) -> tuple[float, Seat | None]:
        while self._heap and self._entries.get(self._heap[0][1]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else (float("inf"), None)


class Seats:
    """All workers, in the order of their start."""

    def __init__(self) -> None:
        self.alive = 0  # ready
        self.staying = 0  # ready, and may get more work
        self.idle = SeatQueue()  # those that may get work now, in the order of their start
        self.awaited: dict[Answer, Seat] = {}  # those whose answer is not there
        self.deadlines = SeatQueue()  # of the same ones
        self._seats: dict[Seat, None] = {}
        self._orders = itertools.count()
        self._numbers = itertools.count()
        self._free_numbers: list[int] = []  # a heap

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats)

    @property
    def lasting(self) -> int:
        """Workers whose node does not leave; those that start are among them."""
        return len(self._seats) - self.alive + self.staying

    def free_number(self) -> int:
        """The least one that no worker has."""
        return heapq.heappop(self._free_numbers) if self._free_numbers else next(self._numbers)

    def add(self, number: int, handle: Handle, answer: Answer, now: float, deadline: float, lost: float | None) -> None:
        """One more, which starts."""
        seat = Seat(next(self._orders), number, handle, answer, now, lost)
        self._seats[seat] = None
        self._expect(seat, deadline)

    def started(self, seat: Seat, ready: Ready) -> None:
        seat.ready = ready
        self.alive += 1
        self.staying += 1

    def busy(self, seat: Seat, issue: Issue, answer: Answer, now: float, deadline: float) -> None:
        """It has been given a unit."""
        seat.issue, seat.answer, seat.since = issue, answer, now
        self.idle.discard(seat)
        self._expect(seat, deadline)

    def arrived(self, answer: Answer) -> Seat:
        """An answer is there: its worker, which is in time whenever the answer is taken."""
        seat = self.awaited.pop(answer)
        seat.there = True
        self.deadlines.discard(seat)
        return seat

    def overdue(self, now: float) -> list[Seat]:
        """Those whose deadline has passed, which are told once; none whose answer is there."""
        found = []
        while (seat := self.deadlines.first) and self.deadlines.least <= now:
            self.deadlines.discard(seat)
            found.append(seat)
        return sorted(found)

    def free(self, seat: Seat, now: float) -> None:
        """Its answer was taken."""
        seat.issue, seat.answer, seat.since = None, None, now
        if not seat.leaving:
            self.idle.put(seat, seat.order)

    def leave(self, seat: Seat) -> None:
        """It is ready, and gets no more work."""
        seat.leaving = True
        self.staying -= 1
        self.idle.discard(seat)

    def remove(self, seat: Seat) -> None:
        del self._seats[seat]
        self.alive -= seat.ready is not None
        self.staying -= seat.ready is not None and not seat.leaving
        self.idle.discard(seat)
        self.deadlines.discard(seat)
        self.awaited.pop(seat.answer, None)
        heapq.heappush(self._free_numbers, seat.number)

    def _expect(self, seat: Seat, deadline: float) -> None:
        self.awaited[seat.answer] = seat
        self.deadlines.put(seat, deadline)
