"""A run on three nodes that loses all workers at once, room in the object store, and two nodes at once."""

from __future__ import annotations

import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from palf_dist.distributed.cluster import _process_token, changed_environment
from palf_dist.distributed.driver import meta_train
from palf_dist.progress import Progress
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STORE_BYTES = 80 << 20
HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "health_check_timeout_ms": 2000,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head and two nodes with room for one worker each, and with the smallest object store there is."""
    with changed_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _process_token()}):
        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        head = {**node, "include_dashboard": False, "_system_config": HEALTH}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            cluster.add_node(**node)
        yield cluster
        cluster.shutdown()


class Disturbing(Progress):
    """Does its mischief one after the other, each in the middle of a step and once all workers are there."""

    def __init__(self, cluster: Cluster) -> None:
        self.screen = io.StringIO()
        super().__init__(Console(file=self.screen, width=200))
        self.cluster, self.kept = cluster, []
        self.mischief: list[Callable[[], Any]] = [self.kill_all_workers, self.fill_the_store, self.kill_two_nodes]
        self.last: threading.Thread | None = None
        self.killed = 0

    def advance(self, done: int) -> None:
        super().advance(done)
        if self.status.phase != "meta-training" or not self.mischief:
            return
        if self.status.workers != 3:
            time.sleep(0.5)  # so that there are steps left when all workers are there again
            return
        self.last = threading.Timer(0.1, self.mischief.pop(0))  # the next step has begun then
        self.last.start()

    def kill_all_workers(self) -> None:
        family = psutil.Process().children(recursive=True)
        workers = [process for process in family if process.name().startswith("ray::Worker")]
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        self.killed = len(workers)

    def fill_the_store(self) -> None:
        """With twice what goes in, as long as the run lasts: everything else is evicted, or spilled to the disk."""
        self.kept = [ray.put(np.ones(STORE_BYTES // 8, np.uint8)) for _ in range(16)]

    def kill_two_nodes(self) -> None:
        with ThreadPoolExecutor() as pool:
            nodes = list(self.cluster.worker_nodes)
            list(pool.map(lambda node: self.cluster.remove_node(node, allow_graceful=False), nodes))


def test_a_run_that_loses_workers_nodes_and_objects_ends_as_on_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    steps = {"outer_steps": 40, "groups_per_step": 3}
    meta_train(small_config(meta_learner=steps), tmp_path / "laptop")
    config = small_config(meta_learner=steps, distributed={"workers": 3, "address": cluster.address})
    progress = Disturbing(cluster)
    result = meta_train(config, tmp_path / "cluster", progress=progress)
    assert progress.last is not None
    progress.last.join()
    shown = progress.screen.getvalue()
    assert not progress.mischief and progress.killed == 3, shown
    assert len(progress.kept) == 16
    assert shown.count("died; it is replaced") >= 5 and result.contributions["reissued"] >= 2, shown
    assert fingerprint(tmp_path / "cluster") == fingerprint(tmp_path / "laptop")
