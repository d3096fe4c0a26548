"""The hot path on another device than the CPU, as far as a machine without one can tell: on "meta" tensors, which hold
no numbers but refuse to meet CPU tensors in arithmetic."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from palf_dist.config import EstimatorConfig, InnerConfig, OuterLossConfig
from palf_dist.estimators.adjoint import Adjoint
from palf_dist.estimators.base import Recorder
from palf_dist.inner_loop import InnerLoop
from tests.groups import make_group
from tests.test_inner_loop import full_policy


def elsewhere(value: Any) -> Any:
    """``value`` with every tensor in it replaced by an empty one of the same shape on another device."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        return type(value)(elsewhere(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: elsewhere(getattr(value, item.name)) for item in fields(value)})
    return value


@pytest.mark.parametrize("name", ["mlp", "mlp_deep_categorical", "conv", "resnet", "transformer"])
def test_no_tensor_of_the_hot_path_stays_on_the_cpu(name: str) -> None:
    policy, phi = full_policy()
    policy.shield = 0.5
    loop = InnerLoop(make_group(name, steps=4, dtype=torch.float32), policy, InnerConfig())
    loop.group = elsewhere(loop.group)
    for part in ("_rows", "parts", "_facts", "_probes"):
        setattr(loop, part, elsewhere(getattr(loop, part)))
    state = loop.start()
    phi = elsewhere(phi.float())
    along = {"entropy": 0.1, "total_variation": 0.1, "stability": 0.1}
    outer = OuterLossConfig(every=3, running_sum=0.5, information=0.5, gamma=0.1, **along)
    adjoint = Adjoint(EstimatorConfig(), outer)
    recorder = Recorder(loop, outer, state, loop.steps)
    trace = adjoint._forward(loop, phi, state, loop.steps, recorder)
    with torch.no_grad():
        cotangents = adjoint._walk_back(loop, 0, state.slots, trace, recorder.complexity_cotangents())
    tensors = [state.theta, *state.slots, *cotangents, recorder.objective(), trace.states[-1], trace.controls[-1]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert state.theta.shape == (3, loop.group.model.num_parameters)
