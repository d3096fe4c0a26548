"""The pool of workers that outlives the death and the stalling of any of them: who does what, and when it is late.

Every submitted unit is given exactly once. A worker that dies, stalls or cannot be reached is killed and replaced, and
its unit goes back to the front of the queue; what it might still have answered is never asked for. A unit that takes
far longer than its kind does, while another worker has nothing to do, is issued a second time: the first answer is
given, the other one dropped. Units are pure functions, so that it does not matter which.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

import numpy as np

from palf_dist.config import DistributedConfig
from palf_dist.distributed.fleet import Fleet, Ready, WorkerDied, WorkerRaised
from palf_dist.distributed.pool import Broadcast, OnEvent, UnitBug, UnitError, describe
from palf_dist.distributed.seats import Issue, Seat, SeatQueue, Seats
from palf_dist.errors import ClusterError, PalfError
from palf_dist.faults import fault_point
from palf_dist.types import Contribution, Unit

STARTING_SECONDS = 300.0
"""How long a worker may take to become ready, the wait for room included; then another one is started in its place."""

PATIENCE, PATIENCE_OF_AUTO = 900.0, 1800.0
"""Seconds that units may wait while no worker is ready: with ``auto`` a cluster without a node is nothing unusual."""

RAISING_ATTEMPTS = 2
"""Times a unit that raises an exception is tried: were the fault the worker's own, another one would not have it."""

STRAGGLER_FACTOR, STRAGGLER_AFTER, STRAGGLER_SECONDS = 3.0, 5, 5.0
"""A unit is late once it has taken this many times the median of its kind, known from so many units at least, and this
many seconds in any case."""

REMEMBERED = 64
"""Units of each kind whose durations make the median: the newest ones."""

LOOK_SECONDS = 3.0
"""Between two looks at what the cluster has room for and which nodes are leaving."""

IDLE_SECONDS = 60.0
"""``workers: auto`` gives back a worker that has had nothing to do for so long."""


