"""What the controls of the learned policy play: is it the state that it is good for?

Both are what the policy was seen to ask for in whole inner runs, before its shield: on tasks of the training datasets,
or on the other held-out tasks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import RunConfig
from palf_dist.policies import LearnedPolicy, RecordedSchedule
from palf_dist.randomness import random_generator
from palf_dist.tasks.family import Datasets, sample_specs, whole_turns
from palf_dist.types import TaskSpec

SCHEDULE_GROUPS = 4  # training task groups that policy_schedule is averaged over

Record = Callable[[str, Sequence[TaskSpec], LearnedPolicy, Tensor, Mapping[str, Any]], np.ndarray]
"""(kind of work, tasks, policy, phi, prepared) -> the controls [R, G, U] that the policy asks for at each refresh."""


class PolicyControls:
    """Makes the schedules of ``policy_schedule`` and ``policy_shuffled``."""

    def __init__(self, config: RunConfig, datasets: Datasets, record: Record) -> None:
        """``record`` holds one group of tasks at a time, and none when it returns."""
        self._config, self._datasets, self._record = config, datasets, record
        self._means: dict[tuple[bytes, str], np.ndarray] = {}  # by policy and preparation

    def schedule(
        self,
        control: Literal["shuffled", "schedule"],
        group: int,
        specs: Sequence[TaskSpec],
        policy: LearnedPolicy,
        phi: Tensor,
        prepared: Mapping[str, Any],
    ) -> RecordedSchedule:
        """What the held-out tasks ``specs``, those of group number ``group``, train under."""
        if control == "shuffled":
            table = self._record("evaluate", specs, policy, phi, prepared)[:, partners(specs, group)]
        else:
            table = np.repeat(self._mean(policy, phi, prepared)[:, None], len(specs), 1)
        return RecordedSchedule(torch.from_numpy(table).to(phi), self._config.inner.steps, policy)

    def _mean(self, policy: LearnedPolicy, phi: Tensor, prepared: Mapping[str, Any]) -> np.ndarray:
        """The mean [R, U] over tasks of the training datasets; made once."""
        key = (phi.cpu().numpy().tobytes(), json.dumps(prepared, sort_keys=True))
        if key not in self._means:
            drawn = [
                sample_specs(self._config, self._datasets, ("schedule", self._config.seed, index), index)
                for index in range(whole_turns(self._config, SCHEDULE_GROUPS))
            ]
            runs = [self._record("train", specs, policy, phi, prepared) for specs in drawn]
            self._means[key] = np.concatenate(runs, 1).mean(1)
        return self._means[key]


def partners(specs: Sequence[TaskSpec], group: int) -> np.ndarray:
    """Whose controls each task of a held-out group gets: a permutation [G] that is random but for this. No task has its
    own, and none those of its own dataset and noise rate, which are nearly its own, as long as no such cell holds more
    than half of the group."""
    cells = Counter((spec.dataset, spec.noise_rate) for spec in specs)
    random = random_generator("shuffled states", group)
    rank = dict(zip(cells, random.permutation(len(cells)).tolist(), strict=True))
    tasks = random.permutation(len(specs)).tolist()
    order = np.array(sorted(tasks, key=lambda task: rank[specs[task].dataset, specs[task].noise_rate]))
    largest = max(cells.values())
    found = np.empty_like(order)
    found[order] = np.roll(order, largest if largest < len(specs) else 1)  # past the end of every cell
    return found
