"""A meta-training that sees a pool of tasks: which they are, and that they are the same each time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from palf_dist import units
from palf_dist.ablations.report import tasks_seen
from palf_dist.config import RunConfig
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.types import Contribution
from tests.distributed.small import small_config
from tests.test_units import data, prepared, same

__all__ = ["data", "prepared"]


def test_a_pool_gives_the_same_tasks_again_and_is_part_of_what_there_is_without_one(
    data: tuple[RunConfig, dict[str, EncodedDataset]], prepared: dict[str, Any]
) -> None:
    """Four outer steps of two groups."""
    config, datasets = data
    phi = units.initial_policy(config)

    def trained(pool: int | None) -> list[Contribution]:
        tasks = config.tasks.model_copy(update={"pool": pool})
        work = units.Runner(config.model_copy(update={"tasks": tasks}), datasets)
        steps = [unit for step in range(4) for unit in units.meta_gradient_units(config, step)]
        return [work.run(unit, phi, 0, prepared) for unit in steps]

    whole = trained(None)
    assert all(same(a, b) for a, b in zip(trained(8), whole, strict=True)), "all there are"
    for pool in (1, 3):
        some = trained(pool)
        for index, contribution in enumerate(some):
            assert np.array_equal(contribution.gradient, whole[index % pool].gradient)
        assert not np.array_equal(whole[pool].gradient, whole[0].gradient)


@given(
    pool=st.none() | st.integers(1, 12),
    steps=st.integers(1, 8),
    at_once=st.integers(1, 3),
    window=st.none() | st.integers(1, 12),
)
def test_tasks_seen_are_what_units_train_on(pool: int | None, steps: int, at_once: int, window: int | None) -> None:
    config = small_config(
        tasks={"pool": pool},
        meta_learner={"outer_steps": steps, "groups_per_step": at_once},
        estimator={"window": window},
    )
    trained = set()
    for unit in (unit for step in range(steps) for unit in units.meta_gradient_units(config, step)):
        run = json.loads(unit.settings)["run"] if unit.settings else unit.outer_step
        trained.add(units.drawn_as(config, run, unit.group))
    assert tasks_seen(config) == len(trained) * config.tasks.group_size


def test_all_windows_of_a_run_have_its_tasks_in_a_pool_too(data: tuple[RunConfig, dict[str, EncodedDataset]]) -> None:
    config, _ = data
    windowed = config.model_copy(update={"estimator": config.estimator.model_copy(update={"window": 5})})
    runs = [units.meta_gradient_units(windowed, step)[0].settings for step in range(4)]
    assert units.windows(windowed) == 3 and units.windows(config) == 1
    assert runs == [f'{{"run":{run},"window":{window}}}' for run, window in ((0, 0), (0, 1), (0, 2), (1, 0))]
    pooled = windowed.model_copy(update={"tasks": config.tasks.model_copy(update={"pool": 3})})
    assert [units.drawn_as(pooled, *divmod(index, 2)) for index in range(6)] == [(0, 0), (0, 1), (1, 0)] * 2
