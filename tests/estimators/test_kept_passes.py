"""The forward passes that the adjoint keeps for its walk back, and those that it makes again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig
from palf_dist.estimators import adjoint
from palf_dist.estimators.adjoint import Adjoint, held
from palf_dist.estimators.base import Recorder
from palf_dist.inner_loop import InnerLoop
from tests.groups import make_group
from tests.test_inner_loop import full_policy

OUTER = OuterLossConfig(every=3, running_sum=0.4)


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "transformer"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_made_again_they_are_the_same(name: str, optimiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group(name, optimiser), policy, InnerConfig())

    def run(limit: float) -> tuple[np.ndarray, set[bool]]:
        monkeypatch.setattr(adjoint, "KEPT", limit)
        estimator, state = Adjoint(EstimatorConfig(), OUTER), loop.start()
        recorder = Recorder(loop, OUTER, state, loop.steps)
        kept = {step.passed is not None for step in estimator._forward(loop, phi, state, loop.steps, recorder).steps}
        return Adjoint(EstimatorConfig(), OUTER).estimate(loop, phi, loop.start(), loop.steps, (0,)).gradient, kept

    (with_them, kept), (without, none) = run(1e9), run(0)
    assert kept == {True} and none == {False}
    np.testing.assert_allclose(with_them, without, rtol=1e-12, atol=1e-15)


def test_passes_that_autograd_knows_are_never_kept() -> None:
    policy, phi = full_policy()
    loop = InnerLoop(make_group("module"), policy, InnerConfig())
    assert held(loop.step(loop.start(), phi).passed) == float("inf")


def test_each_storage_counts_once() -> None:
    tensor = torch.zeros(10)
    assert held([tensor, tensor[:2]], {"a": tensor.view(2, 5)}, None, 1.0) == 40
    assert held(tensor, torch.zeros(3)) == 52
