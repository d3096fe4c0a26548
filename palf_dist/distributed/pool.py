"""What hands units of work out and brings their contributions back: the protocol, and its in-process form."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from palf_dist.config import RunConfig
from palf_dist.errors import PalfError
from palf_dist.redaction import redact
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution, Unit, UnitRunner

RunnerFactory = Callable[[RunConfig, Mapping[str, EncodedDataset]], UnitRunner]
"""Makes what runs the units; importable by the workers under its own name."""

OnEvent = Callable[[str], None]
"""Told in one sentence whenever something happened that the user should see."""


class UnitError(PalfError):
    """A unit of work was given up after too many workers died or stalled on it; the message names it."""


class UnitBug(RuntimeError):
    """A unit of work raised something that is no user's mistake; the message names it. Shown with its traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(frozen=True, eq=False)
class Broadcast:
    """What all units of one moment share. It goes to the workers once, not with every unit."""

    policy: np.ndarray  # float32 [number of policy parameters]
    version: int
    prepared: Mapping[str, Any] = field(default_factory=dict)


class WorkerPool(Protocol):
    """Takes units in any number and gives each one's contribution once, in the order in which they are done."""

    reissued: int  # units that were issued again as their worker was lost, for whatever reason

    @property
    def alive(self) -> int:
        """Workers that are at work or ready for it."""
        ...

    @property
    def capacity(self) -> int:
        """Units worth having in flight at once, where the caller may choose; at least 1."""
        ...

    @property
    def pending(self) -> int:
        """Units submitted whose contribution has not been given yet."""
        ...

    def submit(self, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None = None) -> None: ...

    def next_completed(self, timeout: float) -> Contribution | None:
        """The next contribution, or None when there is none within ``timeout`` seconds. Mends the pool meanwhile.

        Raises UnitError or UnitBug when a unit has failed for good, and whatever PalfError a unit raised.
        """
        ...

    def close(self) -> None:
        """Abandon what is pending and free the workers."""
        ...


class InProcessPool:
    """No workers: each unit is run here, when its contribution is asked for (``distributed.workers: 0``)."""

    alive = 0
    capacity = 1
    reissued = 0

    def __init__(self, config: RunConfig, datasets: Mapping[str, EncodedDataset], make_runner: RunnerFactory) -> None:
        self._runner = make_runner(config, datasets)
        self._runner.check()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(config.distributed.threads)
        self._queue: deque[tuple[Unit, Broadcast, dict[str, np.ndarray] | None]] = deque()

    @property
    def pending(self) -> int:
        return len(self._queue)

    def submit(self, unit: Unit, broadcast: Broadcast, carried: dict[str, np.ndarray] | None = None) -> None:
        self._queue.append((unit, broadcast, carried))

    def next_completed(self, timeout: float) -> Contribution | None:
        if not self._queue:
            return None
        unit, broadcast, carried = self._queue.popleft()
        try:
            return self._runner.run(unit, broadcast.policy, broadcast.version, broadcast.prepared, carried)
        except PalfError:
            raise
        except Exception as error:
            raise UnitBug(f"{describe(unit)} failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._queue.clear()
        torch.set_num_threads(self._threads_before)


def describe(unit: Unit) -> str:
    """A unit in words, with all that is needed to run it again."""
    settings = ""
    if unit.settings:
        settings = " (" + ", ".join(f"{key} {value}" for key, value in json.loads(unit.settings).items()) + ")"
    return f"unit {unit.kind} {unit.outer_step}/{unit.group}{settings}"
