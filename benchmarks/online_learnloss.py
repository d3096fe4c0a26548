"""Online LearnLoss against constants, Optuna TPE and plain cross-entropy at equal gradient evaluations: prints two
tables and writes every result as JSON. ``python -m benchmarks.online_learnloss --json online_learnloss.json``"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.evaluation.inference import clustered_mean
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.losses import MASKED_LOGIT
from palf_dist.outer_loss import accuracy
from palf_dist.policies import OnlineLearnLoss, Policy, StaticPolicy, TaskMixtures
from palf_dist.policies.static import control_vector
from palf_dist.randomness import random_generator
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.family import build_group, evaluation_specs
from palf_dist.types import Rows, TaskGroup

BUDGET = 450  # gradient evaluations (of a minibatch) that a method may spend on a task
TPE_TRIALS = 15
LOOK_EVERY = 30  # steps between two looks at the validation rows
TUNED = {"learning_rate": 0.003, "weight_decay": 3.0}
"""For every method: what ``palf-dist meta-train --config configs/quick.yaml`` finds for plain CE on its datasets."""
NOISE_RATES = (0.0, 0.3)
SEEDS = 5
SPACE = OnlineLearnLoss().space
CONFIG = Path(__file__).parents[1] / "configs" / "quick.yaml"
NOTHING = torch.zeros(0)


@dataclass
class Result:
    """What a method reached on each task of a group: at the end of a training, and at its best look by validation."""

    validation: np.ndarray  # [G] cross-entropy on the noisy validation rows
    error: np.ndarray  # [G] clean test error in %
    stopped_validation: np.ndarray  # [G] the same at the look with the least validation cross-entropy
    stopped_error: np.ndarray  # [G]

    @classmethod
    def best(cls, trials: list[Result]) -> Result:
        """The training, and the look of all trainings, that the validation rows pick."""
        return cls(
            *_pick([trial.validation for trial in trials], [trial.error for trial in trials]),
            *_pick([trial.stopped_validation for trial in trials], [trial.stopped_error for trial in trials]),
        )


def _pick(validation: Sequence[np.ndarray], error: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    scores = np.nan_to_num(np.array(validation), nan=np.inf)
    place = scores.argmin(0)[None]
    return np.take_along_axis(scores, place, 0)[0], np.take_along_axis(np.array(error), place, 0)[0]


def train(config: RunConfig, group: TaskGroup, policy: Policy, steps: int) -> Result:
    """One training of every task of the group, its learning rate decaying over ``steps``."""
    loop = InnerLoop(replace(group, batches=group.batches[:steps]), policy, config.inner)
    looks: list[tuple[np.ndarray, np.ndarray]] = []

    def look(state: InnerState, _: StepResult) -> None:
        if state.step % LOOK_EVERY == 0 or state.step == loop.steps:
            cross_entropy = _scores(loop, state.theta, group.validation)[0]
            looks.append((cross_entropy, _scores(loop, state.theta, group.test)[1]))

    torch.set_flush_denormal(True)
    loop.run(loop.start(), NOTHING, loop.steps, after_step=look)
    torch.set_flush_denormal(False)
    return Result(*looks[-1], *_pick(*zip(*looks, strict=True)))


def _scores(loop: InnerLoop, theta: Tensor, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and error in % [G] on a split."""
    mask = loop.group.class_mask
    logits = loop.evaluate(theta, rows)
    own = torch.log_softmax(logits.masked_fill(~mask[:, None, :], MASKED_LOGIT), -1).gather(2, rows.labels[:, :, None])
    cross_entropy = -(own[:, :, 0] * rows.mask).sum(1) / rows.mask.sum(1)
    return cross_entropy.numpy(), 100 * (1 - accuracy(logits, rows.labels, rows.mask, mask)).numpy()


def constant(config: RunConfig, group: TaskGroup, u: np.ndarray, steps: int) -> Result:
    """The same constant weights, of log weights u [k], for every task."""
    return train(config, group, TaskMixtures(SPACE, [SPACE.weights(u)] * group.size), steps)


def tpe(config: RunConfig, group: TaskGroup, steps: int) -> Result:
    """TPE_TRIALS trials of Optuna's TPE at its defaults, one study per task, the middle of the box first; it minimises
    the final validation cross-entropy."""
    studies = []
    for task in range(group.size):
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=task))
        study.enqueue_trial(SPACE.named(SPACE.weights(SPACE.centre)))
        studies.append(study)
    box = list(zip(SPACE.names, SPACE.low, SPACE.high, strict=True))
    done = []
    for _ in range(TPE_TRIALS):
        trials = [study.ask() for study in studies]
        weights = [[trial.suggest_float(name, low, high, log=True) for name, low, high in box] for trial in trials]
        done.append(train(config, group, TaskMixtures(SPACE, [np.array(each) for each in weights]), steps))
        for study, trial, value in zip(studies, trials, done[-1].validation, strict=True):
            study.tell(trial, float(value))
    return Result.best(done)


def online_steps(group: TaskGroup, batch: int, refresh: int) -> int:
    """Steps that BUDGET pays for: a snapshot is a forward pass over the training and validation rows, which costs a
    third of the gradient evaluations that this many rows make."""
    rows = float((group.train.mask.sum(1) + group.validation.mask.sum(1)).mean())
    return int(BUDGET / (1 + rows / (3 * batch * refresh)))


