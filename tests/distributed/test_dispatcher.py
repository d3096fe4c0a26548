from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.config import DistributedConfig
from palf_dist.distributed.dispatcher import IDLE_SECONDS, PATIENCE, PATIENCE_OF_AUTO, STARTING_SECONDS, Dispatcher
from palf_dist.distributed.pool import Broadcast, UnitBug, UnitError
from palf_dist.distributed.session import most_in_flight
from palf_dist.errors import ClusterError, ConfigError
from palf_dist.types import Unit
from tests.distributed.simulated import Fate, NodeEvent, SimulatedFleet

BROADCAST = Broadcast(np.zeros(1, np.float32), 0)
TIMEOUT = 300.0
WHOLE = {"head": 4}


class Run:
    """A dispatcher on a simulated fleet, and what it says and gives."""

    def __init__(self, fleet: SimulatedFleet, steady: int = 0, **settings: Any) -> None:
        self.fleet, self.events = fleet, list[str]()
        config = DistributedConfig.model_validate({"workers": 2, "unit_timeout": TIMEOUT, **settings})
        self.pool = Dispatcher(fleet, config, self.events.append, steady)
        self.given: list[Unit] = []
        self.halvings: list[int] = []

    def submit(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self.pool.submit(unit, BROADCAST)

    def step(self, timeout: float = 5.0) -> None:
        contribution = self.pool.next_completed(timeout)
        if contribution is not None:
            self.given.append(contribution.unit)
            self.halvings.append(contribution.halvings)

    def finish(self, limit: float = 1e5) -> Run:
        end = self.fleet.now + limit
        while self.pool.pending:
            assert self.fleet.now < end, f"{self.pool.pending} units hang: {self.events}"
            self.step()
        return self

    def go_on(self, seconds: float) -> None:
        """Nothing is asked for, and nothing may come."""
        end, before = self.fleet.now + seconds, len(self.given)
        while self.fleet.now < end:
            moment = self.fleet.now
            self.step(seconds)
            if self.fleet.now == moment:  # all workers are idle
                self.fleet.now += 10.0
        assert len(self.given) == before, "a unit was given twice"


def units(count: int, outer_step: int = 0, kind: str = "meta_gradient") -> list[Unit]:
    return [Unit(kind, outer_step, group) for group in range(count)]


fates = st.builds(Fate, st.floats(0.01, 400.0), st.sampled_from(["done", "done", "done", "dies", "stalls", "raises"]))
start_fates = st.builds(Fate, st.floats(0.01, 30.0), st.sampled_from(["done", "done", "dies"]))
node_events = st.builds(
    NodeEvent,
    st.floats(0.0, 500.0),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["joins", "leaves", "dies"]),
    st.integers(1, 3),
)


@settings(max_examples=60)
@given(
    st.sampled_from([1, 2, 3, 7, "auto"]),
    st.lists(fates, max_size=40),
    st.lists(start_fates, max_size=15).map(lambda starts: [Fate(0, "stalls"), *starts, Fate(0, "stalls")]),
    st.lists(node_events, max_size=6),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.booleans(),
)
def test_every_unit_is_given_exactly_once_whatever_happens(
    workers: int | str,
    units_fates: list[Fate],
    starts: list[Fate],
    events: list[NodeEvent],
    steps: list[int],
    grows: bool,
) -> None:
    """Steps of units as in synchronous mode. The nodes a, b and c may come and go; the head stays. That an exception is
    tried once more only is another test's matter."""
    bad = sum(fate.end != "done" or fate.seconds > TIMEOUT for fate in [*units_fates, *starts]) + 4 * len(events)
    harmless = [Fate(fate.seconds, "dies" if fate.end == "raises" else fate.end) for fate in units_fates]
    fleet = SimulatedFleet({"head": 2, "a": 2}, starts, harmless, events, grows)
    run = Run(fleet, workers=workers, max_attempts=100)
    for number, size in enumerate(steps):
        run.submit(units(size, number))
        run.finish()
    wanted = [unit for number, size in enumerate(steps) for unit in units(size, number)]
    assert sorted(run.given) == wanted
    assert fleet.runs == len(wanted) + run.pool.reissued + run.pool.duplicated
    longest = max([10.0, *(fate.seconds for fate in units_fates)])
    assert fleet.now <= (bad + len(steps)) * (TIMEOUT + STARTING_SECONDS) + len(wanted) * longest
    run.go_on(2 * TIMEOUT)
    assert run.pool.pending == 0 and 0 <= run.pool.alive <= len(fleet.living)
    run.pool.close()
    assert not fleet.living


