"""The hot path compiled by inductor gives what it gives as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from palf_dist import compilation
from palf_dist.config import InnerConfig, OuterLossConfig
from palf_dist.config_loading import load_config
from palf_dist.distributed.pool import InProcessPool
from palf_dist.errors import ConfigError
from palf_dist.inner_loop import InnerLoop
from palf_dist.tasks.datasets import load_all
from palf_dist.units import Runner
from tests.estimators.test_exact import estimate, relative
from tests.groups import make_group
from tests.test_inner_loop import full_policy

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own


def loops(name: str, dtype: torch.dtype = torch.float64, size: int = 3) -> tuple[InnerLoop, InnerLoop, torch.Tensor]:
    """An inner run as it is and compiled, and the policy's parameters."""
    policy, phi = full_policy()
    group = make_group(name, dtype=dtype, size=size)
    plain, compiled = (InnerLoop(group, policy, InnerConfig(compile=each)) for each in (False, True))
    return plain, compiled, phi.to(dtype)


@pytest.mark.compiles  # a compilation takes ten seconds and more
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp_deep_categorical", "conv", "transformer"])
def test_meta_gradients_are_the_same(name: str) -> None:
    plain, compiled, phi = loops(name)
    outer = OuterLossConfig(every=3, running_sum=0.4)
    got, want = estimate("adjoint", compiled, phi, outer), estimate("unroll", plain, phi, outer)
    assert relative(got.gradient, want.gradient) <= 1e-10
    assert got.outer_loss == pytest.approx(want.outer_loss, rel=1e-12)
    as_is = estimate("adjoint", plain, phi, outer)
    for name_, value in as_is.records.items():
        np.testing.assert_allclose(got.records[name_], value, rtol=1e-9, atol=1e-9, err_msg=name_)


@pytest.mark.compiles
@pytest.mark.slow
def test_groups_of_one_form_share_what_was_compiled() -> None:
    plain, compiled, phi = loops("mlp", torch.float32)
    assert relative(estimate("adjoint", compiled, phi).gradient, estimate("adjoint", plain, phi).gradient) <= 1e-5
    made = dict(compilation._COMPILED)
    again = loops("mlp", torch.float32)[1]
    first, second = (estimate("adjoint", loop, phi).gradient for loop in (compiled, again))
    np.testing.assert_array_equal(first, second)
    assert made == compilation._COMPILED


def test_no_compiler_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config(SMOKE, ["inner.compile=true"])
    with pytest.raises(ConfigError, match=r"inner\.compile: .*no-such-compiler"):
        InProcessPool(config, load_all(config.data), Runner)
