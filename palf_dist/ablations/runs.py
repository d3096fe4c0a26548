"""The meta-training runs of ablations: one after the other below one folder, on one Ray, with the learning rates and L2
strengths that were tuned for the base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from palf_dist import units
from palf_dist.ablations.config import BASE, Design
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.config import RunConfig
from palf_dist.config_loading import config_differences, load_config
from palf_dist.distributed.driver import meta_train
from palf_dist.distributed.pool import RunnerFactory
from palf_dist.distributed.session import signals_stop, size_of
from palf_dist.errors import ConfigError, PalfError
from palf_dist.evaluation.methods import check_methods
from palf_dist.memory import Plan, machine_memory
from palf_dist.policies import policy_spec
from palf_dist.progress import Progress
from palf_dist.run_directory import CONFIG, RESULTS
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.family import check_tasks

Datasets = Mapping[str, EncodedDataset]


def run_designs(
    designs: Sequence[Design],
    run_dir: Path,
    only: Collection[str] | None = None,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    make_runner: RunnerFactory = units.Runner,
) -> bool:
    """Meta-train and judge the base and the variants named in ``only`` (None: all) in their folders. What is finished
    there is left, what has begun is resumed. Whether all are finished: False where the first SIGINT or SIGTERM, or
    ``stop``, ended a run with its checkpoint; the same call goes on.

    Raises ConfigError, before any run, for unknown names, for a folder that another configuration has begun in, and for
    tasks or variants that a later run would refuse; and as ``meta_train``.
    """
    known = {design.name for design in designs}
    if unknown := sorted({*(only or ())} - known):
        raise ConfigError(f"--only: there is no {', '.join(unknown)}; there are {', '.join(sorted(known - {BASE}))}")
    wanted = [design for design in designs if only is None or design.name in {BASE, *only}]
    for design in designs:  # the report is on all that are finished
        for fold, config in design.configs.items():
            _check_begun(design.folder(run_dir, fold), config)
    left = [
        (fold, design)
        for fold in designs[0].configs
        for design in wanted  # the base comes first
        if not is_finished(design, run_dir, fold)
    ]
    shown = progress or Progress()
    stop = stop or threading.Event()
    with contextlib.ExitStack() as stack:
        if left:
            datasets = {fold: load_all(config.data) for fold, config in designs[0].configs.items()}
            _check_tasks(designs[0], datasets)
            memory = stack.enter_context(_one_ray(designs[0].config, list(datasets.values())))
            _check_memory(left, datasets, memory)
        stack.enter_context(signals_stop(stop, shown))
        for number, (fold, design) in enumerate(left, 1):
            folder = design.folder(run_dir, fold)
            shown.event(f"run {number} of {len(left)}: {folder.relative_to(run_dir)} ({design.words})")
            result = meta_train(
                design.configs[fold],
                folder,
                resume=(folder / CONFIG).exists(),
                tuned=None if design.name == BASE else _tuned(designs[0].folder(run_dir, fold)),
                stop=stop,
                progress=progress,
                make_runner=make_runner,
            )
            if result.interrupted:
                return False
    return True


def is_finished(design: Design, run_dir: Path, fold: str) -> bool:
    """Whether the run of a fold has its held-out results."""
    return (design.folder(run_dir, fold) / RESULTS).exists()


def _check_begun(folder: Path, config: RunConfig) -> None:
    if not (folder / CONFIG).exists():
        return
    differences = config_differences(load_config(folder / CONFIG), config)
    if differences:
        raise ConfigError(
            f"{folder}: began with another configuration; name another --run-dir, or undo\n" + "\n".join(differences)
        )


def _check_tasks(base: Design, datasets: Mapping[str, Datasets]) -> None:
    """Of all folds, before the first run. Variants have the base's tasks and methods."""
    problems = []
    for fold, config in base.configs.items():
        try:
            check_tasks(config, datasets[fold])
            check_methods(config, datasets[fold])
        except PalfError as error:
            problems.append(f"{_named(fold, base)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_memory(left: Sequence[tuple[str, Design]], datasets: Mapping[str, Datasets], memory: float) -> None:
    """Whether the units of all runs fit in ``memory`` bytes for each worker; what takes as much is looked at once."""
    seen, problems = [], []
    for fold, design in left:
        config = design.configs[fold]
        kind = (fold, replace(policy_spec(config.policy), seed=0), config.estimator, config.outer_loss)
        if kind in seen:
            continue
        seen.append(kind)
        try:
            Plan(config, datasets[fold], memory).check()
        except ConfigError as error:
            problems.append(f"{_named(fold, design)}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))


def _named(fold: str, design: Design) -> str:
    return f"{fold}/{design.name}" if fold else design.name


@contextlib.contextmanager
def _one_ray(config: RunConfig, datasets: Sequence[Datasets]) -> Iterator[float]:
    """Ray for all runs, where they have workers. Gives the bytes of memory that each worker can have; infinite where
    that is a GPU's, which it looks at itself."""
    distributed = config.distributed
    if distributed.workers == 0:
        yield machine_memory()
        return
    from palf_dist.distributed.cluster import connect, memory_of_each, nodes  # importing ray takes a while

    with connect(distributed, sum(map(size_of, datasets))) as share:
        yield inf if share.gpus else memory_of_each(nodes(), share, distributed.workers)


def _tuned(base: Path) -> dict[str, Any]:
    """Learning rates and L2 strengths of the base's run."""
    checkpoint = latest_checkpoint(base)
    assert checkpoint is not None, "a finished run has one"
    return {"reference": checkpoint.state["prepared"]["reference"]}
