"""Units whose memory matters, on made-up datasets; as a program, measures in a fresh process what one of them takes.

Method: the unit is run once with few tasks (libraries, thread pools, buffers), then /proc/self/clear_refs resets the
process's high-water mark, and the unit is run: VmHWM after it less VmRSS before it (Linux).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palf_dist import units
from palf_dist.config import RunConfig
from palf_dist.randomness import random_generator
from palf_dist.tasks.encoded import WORDS, EncodedDataset
from palf_dist.types import Unit

MLP = {"kind": "mlp", "hidden": [64]}
CONV = {"kind": "conv", "channels": [16, 32], "image_size": 16}
RESNET = {"kind": "resnet", "widths": [8, 16], "image_size": 16}
TRANSFORMER = {"kind": "transformer", "width": 32, "vocabulary": 512, "length": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp adjoint adam": ("meta_gradient", {"tasks": {"architectures": [MLP], "group_size": 48}}),
    "mlp adjoint sgd, dense checkpoints": (
        "meta_gradient",
        {
            "tasks": {"architectures": [MLP], "group_size": 48, "optimisers": ["sgd"]},
            "inner": {"steps": 120},
            "outer_loss": {"every": 2},
        },
    ),
    "mlp one_step": (
        "meta_gradient",
        {"tasks": {"architectures": [MLP], "group_size": 24}, "estimator": {"kind": "one_step"}},
    ),
    "mlp window of adjoint": (
        "meta_gradient",
        {"tasks": {"architectures": [MLP], "group_size": 96}, "estimator": {"window": 40}},
    ),
    "mlp unroll": (
        "meta_gradient",
        {
            "tasks": {"architectures": [MLP], "group_size": 12},
            "inner": {"steps": 60},
            "estimator": {"kind": "unroll"},
        },
    ),
    "mlp pes": (
        "meta_gradient",
        {
            "tasks": {"architectures": [{"kind": "mlp", "hidden": [256]}], "group_size": 64},
            "inner": {"steps": 40},
            "estimator": {"kind": "pes", "window": 20, "pairs": 3},
        },
    ),
    "conv adjoint momentum": (
        "meta_gradient",
        {
            "tasks": {"architectures": [CONV], "group_size": 16, "optimisers": ["momentum"]},
            "inner": {"steps": 20},
        },
    ),
    "conv unroll": (
        "meta_gradient",
        {
            "tasks": {"architectures": [CONV], "group_size": 4, "optimisers": ["sgd"]},
            "inner": {"steps": 6},
            "estimator": {"kind": "unroll"},
        },
    ),
    "resnet adjoint adam": (
        "meta_gradient",
        {"tasks": {"architectures": [RESNET], "group_size": 12}, "inner": {"steps": 20}},
    ),
    "transformer adjoint adam, palf": (
        "meta_gradient",
        {
            "tasks": {"architectures": [TRANSFORMER], "group_size": 12},
            "inner": {"steps": 60},
            "policy": {"kind": "palf"},
        },
    ),
    "module adjoint adam": (
        "meta_gradient",
        {
            "tasks": {"architectures": [{"kind": "module", "factory": "tests.memory_cases:wide"}], "group_size": 24},
            "inner": {"steps": 30},
        },
    ),
    "conv select": (
        "select",
        {"tasks": {"architectures": [CONV], "group_size": 24}, "inner": {"steps": 4}},
    ),
    "mlp select, neighbours": (
        "select",
        {
            "tasks": {"architectures": [MLP], "group_size": 24, "train_size": [800, 1000]},
            "inner": {"steps": 10},
            "policy": {"features": ["time", "neighbour_agreement", "validation_loss"]},
        },
    ),
}
"""Name -> kind of unit, and what differs from the default configuration."""


def wide(shape: Any, classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(shape.numeric, 256), torch.nn.Tanh(), torch.nn.Linear(256, classes))


def dataset(name: str, family: str, rows: int = 4000, classes: int = 10) -> EncodedDataset:
    draw = random_generator("memory case", name)
    numeric = draw.normal(size=(rows, 64 if family == "tabular" else 0)).astype(np.float32)
    images = draw.integers(0, 255, (rows, 16, 16, 3)).astype(np.uint8) if family == "image" else None
    words = draw.integers(1, 9999, (rows, WORDS)).astype(np.uint32) if family == "text" else None
    names = tuple(map(str, range(classes)))
    labels = draw.integers(0, classes, rows)
    none = np.zeros((rows, 0), np.int32)
    return EncodedDataset(name, family, name, names, numeric, none, (), images, words, labels)


def case(name: str) -> tuple[RunConfig, dict[str, EncodedDataset], Unit]:
    kind, changes = CASES[name]
    families = {"conv": "image", "resnet": "image", "transformer": "text"}
    family = families.get(changes["tasks"]["architectures"][0]["kind"], "tabular")
    tasks = {"train_size": [390, 400], **changes["tasks"]}
    config = RunConfig.model_validate({"data": {"train": ["seen"], "held_out": ["unseen"]}, **changes, "tasks": tasks})
    datasets = {name: dataset(name, family) for name in ("seen", "unseen")}
    unit = units.meta_gradient_units(config, 0)[0] if kind == "meta_gradient" else Unit(kind, 0, 0)
    return config, datasets, unit


def prepared(config: RunConfig) -> dict[str, Any]:
    features = len(units.policy_spec(config.policy).features)
    chosen = {"learning_rate": 0.003, "weight_decay": 0.0}
    reference = {f"0/{name}": chosen for name in config.tasks.optimisers}
    return {"reference": reference, "feature_mean": [0.0] * features, "feature_std": [1.0] * features}


def memory_line(name: str) -> int:
    """Bytes that /proc/self/status gives for ``name``."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def measure(name: str) -> int:
    config, datasets, unit = case(name)
    torch.set_num_threads(1)

    def run(group_size: int) -> None:
        tasks = config.tasks.model_copy(update={"group_size": group_size})
        runner = units.Runner(config.model_copy(update={"tasks": tasks}), datasets)
        runner._plan.parts = lambda work, tasks: 1  # type: ignore[method-assign]  # the whole, whatever it needs
        runner.run(unit, units.initial_policy(config), 0, prepared(config))

    run(2)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_line("VmRSS")
    run(config.tasks.group_size)
    return memory_line("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
