"""The meta-training runs of ablations: one after the other below one folder, on one Ray, with the learning rates and L2
strengths that were tuned for the base."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
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
from palf_dist.errors import ConfigError
from palf_dist.progress import Progress
from palf_dist.run_directory import CONFIG, RESULTS
from palf_dist.tasks.datasets import load_all


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

    Raises ConfigError for unknown names and for a folder that another configuration has begun in, before any run; and
    as ``meta_train``.
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
            stack.enter_context(_one_ray(designs[0]))
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


@contextlib.contextmanager
def _one_ray(base: Design) -> Iterator[None]:
    """Ray for all runs, where they have workers."""
    with contextlib.ExitStack() as stack:
        distributed = base.config.distributed
        if distributed.workers != 0:
            from palf_dist.distributed.cluster import connect  # importing ray takes a while

            size = sum(size_of(load_all(config.data)) for config in base.configs.values())
            stack.enter_context(connect(distributed, size))
        yield


def _tuned(base: Path) -> dict[str, Any]:
    """Learning rates and L2 strengths of the base's run."""
    checkpoint = latest_checkpoint(base)
    assert checkpoint is not None, "a finished run has one"
    return {"reference": checkpoint.state["prepared"]["reference"]}
