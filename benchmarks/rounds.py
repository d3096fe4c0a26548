"""What an outer step takes besides its units of work: dispatch by Ray, trajectories, the meta-learner, the log,
checkpoints and MLflow, each timed where it happens, at configs/quick.yaml with one Ray worker.
``python -m benchmarks.rounds --write-docs``"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil
from rich.console import Console

from benchmarks.machine import cpu_model
from benchmarks.screen import shown
from palf_dist import units
from palf_dist.atomic import write_atomic
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.distributed import meta_training
from palf_dist.distributed.meta_training import MetaTraining
from palf_dist.distributed.session import Session, open_session
from palf_dist.evaluation.table import Cells, markdown_table
from palf_dist.meta_learner import MetaLearner
from palf_dist.metrics_log import MetricsLog
from palf_dist.progress import Progress
from palf_dist.tasks.cache import cache_folder
from palf_dist.tasks.datasets import load_all
from palf_dist.tracking import MLflowTracker, open_tracker
from palf_dist.types import Contribution
from palf_dist.workplace import open_workplace

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results_rounds.md"
JSON = ROOT / "docs" / "results_rounds.json"
BLOCKS = 12
GOAL = 5.0  # percent of an outer step that is no unit of work

UNITS = "units of work"
RAY = "dispatch by Ray"
TRAJECTORIES = "trajectories"
LEARNER = "meta-learner"
LOG = "log"
MLFLOW = "MLflow"
CHECKPOINT = "checkpoint"
REST = "everything else"
PARTS = {
    UNITS: "in the worker, one after the other",
    RAY: "from the first unit submitted to the last contribution there, less the units",
    TRAJECTORIES: "Parquet, by the driver; that of the last unit: the others are written while the worker works",
    LEARNER: "guards, sum, Adam",
    LOG: "a line of metrics.jsonl, flushed",
    MLFLOW: "the spool of the tracker; another process delivers it",
    CHECKPOINT: "files, fsync, the oldest one removed; once in a block",
    REST: "progress, snapshot, Ray's metrics",
}


@dataclass
class Clock:
    """Seconds by part, since the last outer step was taken down."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    last_trajectory: float = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[part] += time.perf_counter() - began

        return wrapped


@contextlib.contextmanager
def stopwatches(clock: Clock) -> Iterator[None]:
    """All parts that a driver does itself, timed in ``clock``."""
    gather, keep = Session.gather, MetaTraining._keep_trajectory

    def gathered(*arguments: Any, **named: Any) -> list[Contribution]:
        began = time.perf_counter()
        contributions = gather(*arguments, **named)
        if contributions and contributions[0].unit.kind == "meta_gradient":
            spent = time.perf_counter() - began
            worked = sum(contribution.seconds for contribution in contributions)
            clock.seconds[UNITS] += worked
            clock.seconds[TRAJECTORIES] += clock.last_trajectory
            clock.seconds[RAY] += spent - worked - clock.last_trajectory
        return contributions

    def kept(*arguments: Any) -> None:
        began = time.perf_counter()
        keep(*arguments)
        clock.last_trajectory = time.perf_counter() - began

    with (
        patch.object(Session, "gather", gathered),
        patch.object(MetaTraining, "_keep_trajectory", kept),
        patch.object(MetaLearner, "apply", clock.timed(LEARNER, MetaLearner.apply)),
        patch.object(MetricsLog, "append", clock.timed(LOG, MetricsLog.append)),
        patch.object(MLflowTracker, "log_metrics", clock.timed(MLFLOW, MLflowTracker.log_metrics)),
        patch.object(meta_training, "save_checkpoint", clock.timed(CHECKPOINT, meta_training.save_checkpoint)),
        patch.object(meta_training, "prune", clock.timed(CHECKPOINT, meta_training.prune)),
        patch.object(MetricsLog, "compact", clock.timed(CHECKPOINT, MetricsLog.compact)),
    ):
        yield


def settings(blocks: int) -> RunConfig:
    """The quick preset with one worker, without tuning and, but for the ends, without selection, which is work as
    well."""
    config = load_config(ROOT / "configs" / "quick.yaml", ["inner.learning_rate=0.01", "inner.weight_decay=0.0"])
    steps = (blocks + 1) * config.checkpoint.every + 1
    return config.model_copy(
        update={
            "meta_learner": config.meta_learner.model_copy(update={"outer_steps": steps}),
            "evaluation": config.evaluation.model_copy(update={"select_every": steps}),
            "distributed": config.distributed.model_copy(update={"workers": 1}),
        }
    )


@dataclass(frozen=True)
class Rounds:
    """``blocks``: seconds by part of as many outer steps as there are between two checkpoints. ``elsewhere``: seconds
    of CPU time that other processes took in all blocks, by name."""

    steps: int  # of a block
    groups: int  # of an outer step
    blocks: list[dict[str, float]]
    elsewhere: dict[str, float]

    def share(self, *parts: str) -> list[float]:
        """What these parts take of each block, in percent."""
        return [100 * sum(block[part] for part in parts) / sum(block.values()) for block in self.blocks]

    @property
    def milliseconds(self) -> list[float]:
        """Of a mean outer step of each block."""
        return [1e3 * sum(block.values()) / self.steps for block in self.blocks]