@settings(max_examples=40)
@given(st.lists(fates.filter(lambda fate: fate.end != "raises"), max_size=40), st.integers(1, 4))
def test_asynchronous_runs_get_every_unit_once(units_fates: list[Fate], workers: int) -> None:
    """As many units in flight as the pool has capacity for, until 30 are done."""
    run = Run(SimulatedFleet(WHOLE, units=units_fates), workers=workers, max_attempts=100, mode="async")
    work = units(30)
    issued = 0
    while len(run.given) < len(work):
        while run.pool.pending < run.pool.capacity and issued < len(work):
            run.submit([work[issued]])
            issued += 1
        run.step()
    assert sorted(run.given) == work
    run.go_on(2 * TIMEOUT)


def test_a_late_unit_is_issued_a_second_time_and_the_first_answer_is_given() -> None:
    run = Run(SimulatedFleet(WHOLE, units=[*[Fate(10.0)] * 6, Fate(200.0), Fate(10.0)]))
    run.submit(units(8))
    run.finish()
    assert sorted(run.given) == units(8)
    assert run.fleet.now == pytest.approx(1 + 3 * 10 + 3 * 10 + 10)  # late after three times the median
    assert run.pool.duplicated == 1 and run.pool.reissued == 0
    (event,) = run.events
    assert "unit meta_gradient 0/6 has been with worker 0" in event and "is issued a second time" in event
    run.go_on(250.0)  # the first answer comes now, and its worker goes on
    assert run.fleet.runs == 9 and len(run.fleet.workers) == 2
    run.submit(units(2, outer_step=1))
    run.finish()
    assert run.fleet.now < 350.0 and len(run.events) == 1


def test_a_straggler_that_never_answers_is_killed_at_its_deadline() -> None:
    run = Run(SimulatedFleet(WHOLE, units=[*[Fate(10.0)] * 6, Fate(0, "stalls"), Fate(10.0)]))
    run.submit(units(8))
    run.finish()
    assert run.fleet.now < 100.0 and run.pool.alive == 2
    run.go_on(400.0)
    assert run.events[1:] == [
        "worker 0 (pid 1001) stalled (distributed.unit_timeout = 300 s); it is replaced",
        "worker 0 (pid 1003) is ready, 1.0 s after a worker was lost",
    ]
    assert run.fleet.workers[0].killed and run.pool.alive == 2 and run.fleet.runs == 9
    assert run.pool.recoveries == [1.0]


def test_both_copies_of_a_unit_may_be_lost() -> None:
    fates = [*[Fate(10.0)] * 6, Fate(60.0, "dies"), Fate(10.0), Fate(29.5, "dies")]
    run = Run(SimulatedFleet(WHOLE, units=fates))
    run.submit(units(8))
    run.finish()
    assert sorted(run.given) == units(8)
    assert run.pool.duplicated == 1 and run.pool.reissued == 1
    assert [event.split("; ")[1] for event in run.events[1:] if "; " in event] == [
        "it is replaced",
        "it is replaced, and unit meta_gradient 0/6 is issued again (3 of 5)",
    ]


def test_short_units_and_units_of_unknown_kinds_are_never_late() -> None:
    few = [*[Fate(10.0)] * 4, Fate(250.0)]
    short = [*[Fate(0.1)] * 9, Fate(4.0)]
    for fates in (few, short):
        run = Run(SimulatedFleet(WHOLE, units=fates))
        run.submit(units(len(fates)))
        run.finish()
        assert run.pool.duplicated == 0 and run.events == []


def test_an_exception_is_tried_once_elsewhere() -> None:
    run = Run(SimulatedFleet(WHOLE, units=[Fate(1.0, "raises")]))
    run.submit(units(1))
    assert run.finish().pool.reissued == 1 and "raised ValueError: raised in the simulation" in run.events[0]
    run = Run(SimulatedFleet(WHOLE, units=[Fate(1.0, "raises")] * 2), workers=1)
    run.submit(units(1))
    with pytest.raises(UnitBug, match=r"unit meta_gradient 0/0 failed on 2 workers: ValueError: raised in the"):
        run.finish()


def test_a_unit_that_is_never_answered_ends_the_run() -> None:
    run = Run(SimulatedFleet(WHOLE, units=[Fate(0, "stalls")] * 3), workers=1, max_attempts=3)
    run.submit(units(1))
    with pytest.raises(UnitError, match=r"issued 3 times .* at last worker 0 \(pid \d+\) stalled"):
        run.finish()
    assert run.fleet.now == pytest.approx(3 * TIMEOUT, abs=60)


def test_many_workers_that_die_while_starting_do_not_end_a_run() -> None:
    """As when a node is lost on which they all were about to start."""
    run = Run(SimulatedFleet({"a": 8}, starts=[Fate(1.0, "dies")] * 8), workers=8, max_attempts=2)
    run.submit(units(8))
    run.finish()
    assert run.pool.alive == 8 and run.pool.recoveries == [1.0] * 8


