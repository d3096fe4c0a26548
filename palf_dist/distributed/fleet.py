"""What really runs the units, as a Dispatcher sees it: Ray's actors, or simulated workers under a virtual clock.

A fleet starts, asks and kills; it decides nothing and never waits for longer than it is told to.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from palf_dist.distributed.pool import Broadcast
from palf_dist.types import Contribution, Unit

Handle = Any
"""A worker, as its fleet names it."""

Answer = Any
"""What a worker has been asked for and may not have given yet; hashable, and no two are equal."""


class WorkerDied(Exception):
    """The worker is gone, or nobody can tell what became of it; the message says what is known.

    ``for_memory``: it was killed as its node ran out of memory.
    """

    def __init__(self, message: str, *, for_memory: bool = False) -> None:
        super().__init__(message)
        self.for_memory = for_memory

    @property
    def cause(self) -> str:
        """The message's last line, which names the exception where there was one."""
        return str(self).strip().rpartition("\n")[2].strip()


class WorkerRaised(Exception):
    """The worker lives and what it was asked for raised ``cause``."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


@dataclass(frozen=True)
class Ready:
    """The first answer of every worker: it is ready for work."""

    pid: int
    node: str = ""  # where it is, as ``Fleet.nodes`` names it


class Fleet(Protocol):
    """Workers and their answers. None of the calls may block but ``wait``."""

    grows: bool
    """Whether workers that wait for room may make some: there may be an autoscaler."""

    @property
    def each(self) -> str:
        """What every worker takes of the cluster, in words."""
        ...

    def start(self, number: int) -> tuple[Handle, Answer]:
        """A new worker, called ``number`` in messages, and its answer Ready. It may have to wait for room."""
        ...

    def run(
        self,
        handle: Handle,
        unit: Unit,
        broadcast: Broadcast,
        carried: dict[str, np.ndarray] | None,
        halvings: int,
    ) -> Answer:
        """Have a worker that is ready run one unit; the answer is its contribution. ``halvings``: as for UnitRunner."""
        ...

    def wait(self, answers: Collection[Answer], timeout: float) -> list[Answer]:
        """Those of ``answers`` that are there, as soon as there are any; none after ``timeout`` seconds. Where no
        answers are waited for, it is the time alone."""
        ...

    def take(self, answer: Answer) -> Ready | Contribution:
        """An answer that is there. Raises WorkerDied or WorkerRaised."""
        ...

    def kill(self, handle: Handle) -> None:
        """End a worker at once, whatever it is doing and whether it lives or not. Nobody asks for its answer again."""
        ...

    def room(self) -> int:
        """How many workers there could be now, those that there are included."""
        ...

    def nodes(self) -> set[str]:
        """The nodes that a worker may stay on: those that are there, but for those that will soon be gone, as they are
        drained by hand or by an autoscaler, or about to be preempted."""
        ...

    def clock(self) -> float:
        """Seconds from an arbitrary moment on; never goes back."""
        ...
