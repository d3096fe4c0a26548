"""The autograd function: first and second derivatives, and what it hands through."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from palf_dist.losses import reference_losses
from palf_dist.mixture_loss import mixture_loss
from palf_dist.types import BASIS_LOSSES
from tests.loss_cases import LOGIT_BASIS, make_case


@pytest.mark.parametrize(
    "active", [("ce",), ("robust_ce",), ("elr",), ("info_nce",), LOGIT_BASIS, BASIS_LOSSES], ids="+".join
)
@pytest.mark.parametrize("mean", [False, True])
def test_first_and_second_derivatives(active, mean):
    case = make_case(0, tasks=1, n=5, classes=4, scale=1.0)

    def function(logits, features):
        return mixture_loss(logits, case.y[0], features, case.controls, case.context, active, mean=mean)[0]

    inputs = [a[0].clone().requires_grad_() for a in (case.z, case.h)]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_values_and_mixture():
    case = make_case(1, tasks=1)
    active = ("focal", "robust_ce")
    mixture, values = mixture_loss(case.z[0], case.y[0], None, case.controls, case.context, active)
    theirs = reference_losses(case.z, case.y, None, case.controls, case.context, active)[[1, 5], 0]
    torch.testing.assert_close(torch.cat([values[name] for name in active]), theirs)
    torch.testing.assert_close(mixture, case.controls[0, [1, 5]] @ theirs)


def test_a_third_derivative_is_refused_rather_than_wrong():
    case = make_case(2, tasks=1)
    z = case.z[0].clone().requires_grad_()
    mixture, _ = mixture_loss(z, case.y[0], None, case.controls, case.context, ("ce",))
    (first,) = torch.autograd.grad(mixture.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