def test_a_place_where_no_worker_starts_is_given_up() -> None:
    run = Run(SimulatedFleet(WHOLE, starts=[Fate(1.0), *[Fate(2.0, "dies")] * 3]), workers=2, max_attempts=3)
    run.submit(units(4))
    run.finish()
    assert run.pool.alive == 1 and len(run.fleet.workers) == 4
    assert run.events[0] == "worker 1 died while starting (killed); it is replaced"
    assert run.events[-1] == "worker 1 died while starting 3 times in a row (killed); the run goes on without it"
    run = Run(SimulatedFleet(WHOLE, starts=[Fate(2.0, "dies")] * 9), workers=2, max_attempts=3)
    run.submit(units(4))
    with pytest.raises(
        ClusterError, match="3 workers in a row died while starting; the last one said: in the simulation"
    ):
        run.finish()


def test_auto_has_a_worker_for_the_last_unit_although_another_one_was_given_up() -> None:
    starts = [Fate(1.0), *[Fate(2.0, "dies")] * 2, Fate(1.0)]
    run = Run(SimulatedFleet({"a": 2}, starts, [*[Fate(10.0)] * 4, Fate(1.0, "dies")]), workers="auto", max_attempts=2)
    run.submit(units(4))
    run.finish()
    assert run.pool.alive == 1
    run.submit(units(1, outer_step=1))
    run.finish()
    assert run.pool.reissued == 1 and run.fleet.now < 60.0


def test_a_worker_whose_node_leaves_is_none_to_go_on_with() -> None:
    """Of two, one is at work on a node that is drained when the other one fails to start for the last time."""
    events = [NodeEvent(5.0, "a", "leaves"), NodeEvent(9.0, "b", "joins", 2)]
    starts = [Fate(1.0), *[Fate(9.0, "dies")] * 9]
    run = Run(SimulatedFleet({"a": 1, "c": 1}, starts, [Fate(200.0)], events), workers=2, max_attempts=2)
    run.submit(units(2))
    with pytest.raises(ClusterError, match="2 workers in a row died while starting"):
        run.finish()


def test_a_number_that_is_used_again_has_all_its_attempts() -> None:
    starts = [Fate(1.0), *[Fate(2.0, "dies")] * 2, Fate(2.0, "dies"), Fate(1.0)]
    events = [NodeEvent(50.0, "b", "joins", 1)]
    run = Run(SimulatedFleet({"a": 2}, starts, events=events), workers="auto", max_attempts=2)
    run.submit(units(20))
    run.finish()
    assert len(run.fleet.living) == 3 and sum("goes on without it" in event for event in run.events) == 1


def test_a_unit_whose_worker_is_killed_for_memory_is_done_in_more_parts() -> None:
    fates = [Fate(1.0, "out of memory"), Fate(1.0, "out of memory"), Fate(1.0, "dies")]
    run = Run(SimulatedFleet(WHOLE, units=fates), workers=1)
    run.submit(units(1))
    assert run.finish().halvings == [2] and run.pool.reissued == 3
    assert "was killed as its node ran out of memory; it is replaced, and unit" in run.events[0]
    run.submit(units(1, outer_step=1))
    assert run.finish().halvings == [2, 0]


def test_one_answer_at_a_time_is_taken_and_none_that_is_there_comes_too_late() -> None:
    run = Run(SimulatedFleet(WHOLE, units=[Fate(10.0)] * 3), workers=3)
    run.submit(units(3))
    run.step(20.0)
    answers = [worker.asked[-1] for worker in run.fleet.workers]
    assert [answer.taken for answer in answers] == [True, False, False]
    run.fleet.now += 2 * TIMEOUT  # the driver is busy elsewhere
    assert sorted(run.finish().given) == units(3)
    assert run.pool.reissued == run.pool.duplicated == 0 and run.fleet.runs == 3


def test_a_unit_whose_answer_is_there_is_not_issued_a_second_time() -> None:
    run = Run(SimulatedFleet(WHOLE), workers=3)
    run.submit(units(6))
    run.finish()
    run.submit(units(3, outer_step=1))
    run.step(20.0)
    run.fleet.now += 100.0  # the driver is busy elsewhere
    run.finish()
    assert run.pool.duplicated == 0 and run.fleet.runs == 9


def test_what_a_worker_refuses_to_start_with_ends_the_run_with_its_words() -> None:
    """A GPU too small for the units, which nobody else can know."""
    run = Run(SimulatedFleet(WHOLE, starts=[Fate(1.0, "refuses")]))
    run.submit(units(1))
    with pytest.raises(ConfigError, match=r"^tasks\.group_size: too little memory$"):
        run.finish()


