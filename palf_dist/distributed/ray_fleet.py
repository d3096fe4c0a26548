"""The fleet of a run on Ray: one actor for each worker.

Whatever the driver puts into the object store (datasets, policies, carried states) lies on the driver's own node and is
owned by the driver, so that no other node's loss takes it away.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.distributed import cluster
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.fleet import Ready, WorkerDied, WorkerRaised
from palf_dist.distributed.pool import Broadcast, RunnerFactory
from palf_dist.distributed.worker import Worker
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution, Unit

TAKE_SECONDS = 10.0
"""How long an answer that is there may take to be read: it may lie on a node that has just been cut off."""


class RayFleet:
    """Actors on the Ray that this process is connected to. Implements Fleet."""

    def __init__(
        self,
        config: RunConfig,
        datasets: Mapping[str, EncodedDataset],
        make_runner: RunnerFactory,
        share: Share,
        run_uri: str | None = None,
    ) -> None:
        """``share``: what each worker takes of the cluster, from ``cluster.connect``. ``run_uri``: as for Worker."""
        self.grows = config.distributed.address is not None
        self._share = share
        grouped = ray.util.get_current_placement_group() is not None  # its bundles are the places, one for each worker
        self._actor_class = ray.remote(Worker).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=None if grouped else "SPREAD",  # "DEFAULT" would leave the group
        )
        arrays = ray.put({name: dataset.to_arrays() for name, dataset in datasets.items()})
        self._arguments = (config.model_dump_json(), arrays, make_runner, os.environ.get(faults.VARIABLE), run_uri)
        self._broadcasts: weakref.WeakKeyDictionary[Broadcast, ray.ObjectRef] = weakref.WeakKeyDictionary()

    def start(self, number: int) -> tuple[Any, ray.ObjectRef]:
        actor: Any = self._actor_class.remote(*self._arguments)
        return actor, actor.ready.remote()

    @property
    def each(self) -> str:
        return str(self._share)

    def run(
        self, handle: Any, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None, halvings: int
    ) -> ray.ObjectRef:
        if broadcast not in self._broadcasts:
            self._broadcasts[broadcast] = ray.put(broadcast)
        answer: ray.ObjectRef = handle.run.remote(unit, self._broadcasts[broadcast], carried, halvings)
        return answer

    def wait(self, answers: Collection[ray.ObjectRef], timeout: float) -> list[ray.ObjectRef]:
        if not answers:
            time.sleep(timeout)
            return []
        ready, others = ray.wait(list(answers), timeout=timeout)
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
        return ready

    def take(self, answer: ray.ObjectRef) -> Ready | Contribution:
        try:
            result: Ready | Contribution = ray.get(answer, timeout=TAKE_SECONDS)
        except RayTaskError as error:
            raise WorkerRaised(error.cause) from error
        except RayError as error:
            raise WorkerDied(str(error), for_memory=isinstance(error, OutOfMemoryError)) from error
        return result

    def kill(self, handle: Any) -> None:
        ray.kill(handle)

    def room(self) -> int:
        return cluster.room(self._share)

    def nodes(self) -> set[str]:
        return {node["NodeID"] for node in cluster.staying()}

    def clock(self) -> float:
        return time.monotonic()
