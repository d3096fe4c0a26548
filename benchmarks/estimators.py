"""What CPU time buys with each estimator of the meta-gradient, at configs/quick.yaml: how near its direction is to the
exact one, and the outer loss that as long a meta-training reaches.
``python -m benchmarks.estimators --write-docs``"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np
from rich.console import Console

from benchmarks.machine import cpu_model
from benchmarks.screen import shown
from palf_dist import units
from palf_dist.atomic import write_atomic
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.config import EstimatorConfig, RunConfig
from palf_dist.config_loading import load_config
from palf_dist.distributed.driver import train_policy
from palf_dist.evaluation.table import Cells, markdown_table
from palf_dist.tasks.datasets import load_all

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results_estimators.md"
JSON = ROOT / "docs" / "results_estimators.json"
EXACT = "adjoint"
ESTIMATORS = {
    EXACT: EstimatorConfig(),
    "adjoint, windows of 50": EstimatorConfig(window=50),
    "adjoint, windows of 25": EstimatorConfig(window=25),
    "one_step": EstimatorConfig(kind="one_step"),
    "es, 4 pairs": EstimatorConfig(kind="es", pairs=4),
    "es, 16 pairs": EstimatorConfig(kind="es", pairs=16),
    "pes, 4 pairs, windows of 50": EstimatorConfig(kind="pes", pairs=4, window=50),
}
RUNS = 6  # inner runs, of as many groups each as an outer step has, on which directions are compared
STEPS = 30  # outer steps of the exact one; the others have its CPU time
SEEDS = 3
JUDGED = 10_000  # outer step from which on the tasks are that all policies are judged on; no run comes so far


def settings() -> RunConfig:
    """The quick preset in process, without tuning and tracking."""
    changes = ("inner.learning_rate=0.01", "inner.weight_decay=0.0", "tracking.enabled=false", "distributed.workers=0")
    return load_config(ROOT / "configs" / "quick.yaml", list(changes))


@dataclass(frozen=True)
class Policy:
    """A policy on its way, and what was prepared for it."""

    phi: np.ndarray
    prepared: dict[str, Any]


@dataclass(frozen=True)
class Direction:
    """Of one estimator on one group of tasks."""

    cosine: float  # with the exact meta-gradient of that group
    seconds: float  # of CPU time, for a whole inner run


def trained(config: RunConfig, estimator: EstimatorConfig, outer_steps: int, seed: int) -> Policy:
    """After so many outer steps, of which none is passed over for a better one before it."""
    learner = config.meta_learner.model_copy(update={"outer_steps": outer_steps})
    evaluation = config.evaluation.model_copy(update={"select_every": outer_steps})
    changed = {"estimator": estimator, "meta_learner": learner, "evaluation": evaluation, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        for _ in train_policy(config.model_copy(update=changed), Path(folder) / "run"):
            pass
        checkpoint = latest_checkpoint(Path(folder) / "run")
    assert checkpoint is not None
    return Policy(checkpoint.learner["policy"], checkpoint.state["prepared"])


class Bench:
    """Runs units under any estimator, on the same datasets."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.datasets = config, load_all(config.data)

    def gradients(self, estimator: EstimatorConfig, policy: Policy, run: int) -> list[tuple[np.ndarray, float]]:
        """The meta-gradient of a whole inner run of each group, that of windows summed, and its seconds of CPU time."""
        config = self.config.model_copy(update={"estimator": estimator})
        runner, windows = units.Runner(config, self.datasets), units.windows(config)
        found = []
        for group in range(config.meta_learner.groups_per_step):
            total, carried = np.zeros(policy.phi.size), None
            began = time.process_time()
            for window in range(windows):
                unit = units.meta_gradient_units(config, run * windows + window)[group]
                contribution = runner.run(unit, policy.phi, 0, policy.prepared, carried)
                assert contribution.gradient is not None
                total, carried = total + contribution.gradient, contribution.carried
            found.append((total, time.process_time() - began))
        return found

    def outer_loss(self, policy: Policy, runs: int) -> float:
        """Mean over fresh groups of tasks, the same for every policy."""
        runner = units.Runner(self.config, self.datasets)
        work = [unit for run in range(runs) for unit in units.meta_gradient_units(self.config, JUDGED + run)]
        losses = [runner.run(unit, policy.phi, 0, policy.prepared).metrics["outer_loss"] for unit in work]
        return float(np.mean(losses))


def directions(
    bench: Bench, policy: Policy, estimators: Mapping[str, EstimatorConfig], runs: int
) -> dict[str, list[Direction]]:
    """Of all estimators by turns on the same groups."""
    found: dict[str, list[Direction]] = {name: [] for name in estimators}
    for run in range(runs):
        exact = [gradient for gradient, _ in bench.gradients(ESTIMATORS[EXACT], policy, run)]
        for name, estimator in estimators.items():
            for (gradient, seconds), true in zip(bench.gradients(estimator, policy, run), exact, strict=True):
                cosine = gradient @ true / (np.linalg.norm(gradient) * np.linalg.norm(true))
                found[name].append(Direction(float(cosine), seconds))
    return found


