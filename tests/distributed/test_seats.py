"""What a dispatcher knows of its workers without looking at all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.fleet import Latencies, SimulatedFleet
from palf_dist.config import DistributedConfig
from palf_dist.distributed import dispatcher
from palf_dist.distributed.dispatcher import Dispatcher
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.seats import Seat, SeatQueue
from palf_dist.types import Contribution, Unit

BROADCAST = Broadcast(np.zeros(1, np.float32), 0)
TROUBLED = Latencies(straggling=0.05, dying=0.02)


class VirtualFleet(SimulatedFleet):
    """Its clock stands still while the driver computes."""

    def clock(self) -> float:
        return self.skipped


def looks_per_contribution(monkeypatch: pytest.MonkeyPatch, workers: int, at_once: int, spare: int) -> float:
    """How often a dispatcher reads something of a worker, for each contribution. ``at_once``: units are submitted as
    soon as so many contributions have come; ``spare``: workers that are left without one."""
    looks = 0

    def counted(self: Seat, name: str) -> Any:
        nonlocal looks
        looks += 1
        return object.__getattribute__(self, name)

    generator = np.random.default_rng(0)
    fleet = VirtualFleet(lambda unit, broadcast: Contribution(unit, 0), TROUBLED, generator, workers)
    events: list[str] = []
    pool = Dispatcher(fleet, DistributedConfig(workers=workers, max_attempts=20), events.append)
    submitted = given = 0
    with monkeypatch.context() as patch:
        patch.setattr(dispatcher, "LOOK_SECONDS", float("inf"))  # it takes place by time, however many come
        patch.setattr(Seat, "__getattribute__", counted)
        while given < 6 * workers:
            if pool.pending <= workers - spare - at_once:
                for _ in range(workers - spare - pool.pending):
                    pool.submit(Unit("meta_gradient", 0, submitted), BROADCAST)
                    submitted += 1
            given += pool.next_completed(0.2) is not None
            assert 0 <= pool.alive <= workers
    assert pool.reissued > 0 and (pool.duplicated > 0 or not spare)
    return looks / given


@pytest.mark.parametrize("synchronous", [False, True])
def test_a_contribution_costs_the_same_with_ten_times_as_many_workers(
    synchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (
        looks_per_contribution(monkeypatch, workers, workers if synchronous else 1, 0 if synchronous else 5)
        for workers in (30, 300)
    )
    assert many < 1.25 * few


def seat(order: int) -> Seat:
    return Seat(order, order, None, None, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["put", "discard"]), st.integers(0, 9), st.integers(0, 5)), max_size=300))
def test_a_queue_gives_the_least_key_and_of_equal_ones_the_older_seat(steps: list[tuple[str, int, int]]) -> None:
    seats, queue, inside = [seat(order) for order in range(10)], SeatQueue(), dict[int, int]()
    for what, order, key in steps:
        if what == "put":
            queue.put(seats[order], key)
            inside[order] = key
        else:
            queue.discard(seats[order])
            inside.pop(order, None)
        least = min(((key, order) for order, key in inside.items()), default=None)
        assert (queue.first, queue.least) == ((seats[least[1]], least[0]) if least else (None, float("inf")))


def test_a_queue_forgets_what_was_taken_out_behind_one_that_stays() -> None:
    queue, lasting = SeatQueue(), seat(0)
    queue.put(lasting, 0.0)
    for order in range(1, 1000):
        one = seat(order)
        queue.put(one, order)
        queue.discard(one)
    assert queue.first is lasting and len(queue._heap) < 100