@pytest.mark.parametrize(("workers", "patience"), [(2, PATIENCE), ("auto", PATIENCE_OF_AUTO)])
def test_a_cluster_without_room_ends_the_run_in_the_end(workers: int | str, patience: float) -> None:
    run = Run(SimulatedFleet({}), workers=workers)
    run.submit(units(1))
    with pytest.raises(ClusterError, match=rf"no worker has become ready within {patience:g} s; each asks for 1 CPU"):
        run.finish()
    no_room = "distributed.workers auto: the cluster has room for 0; each worker asks for 1 CPU and 0 GPU"
    assert [event for event in run.events if "room" in event] == ([no_room] if workers == "auto" else [])
    assert run.fleet.now == pytest.approx(patience, abs=10)


def test_auto_has_as_many_workers_as_there_is_room_and_work_for() -> None:
    run = Run(SimulatedFleet({"a": 5}), workers="auto")
    assert run.fleet.workers == [] and run.pool.capacity == 1
    run.submit(units(3))
    run.finish()
    assert len(run.fleet.workers) == 3 and run.pool.capacity == 3
    run.submit(units(9, outer_step=1))
    run.finish()
    assert len(run.fleet.workers) == 5
    run.go_on(IDLE_SECONDS + 30)
    assert run.pool.alive == 0 and not run.fleet.living
    run.submit(units(1, outer_step=2))
    run.finish()
    assert len(run.fleet.living) == 1
    assert run.events == ["distributed.workers auto: the cluster has room for 5"]


def test_auto_follows_nodes_that_join_and_die() -> None:
    events = [NodeEvent(25.0, "b", "joins", 3), NodeEvent(75.0, "a", "dies")]
    run = Run(SimulatedFleet({"a": 1}, events=events), workers="auto")
    run.submit(units(40))
    while run.fleet.now < 60.0:
        run.step()
    assert run.pool.alive == 4 and run.pool.capacity == 4
    while run.fleet.now < 100.0:
        run.step()
    assert run.pool.alive == 3
    run.finish()
    assert sorted(run.given) == units(40) and run.pool.reissued == 1
    assert [event for event in run.events if "room" in event] == [
        "distributed.workers auto: the cluster has room for 1",
        "distributed.workers auto: the cluster has room for 4 (1 before)",
        "distributed.workers auto: the cluster has room for 3 (4 before)",
    ]
    assert all(worker.killed or worker.node == "b" for worker in run.fleet.workers), "one waits for room still"


def test_auto_has_an_autoscaler_add_nodes_by_workers_that_wait() -> None:
    run = Run(SimulatedFleet({"a": 2}, grows=True), workers="auto")
    run.submit(units(20))
    run.step(1.5)
    waiting = [worker for worker in run.fleet.workers if worker.node is None]
    assert len(run.fleet.living) == 2 and len(waiting) == 2
    run.submit(units(1, outer_step=1))
    run.finish()
    assert all(worker.killed or worker.node for worker in run.fleet.workers) or run.fleet.room() == 2


def test_auto_keeps_workers_for_what_asynchronous_mode_would_submit() -> None:
    run = Run(SimulatedFleet({"a": 5}), steady=3, workers="auto", mode="async")
    run.submit(units(1))
    run.finish()
    assert run.pool.capacity == 3
    run.go_on(IDLE_SECONDS + 30)
    assert run.pool.alive == 3


def test_auto_has_no_workers_whose_work_would_come_too_late() -> None:
    config = DistributedConfig(workers="auto", mode="async", max_staleness=2)
    assert most_in_flight(config) == 6
    run = Run(SimulatedFleet({"a": 64}), steady=most_in_flight(config), workers="auto", mode="async")
    run.submit(units(1))
    run.finish()
    assert len(run.fleet.workers) == 6


@pytest.mark.parametrize("workers", [2, "auto"])
def test_workers_of_a_node_that_leaves_are_replaced_elsewhere(workers: int | str) -> None:
    """The one that is at work may finish; the node is gone before the other one could."""
    events = [NodeEvent(12.0, "b", "joins", 2), NodeEvent(14.0, "a", "leaves"), NodeEvent(25.0, "a", "dies")]
    run = Run(SimulatedFleet({"a": 2}, units=[Fate(10.0), Fate(50.0)], events=events), workers=workers)
    run.submit(units(6))
    run.finish()
    assert sorted(run.given) == units(6) and run.pool.reissued == 1
    assert sum("is leaving or gone; it is replaced" in event for event in run.events) == 2
    assert {worker.node for worker in run.fleet.living} == {"b"} and run.pool.alive == 2
