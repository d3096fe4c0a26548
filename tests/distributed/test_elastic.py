"""Clusters whose nodes join, leave and are killed while a run with ``workers: auto`` goes on."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from rich.console import Console

from palf_dist.distributed.cluster import _process_token, changed_environment, connect
from palf_dist.distributed.dispatcher import Dispatcher
from palf_dist.distributed.driver import meta_train
from palf_dist.distributed.ray_fleet import RayFleet
from palf_dist.progress import Progress
from palf_dist.tasks.datasets import load_all
from palf_dist.types import Contribution, Unit
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import ToyRunner, small_config
from tests.distributed.test_pool import BROADCAST, CARRIED, collect, contents, in_process

pytestmark = [pytest.mark.slow, pytest.mark.alone]

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "health_check_timeout_ms": 2000,
}
LIMIT = 180.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with room for one worker."""
    with changed_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _process_token()}):
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": HEALTH}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


def test_workers_follow_nodes_that_join_are_drained_and_are_killed(cluster: Cluster) -> None:
    config = small_config(distributed={"workers": "auto", "address": cluster.address})
    submitted: list[Unit] = []
    events: list[str] = []
    given: list[Contribution] = []
    with connect(config.distributed) as share:
        pool = Dispatcher(RayFleet(config, load_all(config.data), ToyRunner, share), config.distributed, events.append)

        def work_until(reached: Callable[[], bool]) -> None:
            """Work goes on, with more units than there are workers."""
            end = time.monotonic() + LIMIT
            while not reached():
                assert time.monotonic() < end, events
                while pool.pending < 4:
                    submitted.append(Unit("meta_gradient", 3, len(submitted), '{"seconds":1.0}'))
                    pool.submit(submitted[-1], BROADCAST, CARRIED)
                contribution = pool.next_completed(0.2)
                given.extend([] if contribution is None else [contribution])

        def busy_on(node: Any) -> bool:
            return any(seat.issue and seat.ready and seat.ready.node == node.node_id for seat in pool._seats)

        work_until(lambda: bool(given))
        assert pool.alive == 1 == pool.capacity
        drained = cluster.add_node(num_cpus=1)
        work_until(lambda: busy_on(drained))
        assert pool.alive == 2
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        gcs = ray._private.worker.global_worker.gcs_client
        assert gcs.drain_node(drained.node_id, reason, "test", int(1000 * (time.time() + 60)))[0]
        work_until(lambda: pool.capacity == 1 and not busy_on(drained))
        assert pool.reissued == 0
        killed = cluster.add_node(num_cpus=1)
        work_until(lambda: busy_on(killed))
        assert not busy_on(drained)
        cluster.remove_node(killed, allow_graceful=False)
        work_until(lambda: pool.reissued == 1)
        given += collect(pool, pool.pending)
        given.sort(key=lambda item: item.unit)
        assert [item.unit for item in given] == submitted
        alone = in_process([Unit(unit.kind, unit.outer_step, unit.group) for unit in submitted])
        assert [content[1:] for content in contents(given)] == [content[1:] for content in alone]
        assert any("is leaving or gone; it is replaced" in event for event in events)
        assert any("died; it is replaced, and unit meta_gradient 3/" in event for event in events)
        rooms = [event.split("room for ")[1] for event in events if "room for" in event]
        assert rooms == ["1", "2 (1 before)", "1 (2 before)", "2 (1 before)", "1 (2 before)"][: len(rooms)]
        pool.close()
        cluster.remove_node(drained)


class Changing(Progress):
    """Has a node join a run and, once there is a worker on it, kills that node while it works."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(Console(file=io.StringIO(), width=200))
        self.cluster, self.node, self.killer = cluster, None, threading.Thread(target=self.kill)

    def kill(self) -> None:
        time.sleep(0.2)  # meanwhile the next outer step has begun
        self.cluster.remove_node(self.node, allow_graceful=False)

    def advance(self, done: int) -> None:
        super().advance(done)
        if self.status.phase == "meta-training" and self.node is None:
            self.node = self.cluster.add_node(num_cpus=1)
        elif self.node is not None and self.killer.ident is None:
            if (self.status.workers or 0) > 1:
                self.killer.start()
            else:
                time.sleep(0.5 if done < 10 else 5.0)  # the worker starts meanwhile


def test_a_run_ends_as_on_one_machine_though_nodes_come_and_go(cluster: Cluster, tmp_path: Path) -> None:
    steps = {"outer_steps": 20}
    meta_train(small_config(meta_learner=steps), tmp_path / "laptop")
    elastic = small_config(meta_learner=steps, distributed={"workers": "auto", "address": cluster.address})
    progress = Changing(cluster)
    result = meta_train(elastic, tmp_path / "cluster", progress=progress)
    progress.killer.join()
    assert result.outer_steps == 20
    assert fingerprint(tmp_path / "cluster") == fingerprint(tmp_path / "laptop")
