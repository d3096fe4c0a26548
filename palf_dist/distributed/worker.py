"""What lives in a Ray worker: one runner, and the datasets it shares with the other workers of its node."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import ray
import torch

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.distributed.fleet import Ready
from palf_dist.distributed.pool import Broadcast, RunnerFactory
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.trajectory import TrajectoryWriter
from palf_dist.types import Contribution, Unit


class Worker:
    """The actor. It keeps nothing between two units that could change a result."""

    def __init__(
        self,
        config: str,
        datasets: dict[str, dict[str, np.ndarray]],
        make_runner: RunnerFactory,
        faults_to_inject: str | None,
        run_uri: str | None = None,
    ) -> None:
        """``config``: the run's configuration as JSON. ``datasets``: EncodedDataset.to_arrays() by name, read-only.
        ``run_uri``: where each worker writes the trajectories of its own units; none: the driver writes them."""
        if faults_to_inject is not None:
            os.environ[faults.VARIABLE] = faults_to_inject
        settings = RunConfig.model_validate_json(config)
        torch.set_num_threads(settings.distributed.threads)
        torch.set_num_interop_threads(1)
        shared = {name: EncodedDataset.from_arrays(arrays) for name, arrays in datasets.items()}
        self._runner = make_runner(settings, shared)
        self._trajectories = None if run_uri is None else TrajectoryWriter(run_uri)

    def ready(self) -> Ready:
        """Where it is, once it is ready for work. Raises ConfigError where it has less memory than units take."""
        self._runner.check()
        return Ready(os.getpid(), ray.get_runtime_context().get_node_id())

    def run(self, unit: Unit, broadcast: Broadcast, carried: dict[str, Any] | None, halvings: int) -> Contribution:
        contribution = self._runner.run(
            unit, broadcast.policy, broadcast.version, broadcast.prepared, carried, halvings
        )
        if self._trajectories and contribution.trajectory is not None:
            contribution.trajectory = self._trajectories.write(unit, contribution.trajectory)
        return contribution
