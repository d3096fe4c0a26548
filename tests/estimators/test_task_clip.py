"""The limit on what one task adds to a meta-gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig, PolicyConfig
from palf_dist.estimators import make_estimator
from palf_dist.estimators.adjoint import _clipped
from palf_dist.group_work import in_parts
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies import make_policy, policy_spec
from palf_dist.types import CONTROL_INDEX, CONTROLS, TaskGroup
from tests.groups import make_group
from tests.test_inner_loop import full_policy

OUTER = OuterLossConfig(every=3)


@pytest.mark.parametrize("preset", ["palf", "robust", "widened", "recurrent"])
def test_controls_that_the_policy_does_not_set_do_not_count(preset: str) -> None:
    """The norm over what it sets, found from the gradients of a policy that is its own controls."""
    spec = policy_spec(PolicyConfig(kind=preset, hidden=3, refresh=3))
    policy = make_policy(spec, torch.zeros(len(spec.features)), torch.ones(len(spec.features)))
    free = [CONTROL_INDEX[name] for name in (*spec.basis, *spec.hyperparameters)]
    cotangents = [torch.randn(4, len(CONTROLS), generator=torch.manual_seed(seed)) for seed in range(3)]
    norms = torch.stack([each[:, free] for each in cotangents]).square().sum((0, 2)).sqrt()
    most = float(norms.sort().values[2:].mean())
    clipped, share = _clipped(cotangents, policy, most)
    assert share == 0.25
    for before, after in zip(cotangents, clipped, strict=True):
        torch.testing.assert_close(after, before * (most / norms).clamp(max=1)[:, None])


@pytest.mark.parametrize("wild", [1e25, torch.inf, torch.nan])
def test_what_is_no_gradient_takes_nobody_with_it(wild: float) -> None:
    policy, _ = full_policy()
    cotangents = [torch.ones(3, len(CONTROLS)), torch.ones(3, len(CONTROLS))]
    cotangents[1][1] = wild
    clipped, share = _clipped(cotangents, policy, 1e3)
    assert share == pytest.approx(1 / 3) and all(torch.isfinite(each).all() for each in clipped)
    assert torch.equal(clipped[0][[0, 2]], cotangents[0][[0, 2]])
    norm = torch.stack(clipped).square().sum((0, 2)).sqrt()[1]
    assert float(norm) == pytest.approx(1e3 if wild == 1e25 else 0.0, rel=1e-3)


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
