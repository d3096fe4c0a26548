"""In how many parts a unit of work is done so that its worker has the memory for it, and what to do when it runs out.

The number of parts changes the last bits of a result. It follows from the configuration and the widths of the datasets
alone (``distributed.memory_per_worker``), never from the machine: one that has less than the parts take is refused
before any work starts. Only where memory runs out all the same are there more parts, which is reported.
"""

from __future__ import annotations

import contextlib
import gc
import os
from math import floor, inf
from pathlib import Path

import torch

from palf_dist.config import RunConfig
from palf_dist.errors import ConfigError, PalfError
from palf_dist.rehearsal import Datasets, Need, Work, need, works
from palf_dist.types import Contribution

GB = 1e9
LEVERS = "lower inner.steps, set estimator.window or take a smaller architecture"
_TOLD_BY_TORCH = ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(PalfError):
    """Memory ran out with one task of a unit at a time."""


class Plan:
    """In how many parts the units of a run are done. What each kind needs is found when it is first asked for."""

    def __init__(self, config: RunConfig, datasets: Datasets, available: float = inf) -> None:
        """``available``: bytes that the machine has for each worker."""
        self._config, self._datasets, self._available = config, datasets, available
        self._needs: dict[Work, Need] = {}

    def check(self) -> None:
        """Raises ConfigError where some unit of the run can never be done in the memory there is."""
        for work, tasks in works(self._config, self._datasets).items():
            self.parts(work, tasks)

    def parts(self, work: Work, tasks: int) -> int:
        """Parts that a group of ``tasks`` tasks is done in, as the configuration states the memory of a worker. Raises
        ConfigError where that is too little for one task at a time, or the machine has less than the parts take."""
        if work not in self._needs:
            self._needs[work] = need(self._config, self._datasets, work)
        found = self._needs[work]
        parts = found.parts(tasks, self._config.distributed.memory_per_worker * GB)
        if parts is None or found.total(tasks, parts) > self._available:
            raise ConfigError(self._refusal(work, tasks, found, parts))
        return parts

    def _refusal(self, work: Work, tasks: int, found: Need, parts: int | None) -> str:
        stated, available = self._config.distributed.memory_per_worker * GB, self._available
        kind = self._config.tasks.architectures[work.architecture].kind
        divided = tasks if parts is None else parts
        needs = f"{found.total(tasks) / GB:.3g} GB"
        if divided > 1:
            needs += f", and {found.total(tasks, divided) / GB:.3g} GB in {divided} parts"
        if parts is None:
            there_is = f"a worker may take {stated / GB:g} GB (distributed.memory_per_worker)"
            remedies = ["raise that"]
        else:
            there_is = f"there are {available / GB:.3g} GB for each worker"
            remedies = ["have fewer workers on a machine"]
            if (finer := found.parts(tasks, available)) is not None:
                setting = floor(100 * available / GB) / 100
                remedies.append(
                    f"set distributed.memory_per_worker: {setting:g}, here and wherever the run shall give the same "
                    f"bytes, to have the unit done in {finer} parts"
                )
        fitting = int(min(stated, available) // (found.data + found.work))
        remedies.append(f"set tasks.group_size: {fitting}" if fitting else LEVERS)
        return (
            f"tasks.group_size: a unit of {tasks} tasks ({work.kind}, {kind}, {work.optimiser}) needs {needs}, but "
            f"{there_is}; {', or '.join(remedies)}"
        )


def machine_memory() -> float:
    """Bytes of memory that this process's machine has, or its control group where that has less."""
    most = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = Path("/sys/fs/cgroup", controllers)
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    most = min(most, float((folder / name).read_text()))
    return most


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the CPU or the GPU was too small for what raised ``error``."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD_BY_TORCH)


def release(device: torch.device) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def halved(contribution: Contribution) -> str:
    """One sentence for the user on a contribution that ran out of memory."""
    unit = contribution.unit
    return (
        f"unit {unit.kind} {unit.outer_step}/{unit.group} ran out of memory and was done in "
        f"{2**contribution.halvings} times as many parts, which may change the last bits of the result; a smaller "
        "distributed.memory_per_worker has it done in parts from the start"
    )
