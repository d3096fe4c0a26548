"""How each kind of fault is done: a context manager that begins it and ends it again, where it can end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import psutil

from tests.faults.soak.schedule import Planned
from tests.faults.soak.stage import NODE, Stage

REPLACED = "it is replaced"

Act = Callable[[Stage, Planned], AbstractContextManager[None]]
"""Breaks something on entering and mends it on leaving."""


@dataclass(frozen=True)
class Kind:
    act: Act
    evidence: str | None = None  # a driver's words once it has noticed; none: that it is resumed; "": nothing
    passes: bool = False  # lasts for a while


@contextlib.contextmanager
def _all_workers_killed(stage: Stage, planned: Planned) -> Iterator[None]:
    for worker in _some_workers(stage):
        _send(worker, signal.SIGKILL)
    yield


@contextlib.contextmanager
def _worker_stopped(stage: Stage, planned: Planned) -> Iterator[None]:
    workers = _some_workers(stage)
    worker = workers[int(planned.victim * len(workers))]
    _send(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(worker, signal.SIGCONT)


@contextlib.contextmanager
def _node_killed(stage: Stage, planned: Planned) -> Iterator[None]:
    nodes = sorted(stage.cluster.worker_nodes, key=lambda node: node.node_id)
    stage.cluster.remove_node(nodes[int(planned.victim * len(nodes))], allow_graceful=False)
    yield
    stage.cluster.add_node(**NODE)


@contextlib.contextmanager
def _driver_killed(stage: Stage, planned: Planned) -> Iterator[None]:
    stage.wait_for(lambda: stage.driver is not None and stage.driver.poll() is None)
    assert stage.driver is not None
    stage.driver.kill()
    yield


@contextlib.contextmanager
def _disk_full(stage: Stage, planned: Planned) -> Iterator[None]:
    ballast = stage.disk / f"ballast-{planned.number}"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def _mlflow_gone(stage: Stage, planned: Planned) -> Iterator[None]:
    stage.server.kill()
    yield
    stage.server.start()


def _at(point: str) -> Act:
    """Arms the fault at a named point and waits until it has happened."""

    @contextlib.contextmanager
    def act(stage: Stage, planned: Planned) -> Iterator[None]:
        mark = stage.mark(point)
        mark.unlink()
        stage.wait_for(mark.exists)
        yield

    return act


KINDS = {
    "worker killed before a unit": Kind(_at("before_unit"), REPLACED),
    "worker killed inside an unroll": Kind(_at("in_unit"), REPLACED),
    "worker killed before it delivers": Kind(_at("after_unit"), REPLACED),
    "worker killed, answer not yet taken": Kind(_at("driver_before_take"), REPLACED),
    "all workers killed at once": Kind(_all_workers_killed, REPLACED),
    "worker stopped (SIGSTOP) for a while": Kind(_worker_stopped, "", passes=True),
    "node killed, another one joins": Kind(_node_killed, REPLACED, passes=True),
    "driver killed": Kind(_driver_killed),
    "driver killed in mid-checkpoint": Kind(_at("driver_in_checkpoint")),
    "disk full for a while": Kind(_disk_full, "", passes=True),
    "MLflow server killed, back later": Kind(_mlflow_gone, "", passes=True),
}
POINTS = {
    "before_unit": "kill",
    "in_unit": "kill_soon",
    "after_unit": "kill",
    "driver_before_take": "kill",
    "driver_in_checkpoint": "kill",
}
"""Every named point that is used, with its action."""


def _some_workers(stage: Stage) -> list[psutil.Process]:
    stage.wait_for(lambda: bool(stage.workers()))
    return stage.workers()


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