def measure(config: RunConfig) -> Rounds:
    """One run in a temporary folder, its MLflow there too. The first block, in which everything is new, and the last
    outer step, which selects, are left out."""
    clock, every = Clock(), config.checkpoint.every
    began: list[float] = []
    parts: list[dict[str, float]] = []
    cpu: list[dict[str, float]] = []
    step = MetaTraining._sync_step

    def taken(training: MetaTraining) -> Any:
        parts.append(dict(clock.seconds))
        clock.seconds.clear()
        if len(began) % every == 0:
            cpu.append(cpu_of_others())
        began.append(time.perf_counter())
        return step(training)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
        config = config.model_copy(update={"tracking": tracking})
        progress, datasets = stack.enter_context(Progress()), load_all(config.data)
        place = stack.enter_context(
            open_workplace(
                Path(folder) / "run", resume=False, cache=cache_folder(config.data.cache), on_event=progress.event
            )
        )
        session = stack.enter_context(open_session(config, datasets, progress, threading.Event(), units.Runner))
        tracker = open_tracker(place.folder, config)
        stack.enter_context(stopwatches(clock))
        stack.enter_context(patch.object(MetaTraining, "_sync_step", taken))
        try:
            for _ in MetaTraining(session, place, tracker, None, compared=False).run():
                pass
        finally:
            tracker.close()
    # step n ends where step n + 1 begins, with the checkpoint that follows it
    whole = [after - before for before, after in pairwise(began)]
    blocks = []
    for first in range(every, len(whole) - every + 1, every):
        block: defaultdict[str, float] = defaultdict(float, dict.fromkeys(PARTS, 0.0))
        for index in range(first, first + every):
            known = parts[index + 1]
            for part in known:
                block[part] += known[part]
            block[REST] += whole[index] - sum(known.values())
        blocks.append(dict(block))
    elsewhere = {name: cpu[-1][name] - cpu[1].get(name, 0.0) for name in cpu[-1]}
    return Rounds(every, config.meta_learner.groups_per_step, blocks, elsewhere)


def cpu_of_others() -> dict[str, float]:
    """Seconds of CPU time so far of this process's descendants: those of Ray itself, and the one that delivers to
    MLflow."""
    found: defaultdict[str, float] = defaultdict(float)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            times = process.cpu_times()
            if "tracking_delivery" in words:
                found["delivery to MLflow"] += times.user + times.system
            elif "ray::" not in words:  # a worker: what it does is measured
                found["Ray's own processes"] += times.user + times.system
    return dict(found)


def table(found: Rounds) -> Cells:
    rows = []
    for part in PARTS:
        shares = found.share(part)
        milliseconds = median(1e3 * block[part] / found.steps for block in found.blocks)
        spread = f"{min(shares):.2f} to {max(shares):.2f}"
        rows.append([part, f"{milliseconds:.2f}", f"{median(shares):.2f}", spread, PARTS[part]])
    return ["part", "ms of an outer step", "% of it", "min to max", "what"], rows


def cpu_table(found: Rounds) -> Cells:
    total = sum(sum(block.values()) for block in found.blocks)
    rows = [
        [name, f"{1e3 * seconds / (len(found.blocks) * found.steps):.1f}", f"{100 * seconds / total:.2f}"]
        for name, seconds in sorted(found.elsewhere.items())
    ]
    return ["on other cores", "CPU ms of an outer step", "% of a core"], rows


def besides(found: Rounds) -> list[float]:
    """Percent of each block that is no unit of work."""
    return found.share(*(part for part in PARTS if part != UNITS))


def verdict(found: Rounds) -> str:
    shares = besides(found)
    middle = median(shares)
    word = "reached" if middle <= GOAL else "missed"
    return (
        f"{middle:.2f} % of an outer step ({min(shares):.2f} to {max(shares):.2f}) is no unit of work: the goal of "
        f"{GOAL:g} % is {word}."
    )


def page(found: Rounds) -> str:
    milliseconds = found.milliseconds
    return f"""# What an outer step takes besides its work, as measured

Written by `python -m benchmarks.rounds --write-docs` on {cpu_model()}. configs/quick.yaml, with one Ray worker
so that work and waiting do not overlap, and {found.groups} groups of tasks in an outer step; MLflow delivers to SQLite.
{len(found.blocks)} blocks of {found.steps} outer steps each, which end with a checkpoint; an outer step takes
{median(milliseconds):.0f} ms ({min(milliseconds):.0f} to {max(milliseconds):.0f}). Medians over the blocks.

**{verdict(found)}**

{markdown_table(table(found))}

What other processes take meanwhile, which on a machine with as many workers as cores is taken from the workers:

{markdown_table(cpu_table(found))}
"""


def record(found: Rounds) -> dict[str, Any]:
    return {
        "steps_of_a_block": found.steps,
        "groups_of_an_outer_step": found.groups,
        "milliseconds_of_an_outer_step": [round(value, 2) for value in found.milliseconds],
        "percent": {part: [round(value, 3) for value in found.share(part)] for part in PARTS},
        "percent_besides_units": [round(value, 3) for value in besides(found)],
        "cpu_seconds_elsewhere": {name: round(value, 2) for name, value in found.elsewhere.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds", description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"between two checkpoints each; default {BLOCKS}")
    parser.add_argument("--write-docs", action="store_true", help=f"also write docs/{PAGE.name} and docs/{JSON.name}")
    options = parser.parse_args(arguments)
    if options.blocks < 1:
        parser.error("--blocks takes 1 or more")
    found = measure(settings(options.blocks))
    console = Console(width=150)
    for cells in (table(found), cpu_table(found)):
        console.print(shown(cells))
    console.print(verdict(found))
    if options.write_docs:
        write_atomic(JSON, (json.dumps(record(found), indent=1) + "\n").encode())
        write_atomic(PAGE, page(found).encode())


if __name__ == "__main__":
    main()
