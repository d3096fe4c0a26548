"""Trajectories of inner runs that never took place, in which all that was read and set is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from palf_dist.config import RunConfig
from palf_dist.config_loading import parse_config
from palf_dist.evaluation.inner_runs import DatasetFacts, dataset_facts
from palf_dist.randomness import random_generator
from palf_dist.trajectory import build_table
from palf_dist.types import CONTROL_INDEX, CONTROLS, DEFAULT_HYPERPARAMETERS, TaskSpec, Unit

FAMILIES = {
    **dict.fromkeys(("digits", "fashion-mnist"), "image"),
    **dict.fromkeys(("newsgroups", "snippets"), "text"),
    **dict.fromkeys(("wine", "iris"), "tabular"),
}
RATES = (0.0, 0.2, 0.5)
ARCHITECTURES = "[{kind: conv}, {kind: mlp}, {kind: mlp, hidden: [8]}]"
STEPS, REFRESH = 150, 10

Along = Callable[[TaskSpec, np.ndarray], np.ndarray]
"""(task, t/T at each refresh [R]) -> values [R]."""


def run_config(*overrides: str) -> RunConfig:
    data = f"data: {{train: [{', '.join(FAMILIES)}], held_out: [vehicle]}}"
    return parse_config(data, "a", [f"tasks.architectures={ARCHITECTURES}", *overrides])


def facts() -> dict[str, DatasetFacts]:
    return dataset_facts(FAMILIES, run_config().data.train)


def specs(outer_step: int) -> list[TaskSpec]:
    """Each dataset with each noise rate; images by the conv net, the others by one of the MLPs."""
    return [
        TaskSpec(
            (outer_step, name, index), name, 200, "uniform", rate, 1.0, "train", _architecture(name, index), "adam"
        )
        for name in FAMILIES
        for index, rate in enumerate(RATES)
    ]


def _architecture(name: str, index: int) -> int:
    return 0 if FAMILIES[name] == "image" else 1 + index % 2


def played(
    outer_step: int,
    controls: Mapping[str, Along],
    features: Mapping[str, Along],
    *,
    noise: float = 0.0,
    every: int | None = None,
) -> pa.Table:
    """What one unit records. ``noise``: standard deviation of what is added to each control. ``every``: inner steps
    between two readings of the outer loss, whose rows repeat the last refresh; None: no such rows."""
    tasks = specs(outer_step)
    at_refresh = np.arange(0, STEPS, REFRESH)
    random = random_generator("played", outer_step)
    state = np.stack([[along(task, at_refresh / STEPS) for task in tasks] for along in features.values()], -1)
    set_by = np.tile([DEFAULT_HYPERPARAMETERS.get(name, 0.0) for name in CONTROLS], (len(tasks), len(at_refresh), 1))
    for name, along in controls.items():
        values = np.array([along(task, at_refresh / STEPS) for task in tasks])
        set_by[:, :, CONTROL_INDEX[name]] = values + noise * random.normal(size=values.shape)
    # At a step with both a reading is recorded before the refresh.
    readings = [] if every is None else range(every, STEPS + 1, every)
    rows = sorted([*((step, True) for step in at_refresh), *((step, False) for step in readings)])
    source = [step // REFRESH if refreshed else (step - 1) // REFRESH for step, refreshed in rows]
    read = np.where([[refreshed] for _, refreshed in rows], np.nan, np.full((len(rows), len(tasks)), 0.5))
    records = {
        "inner_step": np.array([step for step, _ in rows]),
        "state": state.transpose(1, 0, 2)[source],
        "controls": set_by.transpose(1, 0, 2)[source],
        **dict.fromkeys(("adaptive_loss", "cross_entropy", "train_accuracy"), np.ones_like(read)),
        **dict.fromkeys(("outer_loss", "meta_validation_accuracy"), read),
    }
    return build_table(Unit("meta_gradient", outer_step, 0), tasks, records, tuple(features))


def constant(value: float) -> Along:
    return lambda task, times: np.full(len(times), value)


def rising(task: TaskSpec, times: np.ndarray) -> np.ndarray:
    return 0.2 + 0.5 * times


def by_noise(task: TaskSpec, times: np.ndarray) -> np.ndarray:
    return np.full(len(times), 0.1 + task.noise_rate)


def in_phases(task: TaskSpec, times: np.ndarray) -> np.ndarray:
    """As the paper has it, with what a family adds to it."""
    more = {"image": 0.0, "text": 0.05, "tabular": 0.1}[FAMILIES[task.dataset]]
    return more + np.array([0.2, 0.8, 0.5])[np.digitize(times, [0.2 - 1e-9, 0.8 - 1e-9])]


def time(task: TaskSpec, times: np.ndarray) -> np.ndarray:
    return times
