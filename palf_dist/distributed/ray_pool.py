"""A pool of Ray actors that outlives the death and the stalling of any of them.

Every unit in flight belongs to exactly one worker. A worker that dies, stalls or cannot be reached is killed, replaced,
and its unit goes back to the front of the queue; what it might still have answered is never asked for.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.pool import Broadcast, OnEvent, RunnerFactory, UnitBug, UnitError, describe
from palf_dist.distributed.worker import Worker
from palf_dist.errors import ClusterError, PalfError
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution, Unit

STARTING_SECONDS = 300.0
"""How long the pool may be without a single worker that is ready."""

RAISING_ATTEMPTS = 2
"""Times a unit that raises an exception is tried: were the fault the worker's own, another one would not have it."""


@dataclass
class _Issue:
    """A unit on its way through the pool."""

    unit: Unit
    broadcast: Broadcast
    carried: dict[str, np.ndarray] | None
    attempts: int = 0
    raised: int = 0


@dataclass
class _Seat:
    """One of the pool's workers; its actor may change."""

    number: int
    actor: Any
    answer: Any  # reference to the answer of ``pid`` while it starts, of ``run`` while it works, else None
    issue: _Issue | None = None
    pid: int | None = None  # None until it is ready
    deadline: float = float("inf")


class RayPool:
    """``config.distributed.workers`` actors on the Ray that this process is connected to. Implements WorkerPool."""

    def __init__(
        self,
        config: RunConfig,
        datasets: Mapping[str, EncodedDataset],
        make_runner: RunnerFactory,
        share: Share,
        on_event: OnEvent,
    ) -> None:
        """``share``: what each worker takes of the cluster, from ``cluster.connect``."""
        self.reissued = 0
        self._settings = config.distributed
        self._on_event = on_event
        self._actor_class = ray.remote(Worker).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0, max_task_retries=0
        )
        arrays = ray.put({name: dataset.to_arrays() for name, dataset in datasets.items()})
        self._arguments = (config.model_dump_json(), arrays, make_runner, os.environ.get(faults.VARIABLE))
        self._broadcasts: weakref.WeakKeyDictionary[Broadcast, ray.ObjectRef] = weakref.WeakKeyDictionary()
        self._queue: deque[_Issue] = deque()
        self._failed_starts = 0
        self._last_ready = time.monotonic()
        self._seats = [self._seat(number) for number in range(self._settings.workers)]

    @property
    def alive(self) -> int:
        return sum(seat.pid is not None for seat in self._seats)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are ready."""
        return [seat.pid for seat in self._seats if seat.pid is not None]

    @property
    def pending(self) -> int:
        return len(self._queue) + sum(seat.issue is not None for seat in self._seats)

    def submit(self, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None = None) -> None:
        if broadcast not in self._broadcasts:
            self._broadcasts[broadcast] = ray.put(broadcast)
        self._queue.append(_Issue(unit, broadcast, carried))

    def next_completed(self, timeout: float) -> Contribution | None:
        end = time.monotonic() + timeout
        while True:
            self._hand_out()
            waiting = {seat.answer: seat for seat in self._seats if seat.answer is not None}
            if not waiting:
                return None
            soonest = min(end, *(seat.deadline for seat in waiting.values()))
            # always with a timeout: a host that was cut off answers to nothing
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, soonest - time.monotonic()))
            for answer in ready:
                contribution = self._take(waiting[answer])
                if contribution is not None:
                    return contribution
            self._expire()
            if time.monotonic() >= end:
                return None

    def close(self) -> None:
        self._queue.clear()
        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats = []

    def _seat(self, number: int) -> _Seat:
        actor: Any = self._actor_class.remote(*self._arguments)
        return _Seat(number, actor, actor.pid.remote())

    def _hand_out(self) -> None:
        for seat in self._seats:
            if not self._queue:
                return
            if seat.pid is None or seat.issue is not None:
                continue
            issue = self._queue.popleft()
            issue.attempts += 1
            seat.issue = issue
            seat.answer = seat.actor.run.remote(issue.unit, self._broadcasts[issue.broadcast], issue.carried)
            seat.deadline = time.monotonic() + self._settings.unit_timeout

    def _take(self, seat: _Seat) -> Contribution | None:
        """What a worker has answered; None where it was no contribution."""
        issue, answer = seat.issue, seat.answer
        try:
            result = ray.get(answer, timeout=self._settings.unit_timeout)
        except RayTaskError as error:
            self._raised(seat, error)
        except RayError as error:
            if issue is None:
                self._failed_to_start(seat, error)
            else:
                self._replace(seat, f"worker {seat.number} (pid {seat.pid}) died")
        else:
            seat.issue, seat.answer, seat.deadline = None, None, float("inf")
            if issue is not None:
                return result
            seat.pid = result
            self._failed_starts = 0
        return None

    def _raised(self, seat: _Seat, error: RayTaskError) -> None:
        """A worker that raised is replaced too: its process may be what is broken."""
        issue, cause = seat.issue, error.cause
        if isinstance(cause, PalfError):
            raise cause
        message = f"{type(cause).__name__}: {cause}"
        assert issue is not None, message
        issue.raised += 1
        if issue.raised >= RAISING_ATTEMPTS:
            raise UnitBug(f"{describe(issue.unit)} failed on {issue.raised} workers: {message}") from error
        self._replace(seat, f"worker {seat.number} (pid {seat.pid}) raised {message}")

    def _failed_to_start(self, seat: _Seat, error: RayError) -> None:
        self._failed_starts += 1
        if self._failed_starts >= self._settings.max_attempts:
            raise ClusterError(
                f"distributed.workers: {self._failed_starts} workers in a row died while starting; the last one said: "
                f"{error}"
            ) from error
        self._replace(seat, f"worker {seat.number} died while starting")

    def _expire(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.deadline <= now:
                limit = f"distributed.unit_timeout = {self._settings.unit_timeout:g} s"
                self._replace(seat, f"worker {seat.number} (pid {seat.pid}) stalled ({limit})")
        if self.alive:
            self._last_ready = now
        elif now - self._last_ready > STARTING_SECONDS:
            raise ClusterError(
                f"distributed.workers: no worker has become ready within {STARTING_SECONDS:g} s; "
                "is the cluster busy with other work?"
            )

    def _replace(self, seat: _Seat, what: str) -> None:
        """Kill what is left of a worker, start another one in its place, and put its unit back."""
        issue = seat.issue
        ray.kill(seat.actor)
        if issue is not None and issue.attempts >= self._settings.max_attempts:
            raise UnitError(
                f"{describe(issue.unit)} was issued {issue.attempts} times (distributed.max_attempts) without an "
                f"answer; at last {what}"
            )
        self._seats[self._seats.index(seat)] = self._seat(seat.number)
        if issue is None:
            self._on_event(f"{what}; it is replaced")
            return
        attempt = f"{issue.attempts + 1} of {self._settings.max_attempts}"
        self._on_event(f"{what}; it is replaced, and {describe(issue.unit)} is issued again ({attempt})")
        self.reissued += 1
        self._queue.appendleft(issue)