@dataclass(frozen=True)
class Figures:
    """Of one estimator."""

    seconds: float  # of CPU time for an inner run, median
    cosines: list[float]
    outer_steps: int  # in the CPU time that the exact one has
    outer_losses: list[float]  # of each seed, after meta-training

    @property
    def loss(self) -> tuple[float, float]:
        """Mean and standard error over the seeds."""
        spread = np.std(self.outer_losses, ddof=1) / np.sqrt(len(self.outer_losses)) if self.outer_losses[1:] else 0.0
        return float(np.mean(self.outer_losses)), float(spread)


def affordable(config: RunConfig, estimator: EstimatorConfig, seconds: float, exact: float, steps: int) -> int:
    """Outer steps of this estimator, whose inner run takes ``seconds``, in the CPU time of ``steps`` of the exact
    one; whole inner runs of them."""
    windows = units.windows(config.model_copy(update={"estimator": estimator}))
    return windows * max(1, round(steps * exact / seconds))


def measure(
    config: RunConfig, estimators: Mapping[str, EstimatorConfig], runs: int, steps: int, seeds: int
) -> tuple[dict[str, Figures], float]:
    """Of all estimators, and the outer loss before meta-training."""
    bench = Bench(config)
    half_way = trained(config, ESTIMATORS[EXACT], max(1, steps // 2), config.seed)
    found = directions(bench, half_way, estimators, runs)
    seconds = {name: float(np.median([each.seconds for each in of])) for name, of in found.items()}
    untrained = units.initial_policy(config)
    start = bench.outer_loss(Policy(untrained, half_way.prepared), runs)
    figures = {}
    for name, estimator in estimators.items():
        afforded = affordable(config, estimator, seconds[name], seconds[EXACT], steps)
        losses = [
            bench.outer_loss(trained(config, estimator, afforded, seed), runs)
            for seed in range(config.seed, config.seed + seeds)
        ]
        figures[name] = Figures(seconds[name], [each.cosine for each in found[name]], afforded, losses)
    return figures, start


def table(figures: Mapping[str, Figures], start: float) -> Cells:
    header = ["estimator", "CPU ms of an inner run", "cosine", "min to max", "outer steps", "outer loss", "se", "gain"]
    rows = []
    for name, of in figures.items():
        mean, se = of.loss
        rows.append(
            [
                *(name, f"{1e3 * of.seconds:.0f}"),
                *(f"{np.median(of.cosines):.3f}", f"{min(of.cosines):.3f} to {max(of.cosines):.3f}"),
                *(str(of.outer_steps), f"{mean:.4f}", f"{se:.4f}", f"{start - mean:+.4f}"),
            ]
        )
    return header, rows


def page(figures: Mapping[str, Figures], start: float, groups: int, seeds: int) -> str:
    """``groups``: of tasks, on which directions are compared, and as many on which policies are judged."""
    exact = figures[EXACT]
    return f"""# Estimators of the meta-gradient by CPU time, as measured

Written by `python -m benchmarks.estimators --write-docs` on {cpu_model()}, one thread, configs/quick.yaml.

{markdown_table(table(figures, start))}

- CPU ms: of the meta-gradient of a whole inner run of one group of tasks, that of windows summed; median of {groups}
  groups.
- Cosine: with the exact meta-gradient of the same group (`adjoint`, the whole run), at a policy that is half-way
  through its meta-training; median over the groups.
- Outer steps: what each can take in the CPU time of {exact.outer_steps} outer steps of the exact one; a window is an
  outer step. With the same learning rate, clip and decay for all, as the preset has them.
- Outer loss: after these, on {groups} groups of fresh tasks of the meta-training datasets, the same for all; mean and
  standard error of {seeds} seeds. Before meta-training it is {start:.4f}; gain is what is below that.
"""


def record(figures: Mapping[str, Figures], start: float) -> dict[str, Any]:
    return {"outer_loss_before": start, "estimators": {name: asdict(of) for name, of in figures.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"inner runs that are compared; default {RUNS}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"outer steps of the exact one; default {STEPS}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the meta-trainings; default {SEEDS}")
    parser.add_argument("--write-docs", action="store_true", help=f"also write docs/{PAGE.name} and docs/{JSON.name}")
    options = parser.parse_args(arguments)
    if min(options.runs, options.steps, options.seeds) < 1:
        parser.error("--runs, --steps and --seeds take 1 or more")
    config = settings()
    figures, start = measure(config, ESTIMATORS, options.runs, options.steps, options.seeds)
    Console(width=150).print(shown(table(figures, start)))
    if options.write_docs:
        groups = options.runs * config.meta_learner.groups_per_step
        write_atomic(JSON, (json.dumps(record(figures, start), indent=1) + "\n").encode())
        write_atomic(PAGE, page(figures, start, groups, options.seeds).encode())


if __name__ == "__main__":
    main()