class Dispatcher:
    """``settings.workers`` workers of a fleet, or as many as it has room for and units need. Implements WorkerPool."""

    def __init__(self, fleet: Fleet, settings: DistributedConfig, on_event: OnEvent, steady: int = 0) -> None:
        """``steady``: units that the caller keeps in flight as far as ``capacity`` goes (asynchronous mode); with
        ``workers: auto`` this many workers are worth having, however few units are pending."""
        self.reissued = 0
        self.duplicated = 0  # units that were issued a second time while the first was still at work
        self.recoveries: list[float] = []  # seconds from each loss of a worker to the moment its successor was ready
        self._fleet, self._settings, self._on_event, self._steady = fleet, settings, on_event, steady
        self._queue: deque[Issue] = deque()
        self._arrived: deque[Contribution] = deque()
        self._there: deque[Seat] = deque()  # their answers are there, and not taken yet: one at a time is in memory
        self._unfinished = 0  # units submitted that have not arrived
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._limits: dict[str, float] = {}  # how long a unit of a kind may take before it is late
        self._alone: dict[str, SeatQueue] = defaultdict(SeatQueue)  # at work on what may be issued twice, by beginning
        self._seats = Seats()
        self._room: int | None = None
        self._failed_starts: dict[int, int] = {}  # in a row, by the worker's number
        self._given_up = 0  # workers that never started
        self._last_ready = self._next_look = fleet.clock()
        self._look()

    @property
    def alive(self) -> int:
        return self._seats.alive

    @property
    def capacity(self) -> int:
        """Units worth having in flight, where the caller chooses how many."""
        if self._settings.workers != "auto":
            return self._settings.workers
        return max(1, self._seats.staying)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [seat.ready.pid for seat in self._seats if seat.ready is not None]

    @property
    def pending(self) -> int:
        return self._unfinished + len(self._arrived)

    def submit(self, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None = None) -> None:
        self._queue.append(Issue(unit, broadcast, carried))
        self._unfinished += 1

    def next_completed(self, timeout: float) -> Contribution | None:
        end = self._fleet.clock() + timeout
        while True:
            if self._fleet.clock() >= self._next_look:
                self._look()
            self._hand_out()
            if self._arrived:
                return self._arrived.popleft()
            if not self._there:
                if not self._seats.awaited and not self._unfinished:
                    return None
                self._wait(end)
            while self._there and not self._arrived:
                self._take(self._there.popleft())
            self._expire()
            if not self._arrived and self._fleet.clock() >= end:
                return None

    def close(self) -> None:
        self._queue.clear()
        self._arrived.clear()
        self._unfinished = 0
        for seat in self._seats:
            self._fleet.kill(seat.handle)
        self._seats = Seats()
        self._there.clear()
        self._alone.clear()

    def _wait(self, end: float) -> None:
        """Until an answer is there or something is to be done, at the latest until ``end``. All answers that are there
        by then are to be taken before the next wait: for a fleet it is a look at every worker."""
        seats = self._seats
        soonest = min(end, self._next_look, self._next_straggler(), seats.deadlines.least)
        answers = self._fleet.wait(seats.awaited.keys(), max(0.0, soonest - self._fleet.clock()))
        for seat in sorted(map(seats.arrived, answers)):
            self._unwatch(seat)
            self._there.append(seat)

    def _hand_out(self) -> None:
        """Queued units go to idle workers; what then is idle does once more what is late elsewhere."""
        if self._queue and self._settings.workers == "auto":
            self._fill()
        idle = self._seats.idle
        while self._queue and (free := idle.first):
            self._give(self._queue.popleft(), free)
        now = self._fleet.clock()
        while (free := idle.first) and (late := self._longest_late(now)):
            assert late.issue is not None
            text = f"{describe(late.issue.unit)} has been with {late} for {now - late.since:.0f} s"
            self._on_event(f"{text}, far longer than its kind takes; it is issued a second time")
            self.duplicated += 1
            self._unwatch(late)
            self._give(late.issue, free)

    def _give(self, issue: Issue, seat: Seat) -> None:
        issue.attempts += 1
        issue.seats.append(seat)
        now = self._fleet.clock()
        answer = self._fleet.run(seat.handle, issue.unit, issue.broadcast, issue.carried, issue.halvings)
        self._seats.busy(seat, issue, answer, now, now + self._settings.unit_timeout)
        self._watch(issue)

    def _watch(self, issue: Issue) -> None:
        """Issue a unit a second time once it is late, if a worker is alone at work on it and it may be tried again."""
        if len(issue.seats) == 1 and not issue.given and issue.attempts < self._settings.max_attempts:
            (seat,) = issue.seats
            if not seat.there:
                self._alone[issue.unit.kind].put(seat, seat.since)

    def _unwatch(self, seat: Seat) -> None:
        if seat.issue is not None:
            self._alone[seat.issue.unit.kind].discard(seat)

    def _longest_late(self, now: float) -> Seat | None:
        """The worker whose unit is late, and of those the one that has been at it for longest."""
        firsts = [self._alone[kind].first for kind in self._limits if self._late_from(kind) <= now]
        return min((seat for seat in firsts if seat), key=lambda seat: (seat.since, seat), default=None)

    def _late_from(self, kind: str) -> float:
        """When the next unit of a kind is late."""
        return self._alone[kind].least + self._limits[kind]

    def _next_straggler(self) -> float:
        """When there is next something to do for an idle worker."""
        if self._seats.idle.first is None:
            return float("inf")
        return min(map(self._late_from, self._limits), default=float("inf"))

    def _take(self, seat: Seat) -> None:
        """What a worker has answered, be it that it is dead."""
        seat.there = False
        if seat.issue is not None and seat.ready is not None:
            fault_point("driver_before_take", seat.issue.unit, seat.ready.pid)
        try:
            result = self._fleet.take(seat.answer)
        except WorkerRaised as error:
            self._raised(seat, error)
        except WorkerDied as error:
            if seat.ready is None:
                self._failed_to_start(seat, error)
            else:
                if error.for_memory and seat.issue is not None:
                    seat.issue.halvings += 1
                self._lose(seat, f"{seat} {'was killed as its node ran out of memory' if error.for_memory else 'died'}")
        else:
            now = self._fleet.clock()
            issue, began = seat.issue, seat.since
            self._seats.free(seat, now)
            if isinstance(result, Ready):
                self._seats.started(seat, result)
                self._failed_starts.pop(seat.number, None)
                if seat.lost is not None:
                    self.recoveries.append(now - seat.lost)
                    self._on_event(f"{seat} is ready, {now - seat.lost:.1f} s after a worker was lost")
                return
            assert issue is not None
            issue.seats.remove(seat)
            if not issue.given:
                issue.given = True
                self._note(issue.unit.kind, now - began)
                self._arrived.append(result)
                self._unfinished -= 1

    def _note(self, kind: str, seconds: float) -> None:
        """How long a unit took."""
        durations = self._durations[kind]
        durations.append(seconds)
        if len(durations) >= STRAGGLER_AFTER:
            self._limits[kind] = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(durations))

    def _raised(self, seat: Seat, error: WorkerRaised) -> None:
        """A worker that raised is replaced too: its process may be what is broken."""
        issue = seat.issue
        if isinstance(error.cause, PalfError):
            raise error.cause
        assert issue is not None, error
        issue.raised += 1
        if issue.raised >= RAISING_ATTEMPTS and not issue.given:
            raise UnitBug(f"{describe(issue.unit)} failed on {issue.raised} workers: {error}") from error
        self._lose(seat, f"{seat} raised {error}")

    def _failed_to_start(self, seat: Seat, error: WorkerDied) -> None:
        failed = self._failed_starts[seat.number] = self._failed_starts.get(seat.number, 0) + 1
        if failed < self._settings.max_attempts:
            self._lose(seat, f"{seat} died while starting ({error.cause})")
        elif self._seats.staying:  # something is wrong with the place that it goes to
            self._given_up += 1
            del self._failed_starts[seat.number]  # the number may be used again
            self._remove(seat)
            self._on_event(
                f"{seat} died while starting {failed} times in a row ({error.cause}); the run goes on without it"
            )
        else:
            raise ClusterError(
                f"distributed.workers: {failed} workers in a row died while starting; the last one said: {error}"
            ) from error

    def _expire(self) -> None:
        now = self._fleet.clock()
        patience = PATIENCE_OF_AUTO if self._settings.workers == "auto" else PATIENCE
        if self.alive or not self._unfinished:
            self._last_ready = now
        elif now - self._last_ready > patience:
            raise ClusterError(
                f"distributed.workers: no worker has become ready within {patience:g} s; each asks for "
                f"{self._fleet.each}; is the cluster too small for that, or busy with other work?"
            )
        for seat in self._seats.overdue(now):
            if seat.ready is None:
                self._lose(seat, f"{seat} did not start within {STARTING_SECONDS:g} s")
            else:
                self._lose(seat, f"{seat} stalled (distributed.unit_timeout = {self._settings.unit_timeout:g} s)")

    def _lose(self, seat: Seat, what: str) -> None:
        """Kill what is left of a worker, start another one in its place, and put its unit back."""
        self._remove(seat)
        issue = seat.issue
        again = issue is not None and not issue.given and not issue.seats
        if issue is not None and again and issue.attempts >= self._settings.max_attempts:
            raise UnitError(
                f"{describe(issue.unit)} was issued {issue.attempts} times (distributed.max_attempts) without an "
                f"answer; at last {what}"
            )
        self._fill(lost=self._fleet.clock())
        if issue is None or not again:
            self._on_event(f"{what}; it is replaced")
            return
        attempt = f"{issue.attempts + 1} of {self._settings.max_attempts}"
        self._on_event(f"{what}; it is replaced, and {describe(issue.unit)} is issued again ({attempt})")
        self.reissued += 1
        self._queue.appendleft(issue)

    def _remove(self, seat: Seat) -> None:
        self._fleet.kill(seat.handle)
        self._seats.remove(seat)
        self._unwatch(seat)
        if seat.there:
            self._there.remove(seat)
        if seat.issue is not None:
            seat.issue.seats.remove(seat)
            self._watch(seat.issue)

    def _look(self) -> None:
        """Follow the cluster: leave the nodes that are leaving, and have as many workers as are worth it."""
        now = self._fleet.clock()
        self._next_look = now + LOOK_SECONDS
        nodes = self._fleet.nodes()
        for seat in list(self._seats):
            if seat.ready is not None and seat.ready.node not in nodes and not seat.leaving:
                self._seats.leave(seat)
                self._on_event(f"the node of {seat} is leaving or gone; it is replaced")
            if seat.leaving and seat.issue is None:
                self._remove(seat)
        if self._settings.workers == "auto":
            room = self._fleet.room()
            if room != self._room:
                before = "" if self._room is None else f" ({self._room} before)"
                asked = "" if room else f"; each worker asks for {self._fleet.each}"
                self._on_event(f"distributed.workers auto: the cluster has room for {room}{before}{asked}")
                self._room, self._given_up = room, 0
            self._retire()
        self._fill()

    def _worth(self) -> int:
        """``workers: auto``: the workers that could have something to do."""
        return max(self._unfinished, self._steady)

    def _most(self) -> int:
        """``workers: auto``: the workers there may be. Those that wait for room are what an autoscaler goes by."""
        assert self._room is not None
        return self._room + (max(1, self._room) if self._fleet.grows else 0)

    def _fill(self, lost: float | None = None) -> None:
        """Start workers until there are as many as there should be. ``lost``: when one was lost."""
        workers = self._settings.workers
        if workers == "auto":
            wanted = min(self._worth(), self._most(), max(1, self._most() - self._given_up))
        else:
            wanted = workers - self._given_up
        now = self._fleet.clock()
        for _ in range(wanted - self._seats.lasting):
            number = self._seats.free_number()
            handle, answer = self._fleet.start(number)
            self._seats.add(number, handle, answer, now, now + STARTING_SECONDS, lost)

    def _retire(self) -> None:
        """Let go of workers that found no room, as it has shrunk, and of those that long had nothing to do."""
        now = self._fleet.clock()
        staying = [seat for seat in self._seats if not seat.leaving]
        surplus, spare = len(staying) - self._most(), len(staying) - self._worth()
        for seat in reversed(staying):
            homeless = surplus > 0 and seat.ready is None
            if homeless or (spare > 0 and seat.issue is None and now - seat.since > IDLE_SECONDS):
                self._remove(seat)
                surplus, spare = surplus - 1, spare - 1
