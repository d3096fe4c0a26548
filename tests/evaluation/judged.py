"""Runs of a suite's folds that never took place, evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palf_dist.config import PolicyConfig
from palf_dist.config_loading import dump_config, parse_config
from palf_dist.evaluation.methods import METHODS
from palf_dist.policies.meta_learned import LearnedPolicy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from palf_dist.run_directory import BEST, CONFIG
from tests.evaluation.synthetic import TRAINING, result_rows, write_run

FOLDS = (("fashion_mnist", "german_credit"), ("iris", "wine"))
FEW = ("policy", "policy_schedule", "ce", "s5", "focal", "ce_early_stopping", "curriculum")


def rows_of(datasets: Sequence[str], methods: Sequence[str] = FEW) -> list[dict[str, Any]]:
    rows = result_rows(tuple(datasets), noise_rates=(0.0, 0.3), conditions=("balanced", "shifted"))
    return [{**row, "origin": row["dataset"]} for row in rows if row["method"] in methods]


def judged_run(
    folder: Path,
    rows: list[dict[str, Any]],
    *overrides: str,
    train: Sequence[str] = TRAINING,
    card: dict[str, Any] | None = None,
    trajectories: int = 0,
) -> str:
    """A run directory with these results; ``card`` is added to that of the policy."""
    write_run(folder, outer_steps=trajectories, trajectories=trajectories, results=rows)
    held_out = sorted({row["dataset"] for row in rows})
    methods = [name for name in METHODS if name in {row["method"] for row in rows}]
    data = f"data: {{train: [{', '.join(train)}], held_out: [{', '.join(held_out)}]}}\nname: suite"
    judged = {"methods": methods} | {
        name: sorted({row[column] for row in rows})
        for name, column in (("noise_rates", "noise_rate"), ("conditions", "condition"))
    }
    judged |= {"seeds": len({row["seed"] for row in rows})}
    config = parse_config(data, "run", [*(f"evaluation.{name}={value}" for name, value in judged.items()), *overrides])
    (folder / CONFIG).write_text(dump_config(config))
    spec = policy_spec(PolicyConfig())
    size = len(spec.features)
    phi = LearnedPolicy(spec, torch.zeros(size), torch.ones(size)).initial()
    about = {"trained_on": list(train), "origins": list(train), "outer_step": 80, "selection_score": 0.0375}
    mean = np.zeros(size, np.float32)
    save_policy(folder / BEST, PolicyArtefact(spec, phi, mean, mean + 1, about | (card or {})))
    return str(folder)


def judged_folds(folder: Path, *overrides: str, trajectories: int = 0) -> list[str]:
    """One run for each of ``FOLDS``."""
    return [
        judged_run(folder / f"fold-{index}", rows_of(datasets), *overrides, trajectories=trajectories)
        for index, datasets in enumerate(FOLDS)
    ]
