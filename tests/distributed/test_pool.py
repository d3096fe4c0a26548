from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from palf_dist import faults
from palf_dist.distributed import dispatcher
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.dispatcher import Dispatcher
from palf_dist.distributed.pool import Broadcast, InProcessPool, UnitBug, UnitError, WorkerPool, describe
from palf_dist.distributed.ray_fleet import RayFleet
from palf_dist.errors import ClusterError, DataError
from palf_dist.tasks.datasets import load_all
from palf_dist.types import Contribution, Unit
from tests.distributed.small import BrokenRunner, ToyRunner, fault, small_config

UNITS = [Unit("meta_gradient", 3, group) for group in range(7)]
BROADCAST = Broadcast(np.linspace(-1, 1, 5, dtype=np.float32), 3, {"scale": 0.5})
CARRIED = {"state": np.arange(3.0)}

MakePool = Callable[..., Dispatcher]


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def make_pool(share: Share, events: list[str]) -> Iterator[MakePool]:
    """A pool of real workers with the given distributed settings, closed at the end."""
    pools: list[Dispatcher] = []

    def make(runner: type[ToyRunner] = ToyRunner, **distributed: object) -> Dispatcher:
        config = small_config(distributed=distributed)
        fleet = RayFleet(config, load_all(config.data), runner, share)
        pools.append(Dispatcher(fleet, config.distributed, events.append))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def drain(pool: WorkerPool, units: list[Unit], limit: float = 120.0) -> list[Contribution]:
    """Everything the pool gives for ``units``, in key order; waits a little longer for what should not come."""
    for unit in units:
        pool.submit(unit, BROADCAST, CARRIED)
    return collect(pool, len(units), limit)


def collect(pool: WorkerPool, count: int, limit: float = 120.0) -> list[Contribution]:
    given: list[Contribution] = []
    end = time.monotonic() + limit
    while len(given) < count:
        assert time.monotonic() < end, f"{len(given)} of {count} contributions within {limit} s"
        contribution = pool.next_completed(1.0)
        if contribution is not None:
            given.append(contribution)
    assert pool.pending == 0 and pool.next_completed(0.3) is None, "a unit was delivered twice"
    return sorted(given, key=lambda item: item.unit)


def contents(contributions: list[Contribution]) -> list[tuple[Unit, int, bytes, bytes]]:
    for item in contributions:
        assert item.gradient is not None and item.carried is not None
    return [
        (c.unit, c.policy_version, c.gradient.tobytes(), c.carried["state"].tobytes())  # type: ignore[union-attr, index]
        for c in contributions
    ]


def in_process(units: list[Unit] = UNITS) -> list[tuple[Unit, int, bytes, bytes]]:
    config = small_config()
    pool = InProcessPool(config, load_all(config.data), ToyRunner)
    try:
        return contents(drain(pool, units))
    finally:
        pool.close()


def test_in_process_pool_delivers_in_order_with_its_own_threads() -> None:
    config = small_config(distributed={"threads": 2})
    before = torch.get_num_threads()
    pool = InProcessPool(config, load_all(config.data), ToyRunner)
    given = drain(pool, UNITS)
    assert [item.unit for item in given] == UNITS
    assert {item.metrics["threads"] for item in given} == {2.0}
    np.testing.assert_array_equal(given[0].carried["state"], [1, 2, 3])  # type: ignore[index]
    pool.close()
    assert torch.get_num_threads() == before


def test_in_process_pool_names_the_unit_that_fails() -> None:
    config = small_config()
    pool = InProcessPool(config, load_all(config.data), ToyRunner)
    with pytest.raises(UnitBug, match=r"unit tune 0/4 \(raise ValueError\) failed: ValueError: the toy broke"):
        drain(pool, [Unit("tune", 0, 4, '{"raise":"ValueError"}')])
    with pytest.raises(DataError, match=r"data\.train"):
        drain(pool, [Unit("tune", 0, 4, '{"raise":"DataError"}')])


def test_describe_says_all_that_is_needed_to_run_a_unit_again() -> None:
    assert describe(Unit("select", 3, 1)) == "unit select 3/1"
    assert describe(Unit("tune", 0, 2, '{"group":1,"optimiser":"adam"}')) == "unit tune 0/2 (group 1, optimiser adam)"


@pytest.mark.slow
def test_contributions_are_those_of_no_workers(make_pool: MakePool, events: list[str]) -> None:
    pool = make_pool(workers=3)
    assert contents(drain(pool, UNITS)) == in_process()
    assert pool.reissued == 0 and events == [] and pool.alive >= 1