class RandomCorners(OnlineLearnLoss):
    """The control: what comes of changing the weights as often, to corners of the box that know nothing."""

    def mixture(self, snapshots: np.ndarray) -> np.ndarray:
        draw = random_generator("random corner", len(snapshots), int(1e6 * snapshots[0, 0]))  # of this step and task
        corner = np.where(draw.random(self.space.size) < 0.5, self.space.low, self.space.high)
        alpha = np.concatenate([[1.0], corner])
        return alpha / alpha.sum()


def on_the_fly(config: RunConfig, group: TaskGroup, policy: OnlineLearnLoss) -> Result:
    return train(config, group, policy, online_steps(group, config.inner.batch_size, policy.refresh))


CORNERS = [np.array(u) for u in itertools.product(*zip(SPACE.log_low, SPACE.log_high, strict=True))]
GRID = [SPACE.centre, *CORNERS]


def run_all(config: RunConfig, group: TaskGroup) -> Iterator[tuple[str, int, Result]]:
    """Every method with the budgets that it spends in all. The reference comes first."""
    yield "plain CE", 1, train(config, group, StaticPolicy(control_vector({"ce": 1.0})), BUDGET)
    yield "online LearnLoss", 1, on_the_fly(config, group, OnlineLearnLoss())
    yield "a random corner every 10 steps", 1, on_the_fly(config, group, RandomCorners())
    whole = [constant(config, group, u, BUDGET) for u in GRID]
    yield "corner: the others at high", 1, whole[-1]
    yield "corner: the others at low", 1, whole[1]
    yield "middle of the box", 1, whole[0]
    short = BUDGET // len(GRID)
    yield (
        f"best of {len(GRID)} constants, {short} steps each",
        1,
        Result.best([constant(config, group, u, short) for u in GRID]),
    )
    short = BUDGET // TPE_TRIALS
    yield f"TPE, {TPE_TRIALS} trials of {short} steps", 1, tpe(config, group, short)
    yield f"best of {len(GRID)} constants, {BUDGET} steps each", len(GRID), Result.best(whole)


def measure(config: RunConfig) -> list[dict[str, Any]]:
    """One row per method and task of the held-out datasets."""
    datasets = load_all(config.data)
    rows = []
    for specs in evaluation_specs(config, datasets):
        group = build_group(config, datasets, specs, {"0/adam": TUNED})
        for name, budgets, result in run_all(config, group):
            for task, spec in enumerate(specs):
                values = {field: float(array[task]) for field, array in vars(result).items()}
                task_key = {"dataset": spec.dataset, "noise_rate": spec.noise_rate, "seed": int(spec.keys[-1])}
                rows.append({"method": name, "budgets": budgets, **task_key, **values})
    return rows


def summarise(rows: list[dict[str, Any]], noise_rate: float) -> list[dict[str, Any]]:
    """Means over the tasks of one noise rate, and paired differences to the reference in points of test error."""
    chosen = [row for row in rows if row["noise_rate"] == noise_rate]
    by_method = {
        name: [row for row in chosen if row["method"] == name] for name in dict.fromkeys(row["method"] for row in rows)
    }
    first = next(iter(by_method.values()))
    clusters = [row["dataset"] for row in first]
    summary = []
    for name, own in by_method.items():
        record: dict[str, Any] = {"method": name, "budgets": own[0]["budgets"]}
        for field in ("validation", "error", "stopped_validation", "stopped_error"):
            values = np.array([row[field] for row in own])
            record[field] = float(values.mean())
            if field.endswith("error"):
                difference = clustered_mean(values - [row[field] for row in first], clusters)
                record[f"{field}_difference"], record[f"{field}_se"] = difference.mean, difference.se
        summary.append(record)
    return summary


def show(summary: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for header in ("method", "budgets", "val CE", "test error %", "to CE", "stopped: val CE", "error %", "to CE"):
        table.add_column(header, justify="left" if header == "method" else "right")
    for row in summary:
        cells = []
        for prefix in ("", "stopped_"):
            difference = f"{row[f'{prefix}error_difference']:+.2f} ({row[f'{prefix}error_se']:.2f})"
            is_reference = row is summary[0]
            cells += [f"{row[f'{prefix}validation']:.3f}", f"{row[f'{prefix}error']:.2f}"]
            cells.append("-" if is_reference else difference)
        table.add_row(row["method"], f"{row['budgets']}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write every result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = load_config(
        CONFIG,
        [
            f"inner.steps={BUDGET}",
            f"evaluation.noise_rates={list(NOISE_RATES)}",
            "evaluation.conditions=[balanced]",
            f"evaluation.seeds={SEEDS}",
            "tasks.group_size=40",
        ],
    )
    rows = measure(config)
    summaries = {f"{rate:g}": summarise(rows, rate) for rate in NOISE_RATES}
    console = Console(width=150)
    for rate, summary in summaries.items():
        console.print(
            show(
                summary,
                f"Label noise {rate}: a budget is {BUDGET} gradient evaluations; in brackets the "
                "standard error clustered by dataset",
            )
        )
    if arguments.json is not None:
        report = {"budget": BUDGET, "summaries": summaries, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
