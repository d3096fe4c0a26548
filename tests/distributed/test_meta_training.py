"""The outer steps of a run against the loop that they stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from palf_dist import units
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.distributed.driver import meta_train, train_policy
from palf_dist.estimators import make_estimator
from palf_dist.inner_loop import InnerLoop
from palf_dist.meta_learner import MetaLearner
from palf_dist.tasks.datasets import load_all
from palf_dist.types import Contribution
from tests.distributed.small import small_config


@pytest.mark.parametrize(("window", "updates"), [(4, 3), (5, 3), (12, 1)])
def test_a_window_is_the_update_frequency_of_algorithm_1(window: int, updates: int, tmp_path: Path) -> None:
    """With K_meta = 4 the policy is updated T / K_meta = 3 times within an inner run of 12 steps, which goes on from
    where it is, under the new policy; T / K_meta is rounded up. Here as a loop over inner steps."""
    config = small_config(
        estimator={"window": window}, policy={"refresh": 3}, meta_learner={"outer_steps": 2 * updates}
    )
    meta_train(config, tmp_path / "run")
    kept = latest_checkpoint(tmp_path / "run")
    assert kept is not None
    prepared = kept.state["prepared"]

    work, steps = units.Runner(config, load_all(config.data)), config.inner.steps
    policy, estimator = units.learned_policy(config, prepared), make_estimator(config.estimator, config.outer_loss)
    learner = MetaLearner(config, units.initial_policy(config))
    seen = [learner.policy]
    for run in range(2):
        tasks = [work._group(("meta_gradient", config.seed, run, group), prepared) for group in range(2)]
        loops = [InnerLoop(group, policy, config.inner) for group in tasks]
        states = [loop.start() for loop in loops]
        for t in range(steps):
            if (t + 1) % window and t + 1 < steps:
                continue
            phi, made = torch.from_numpy(learner.policy.copy()), []
            for unit, loop, state in zip(units.meta_gradient_units(config, len(seen) - 1), loops, states, strict=True):
                found = estimator.estimate(loop, phi, state, t + 1, ())
                made.append(Contribution(unit, learner.version, {"outer_loss": found.outer_loss}, found.gradient))
            learner.apply(made)
            seen.append(learner.policy)
    assert len({policy.tobytes() for policy in seen}) == 2 * updates + 1, "every update is one"
    assert learner.version == int(kept.learner["counters"][0])
    np.testing.assert_allclose(kept.learner["policy"], learner.policy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("window", "selected"), [(None, [2, 4, 5]), (12, [2, 4, 5]), (6, [4, 8, 10])])
def test_windows_have_as_many_candidates_for_the_best_policy(
    window: int | None, selected: list[int], tmp_path: Path
) -> None:
    """As whole inner runs, of which there are five here."""
    steps = 5 if window is None else 5 * 12 // window
    config = small_config(estimator={"window": window}, meta_learner={"outer_steps": steps})
    assert [selection.version for selection in train_policy(config, tmp_path / "run")] == selected
