from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.errors import ConfigError
from palf_dist.inner_optimisers import ADAM_EPSILON, Pace, cosine_rate, inner_optimiser

NAMES = ("sgd", "momentum", "adam")


def make_state(name: str, step: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor, Pace]:
    torch.manual_seed(step)
    theta, gradient, rate = torch.randn(2, 5).double(), torch.randn(2, 5).double(), torch.rand(2, 1).double()
    slots = tuple(torch.rand(2, 5).double() for _ in range(inner_optimiser(name).num_slots))
    return theta, slots, gradient, Pace(rate, inner_optimiser(name).corrections(step))


@pytest.mark.parametrize("name", NAMES)
@given(step=st.integers(0, 300))
def test_adjoint_is_the_transpose_of_the_update(name: str, step: int) -> None:
    optimiser = inner_optimiser(name)
    theta, slots, gradient, pace = make_state(name, step)
    leaves = [value.requires_grad_(True) for value in (gradient, *slots)]
    new_theta, new_slots = optimiser.update(theta, slots, gradient, pace)
    cotangents = [torch.randn_like(value) for value in (new_theta, *new_slots)]
    expected = torch.autograd.grad((new_theta, *new_slots), leaves, cotangents)
    with torch.no_grad():
        of_gradient, of_slots = optimiser.adjoint(cotangents[0], tuple(cotangents[1:]), slots, new_slots, pace)
    for got, want in zip((of_gradient, *of_slots), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=ADAM_EPSILON)),
    ],
)
def test_updates_are_those_of_torch(name: str, reference: object) -> None:
    optimiser = inner_optimiser(name)
    theta = torch.randn(1, 6, dtype=torch.float64)
    parameter = torch.nn.Parameter(theta.clone())
    torch_optimiser = reference([parameter])  # type: ignore[operator]
    slots = tuple(torch.zeros_like(theta) for _ in range(optimiser.num_slots))
    rate = torch.full((1, 1), 0.1).double()
    for step in range(5):
        gradient = torch.randn_like(theta)
        theta, slots = optimiser.update(theta, slots, gradient, Pace(rate, optimiser.corrections(step)))
        parameter.grad = gradient
        torch_optimiser.step()
    # adam's epsilon stands inside of the root here, outside in torch
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-5, atol=1e-5)


def test_adam_is_finite_at_zero_gradients() -> None:
    optimiser = inner_optimiser("adam")
    zero, pace = torch.zeros(1, 3), Pace(torch.ones(1, 1), optimiser.corrections(0))
    theta, slots = optimiser.update(zero, (zero, zero), zero, pace)
    of_gradient, of_slots = optimiser.adjoint(torch.ones(1, 3), (zero, zero), (zero, zero), slots, pace)
    assert all(torch.isfinite(value).all() for value in (theta, of_gradient, *of_slots))


def test_cosine_rate_falls_from_one_towards_zero() -> None:
    rates = [cosine_rate(step, 10) for step in range(10)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.05


def test_unknown_optimiser_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.optimisers: 'lion' is unknown; allowed: sgd, momentum, adam"):
        inner_optimiser("lion")
