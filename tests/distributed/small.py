"""A run that is small in every way, and a runner so simple that pools can be tested on their own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palf_dist.config import RunConfig
from palf_dist.errors import DataError
from palf_dist.faults import fault_point
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution, Unit


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Two bundled datasets to train on, two held out; 4 outer steps of 2 groups of 2 tasks, 12 inner steps each."""
    base: dict[str, dict[str, Any]] = {
        "data": {"train": ["breast_cancer", "wine"], "held_out": ["digits", "iris"]},
        "tasks": {
            "train_size": [24, 40],
            "meta_validation_size": 24,
            "test_size": 40,
            "architectures": [{"kind": "mlp", "hidden": [8]}],
            "group_size": 2,
        },
        "inner": {
            "steps": 12,
            "batch_size": 8,
            "grids": {"adam": {"learning_rate": [0.01, 0.05], "weight_decay": [0.0]}},
        },
        "policy": {"refresh": 4},
        "outer_loss": {"every": 6},
        "meta_learner": {"outer_steps": 4},
        "evaluation": {"methods": ["policy", "ce"], "noise_rates": [0.3], "conditions": ["balanced"], "seeds": 1}
        | {"select_every": 2, "select_tasks": 2},
        "checkpoint": {"every": 1},
        "distributed": {"workers": 0},
        "tracking": {"enabled": False},
    }
    return RunConfig.model_validate({name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


class ToyRunner:
    """Contributions that depend on the unit, the policy and the datasets, after some float32 torch work.

    The unit's settings may ask for an exception, {"raise": "ValueError" | "DataError"}, or for time, {"seconds": 2.5}.
    """

    def __init__(self, config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
        self.datasets = datasets

    def check(self) -> None:
        pass

    def run(
        self,
        unit: Unit,
        policy: np.ndarray,
        policy_version: int,
        prepared: Mapping[str, Any],
        carried: dict[str, np.ndarray] | None = None,
        halvings: int = 0,
    ) -> Contribution:
        fault_point("before_unit", unit)
        settings = json.loads(unit.settings or "{}")
        time.sleep(settings.get("seconds", 0.0))
        match settings.get("raise"):
            case "ValueError":
                raise ValueError("the toy broke")
            case "DataError":
                raise DataError("data.train: the toy does not like it")
        generator = torch.Generator().manual_seed(unit.outer_step * 1000 + unit.group)
        matrix = torch.randn(300, 300, generator=generator)
        for _ in range(20):
            matrix = torch.tanh(matrix @ matrix / 17)
        fault_point("in_unit", unit)
        rows = sum(float(np.nansum(dataset.numeric)) for dataset in self.datasets.values())
        gradient = matrix[0, : len(policy)].double().numpy() * policy + rows * prepared.get("scale", 1.0)
        state = {} if carried is None else carried
        return Contribution(
            unit,
            policy_version,
            {"threads": float(torch.get_num_threads())},
            gradient,
            carried={"state": state.get("state", np.zeros(3)) + 1},
        )


class BrokenRunner(ToyRunner):
    """Cannot be made."""

    def __init__(self, config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
        raise RuntimeError("no such device")


def fault(point: str, unit: tuple[str, int, int], action: str, once_file: Path | None = None) -> str:
    """A value of PALF_FAULTS."""
    settings: dict[str, Any] = {"point": point, "unit": list(unit), "action": action}
    if once_file is not None:
        settings["once_file"] = str(once_file)
    return json.dumps([settings])
