"""Results, trajectories and metrics of a run that never took place, with the schemas and the sizes of a real one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from palf_dist.config import PolicyConfig, RunConfig
from palf_dist.config_loading import dump_config
from palf_dist.evaluation.methods import METHODS, TUNED
from palf_dist.evaluation.report import RESULTS
from palf_dist.metrics_log import MetricsLog
from palf_dist.policies.meta_learned import LearnedPolicy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from palf_dist.randomness import random_generator
from palf_dist.run_directory import BEST, CONFIG
from palf_dist.trajectory import build_table, to_parquet, write_trajectory
from palf_dist.types import BASIS_LOSSES, CONTROLS, DEFAULT_HYPERPARAMETERS, TaskSpec, Unit

GAINS = {
    "policy": 4.3,
    "policy_trainval": 5.1,
    "policy_shielded": 4.0,
    "policy_schedule": 2.5,
    "policy_shuffled": -2.8,
    "hedge": 0.2,
    "ce": 0.0,
    "focal": -0.4,
    "label_smoothing": 0.3,
    "online_learnloss": 0.0,
    "tuneloss": 0.05,
    "symmetric_ce": 0.9,
    "info_nce": -58.0,
    "s5": 3.2,
    "uniform": 0.5,
    "curriculum": 0.6,
    "ce_rce": 0.9,
    "generalised_ce": 0.6,
    "mae": -1.2,
    "elr": 0.1,
    "bootstrap": 0.15,
    "ce_early_stopping": -0.1,
    "ce_trainval": 0.8,
    "ce_by_validation": 0.4,
    "ce_true_labels": 3.5,
}
GAINS |= {f"{name}_tuned": GAINS[name] + 0.1 for name, *_ in TUNED}
"""Points against tuned CE, about those of METHODS part 6."""


def result_rows(
    datasets: tuple[str, ...] = ("iris", "wine", "german_credit", "fashion_mnist"),
    noise_rates: tuple[float, ...] = (0.0, 0.15, 0.3, 0.5),
    conditions: tuple[str, ...] = ("balanced", "matched", "shifted"),
    seeds: int = 2,
) -> list[dict[str, Any]]:
    rows = []
    for dataset in datasets:
        base = 0.9 - 0.1 * random_generator("base", dataset).random()
        for noise_rate in noise_rates:
            for condition in conditions:
                for seed in range(seeds):
                    task = random_generator("task", dataset, int(100 * noise_rate), condition, seed)
                    ease = base - 0.4 * noise_rate**1.5 - (0.06 if condition == "shifted" else 0) + 0.02 * task.normal()
                    for name, method in METHODS.items():
                        draw = random_generator("gain", dataset, int(100 * noise_rate), condition, seed, name)
                        prior = {"balanced": 0.7, "matched": 0.5, "shifted": 1.8}[condition]
                        gain = GAINS[name] * prior * (0.4 + 2.4 * noise_rate) if GAINS[name] > -50 else GAINS[name]
                        noise = 0.0 if name == "ce" else 1.4 * draw.normal()
                        accuracy = float(np.clip(ease + (gain + noise) / 100, 0.02, 1))
                        rows.append(
                            {
                                "method": name,
                                "dataset": dataset,
                                "family": "image" if dataset == "fashion_mnist" else "tabular",
                                "architecture": 0,
                                "noise_rate": noise_rate,
                                "condition": condition,
                                "target_prior": "uniform" if condition == "shifted" else "train",
                                "seed": seed,
                                "tuned": json.dumps(method.points[-1]) if method.grid else None,
                                "tuning_accuracy": 0.7 + GAINS[name] / 100 if method.is_static else None,
                                "train_size": 200,
                                "accuracy": accuracy,
                                **measured(accuracy, draw),
                            }
                        )
    return rows


STEPS = [0, 50, 100, 150]


def measured(accuracy: float, draw: np.random.Generator) -> dict[str, Any]:
    """The other columns of a row: a curve that rises to the accuracy, the sooner the higher that is."""
    curve = [0.2, *(accuracy * np.tanh(np.array([1, 2]) * (0.4 + accuracy))).tolist(), accuracy]
    return {
        "validation_accuracy": float(np.round(0.7 * accuracy + 0.02 * draw.normal(), 2)),
        "balanced_accuracy": 0.95 * accuracy,
        "auc": 0.5 + accuracy / 2,
        "average_precision": accuracy**2,
        "calibration_error": 0.3 * (1 - accuracy),
        "nll": 2 * (1 - accuracy),
        "area_under_curve": float(np.mean(curve)),
        "best_accuracy": max(curve),
        "best_step": float(STEPS[int(np.argmax(curve))]),
        "curve_accuracy": curve,
        "curve_steps": STEPS,
        "seconds": 0.1 + 0.05 * draw.random(),
    }


TRAINING = ("digits", "breast_cancer", "newsgroups", "lending_club", "credit_scoring")


def trajectory(
    outer_step: int, tasks: int = 40, inner_steps: int = 150, basis: tuple[str, ...] = BASIS_LOSSES
) -> pa.Table:
    """What a robust policy does: a strong prior correction and plain CE first, the robust loss late, more of it where
    labels are noisier."""
    random = random_generator("trajectory", outer_step)
    rates = np.where(random.random(tasks) < 0.25, 0.0, random.uniform(0.05, 0.6, tasks))
    specs = [
        TaskSpec((outer_step, task), TRAINING[task % 5], 200, "uniform", float(rates[task]), 1.0, "train", 0, "adam")
        for task in range(tasks)
    ]
    steps = np.arange(0, inner_steps, 10)
    late = 1 / (1 + np.exp(-(steps[:, None] - 50) / 15)) * np.ones(tasks)
    logits = {
        "ce": 1.2 - 2.5 * late * rates,
        "focal": -1.0 + 0 * late,
        "label_smoothing": -0.6 - 0.5 * late,
        "symmetric_ce": 0.2 + rates + 0 * late,
        "info_nce": -1.5 + 0.8 * np.sin(steps[:, None] / 40) + 0 * late,
        "robust_ce": 0.5 + 3.5 * late * (0.3 + rates),
    }
    shares = {name: np.exp(logits.get(name, -1.0 + 0 * late) + 0.1 * random.normal(size=late.shape)) for name in basis}
    total = sum(shares.values())
    values = {name: np.full(late.shape, value) for name, value in DEFAULT_HYPERPARAMETERS.items()}
    values |= {name: shares[name] / total if name in basis else 0 * late for name in BASIS_LOSSES}
    values |= {"e": 0.1 + 0.6 * rates * late, "la": 1.4 - 0.5 * late, "ew": 0.3 + 0.8 * rates * late}
    values["wd"] = 1 + 1.5 * np.exp(-steps[:, None] / 30) + 0 * late
    records = {
        "inner_step": steps,
        "state": np.zeros((len(steps), tasks, 1)),
        "controls": np.stack([values[name] for name in CONTROLS], axis=-1),
        **{name: late for name in ("adaptive_loss", "cross_entropy", "train_accuracy")},
        **{name: np.full(late.shape, np.nan) for name in ("outer_loss", "meta_validation_accuracy")},
    }
    return build_table(Unit("meta_gradient", outer_step, 0), specs, records, ("time",))


def metrics(outer_step: int) -> dict[str, float]:
    """One row of metrics.parquet."""
    random = random_generator("metrics", outer_step)
    row = {"outer_loss": 0.24 + 0.12 * math.exp(-outer_step / 25) + 0.015 * random.normal()}
    if outer_step % 20 == 19:
        row["selection_score"] = 0.02 + 0.02 * (1 - math.exp(-outer_step / 30)) + 0.003 * random.normal()
    refused = {"refused_non_finite": 0, "refused_outlier": outer_step == 9}
    return {**row, "applied": 2, "reissued": outer_step == 7, **refused, "seconds": 2.5}


def metrics_table(outer_steps: int = 100) -> pa.Table:
    return pa.Table.from_pylist(
        [{"outer_step": step, "selection_score": None} | metrics(step) for step in range(outer_steps)]
    )


def few_rows() -> list[dict[str, Any]]:
    """Results of a grid so small that its plots are drawn at once."""
    rows = result_rows(datasets=("iris", "wine"), noise_rates=(0.0, 0.3), conditions=("balanced",), seeds=1)
    return [row for row in rows if row["method"] in ("policy", "ce", "s5")]


def write_run(
    folder: Path, *, outer_steps: int = 100, trajectories: int = 12, results: list[dict[str, Any]] | None = None
) -> Path:
    """A run directory as the driver leaves it: without a policy and results after its last outer step, with both at
    the end. ``trajectories``: of how many of the last outer steps."""
    folder.mkdir(parents=True)
    config = RunConfig(
        name="quick",
        data={"train": TRAINING, "held_out": ("iris", "wine", "german_credit", "fashion_mnist")},
        meta_learner={"outer_steps": 100},
    )
    (folder / CONFIG).write_text(dump_config(config))
    log = MetricsLog(folder)
    for step in range(outer_steps):
        log.append(step, metrics(step))
        if step >= outer_steps - trajectories:
            write_trajectory(folder, Unit("meta_gradient", step, 0), to_parquet(trajectory(step)))
    log.close()
    if results is not None:
        spec = policy_spec(PolicyConfig())
        phi = LearnedPolicy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features))).initial()
        mean = np.zeros(len(spec.features), np.float32)
        save_policy(
            folder / BEST, PolicyArtefact(spec, phi, mean, mean + 1, {"outer_step": 80, "selection_score": 0.0375})
        )
        pq.write_table(pa.Table.from_pylist(results), folder / RESULTS)
    return folder