@pytest.mark.slow
def test_a_worker_killed_in_mid_unit_is_replaced(
    make_pool: MakePool, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "in-unit"
    monkeypatch.setenv(faults.VARIABLE, fault("in_unit", ("meta_gradient", 3, 2), "hang", mark))
    pool = make_pool(workers=1)
    for unit in UNITS:
        pool.submit(unit, BROADCAST, CARRIED)
    given: list[Contribution] = []
    while not mark.exists():
        contribution = pool.next_completed(0.5)
        given += [contribution] if contribution is not None else []
    (victim,) = pool.pids
    os.kill(victim, signal.SIGKILL)
    given += collect(pool, len(UNITS) - len(given))
    assert contents(sorted(given, key=lambda item: item.unit)) == in_process()
    assert pool.reissued == 1 and pool.alive == 1 and pool.pids != [victim]
    assert len(pool.recoveries) == 1 and pool.recoveries[0] > 0
    lost, ready = events
    assert lost == f"worker 0 (pid {victim}) died; it is replaced, and unit meta_gradient 3/2 is issued again (2 of 5)"
    assert ready.startswith(f"worker 0 (pid {pool.pids[0]}) is ready, ")


@pytest.mark.slow
def test_a_stalled_worker_is_timed_out_and_killed(
    make_pool: MakePool, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "in-unit"
    monkeypatch.setenv(faults.VARIABLE, fault("in_unit", ("meta_gradient", 3, 0), "hang", mark))
    pool = make_pool(workers=2, unit_timeout=4)
    given = drain(pool, UNITS)
    assert contents(given) == in_process()
    assert pool.reissued == 1
    event = events[0]
    assert "stalled (distributed.unit_timeout = 4 s)" in event and "unit meta_gradient 3/0 is issued again" in event
    stalled = int(event.split("pid ")[1].split(")")[0])
    assert stalled not in pool.pids
    psutil.wait_procs([psutil.Process(stalled)] if psutil.pid_exists(stalled) else [], timeout=15)
    assert not psutil.pid_exists(stalled)


@pytest.mark.slow
def test_the_unit_of_a_stopped_worker_is_done_by_another_one(
    make_pool: MakePool, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, as a machine that swaps or a process that a debugger holds; what it says in the end is dropped."""
    monkeypatch.setattr(dispatcher, "STRAGGLER_SECONDS", 3.0)
    units = [*UNITS[:6], Unit("meta_gradient", 3, 6, '{"seconds":1.0}')]
    pool = make_pool(workers=2)
    given = drain(pool, units[:6])
    pool.submit(units[6], BROADCAST, CARRIED)
    assert pool.next_completed(0.1) is None
    (late,) = [seat for seat in pool._seats if seat.issue is not None]
    assert late.ready is not None
    stopped = late.ready.pid
    os.kill(stopped, signal.SIGSTOP)
    given += collect(pool, 1)
    assert contents(given) == in_process(units)
    assert pool.duplicated == 1 and pool.reissued == 0 and len(events) == 1
    assert f"unit meta_gradient 3/6 (seconds 1.0) has been with {late} for" in events[0]
    os.kill(stopped, signal.SIGCONT)
    while any(seat.issue is not None for seat in pool._seats):
        assert pool.next_completed(1.0) is None, "a unit was given twice"
    assert contents(drain(pool, UNITS)) == in_process() and stopped in pool.pids


@pytest.mark.slow
def test_a_unit_that_kills_every_worker_ends_the_run(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, fault("before_unit", ("meta_gradient", 3, 1), "kill"))
    pool = make_pool(workers=1, max_attempts=2)
    with pytest.raises(UnitError, match=r"unit meta_gradient 3/1 was issued 2 times .*max_attempts.* died"):
        drain(pool, UNITS)


@pytest.mark.slow
def test_a_unit_that_raises_is_tried_once_elsewhere(
    make_pool: MakePool, events: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, fault("in_unit", ("meta_gradient", 3, 1), "raise", tmp_path / "raised"))
    pool = make_pool(workers=2)
    assert contents(drain(pool, UNITS)) == in_process()
    assert pool.reissued == 1 and "raised RuntimeError: raised on purpose" in events[0]
    with pytest.raises(UnitBug, match=r"unit tune 0/4 .* failed on 2 workers: ValueError: the toy broke"):
        drain(pool, [Unit("tune", 0, 4, '{"raise":"ValueError"}')])


@pytest.mark.slow
def test_a_mistake_of_the_user_is_told_at_once(make_pool: MakePool, events: list[str]) -> None:
    pool = make_pool(workers=1)
    with pytest.raises(DataError, match=r"data\.train: the toy does not like it"):
        drain(pool, [Unit("tune", 0, 4, '{"raise":"DataError"}')])
    assert pool.reissued == 0 and events == []


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_run(make_pool: MakePool) -> None:
    pool = make_pool(BrokenRunner, workers=1, max_attempts=2)
    with pytest.raises(ClusterError, match=r"(?s)distributed\.workers: 2 workers in a row died .*no such device"):
        drain(pool, UNITS)


@pytest.mark.slow
def test_a_broadcast_goes_to_the_object_store_once(make_pool: MakePool) -> None:
    pool = make_pool(workers=1)
    drain(pool, UNITS)
    assert isinstance(pool._fleet, RayFleet)
    kept = pool._fleet._broadcasts
    assert len(kept) == 1
    other = Broadcast(BROADCAST.policy + 1, 4)
    pool.submit(UNITS[0], other)
    (contribution,) = collect(pool, 1)
    assert contribution.policy_version == 4 and len(kept) == 2
    del other
    assert len(kept) == 1, "the policy of a version that is done with is kept"
