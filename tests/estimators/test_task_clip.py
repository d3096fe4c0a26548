"""The limit on what one task adds to a meta-gradient."""

from __future__ import annotations

import numpy as np
import pytest

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig
from palf_dist.estimators import make_estimator
from palf_dist.group_work import in_parts
from palf_dist.inner_loop import InnerLoop
from palf_dist.types import TaskGroup
from tests.groups import make_group
from tests.test_inner_loop import full_policy

OUTER = OuterLossConfig(every=3)


@pytest.mark.parametrize("kind", ["adjoint", "one_step"])
def test_no_task_speaks_for_its_whole_group(kind: str) -> None:
    """What a tiny limit leaves of a task alone tells its norm, and those of all tasks the gradient of their group."""
    policy, phi = full_policy()
    group = make_group()

    def gradient(of: TaskGroup, most: float | None) -> tuple[np.ndarray, float | None]:
        loop = InnerLoop(of, policy, InnerConfig())
        estimator = make_estimator(EstimatorConfig(kind=kind, task_clip=most), OUTER)
        made = estimator.estimate(loop, phi, loop.start(), loop.steps, (0,))
        return made.gradient, made.metrics.get("clipped_share")

    alone = np.array([gradient(part, None)[0] for part in in_parts(group, group.size)])
    tiny = np.array([gradient(part, 1e-9)[0] for part in in_parts(group, group.size)])
    norms = 1e-9 * np.linalg.norm(alone, axis=1) / np.linalg.norm(tiny, axis=1)
    np.testing.assert_allclose(tiny, alone * 1e-9 / norms[:, None], rtol=1e-6)
    middle = float(np.sort(norms)[1])
    for most in (0.5 * middle, 1.01 * middle, 2 * norms.max()):
        expected = np.mean(alone * np.minimum(1, most / norms)[:, None], axis=0)
        found, share = gradient(group, most)
        np.testing.assert_allclose(found, expected, rtol=1e-8)
        assert share == pytest.approx(np.mean(norms > most))
    found, share = gradient(group, None)
    np.testing.assert_array_equal(found, gradient(group, 2 * norms.max())[0])
    assert share is None
