"""Closed forms against autograd of the reference formulas, and finiteness at extreme inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.loss_head import LossHead
from palf_dist.losses import reference_losses, reference_mixture
from palf_dist.randomness import random_generator
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX
from tests.loss_cases import LOGIT_BASIS, LossCase, make_case

SUBSETS = [(name,) for name in BASIS_LOSSES] + [
    LOGIT_BASIS,
    BASIS_LOSSES,
    ("label_smoothing", "robust_ce"),
    ("generalised_ce", "elr"),
    ("label_smoothing", "elr", "bootstrap"),
]


def directions(case: LossCase, seed: int):
    rng = random_generator("direction", seed)
    return tuple(torch.from_numpy(rng.normal(size=a.shape)).to(a.dtype) for a in (case.z, case.h))


def autograd_of_reference(case: LossCase, active, z_dot, h_dot):
    """Gradients, their directional derivatives, dcontrols and control_gradient, all by double backward."""
    z, h, controls = (a.clone().requires_grad_() for a in (case.z, case.h, case.controls))
    mixture = reference_mixture(z, case.y, h, controls, case.context, active).sum()
    everything = dict(allow_unused=True, materialize_grads=True)
    dz, dh, dvalue = torch.autograd.grad(mixture, (z, h, controls), create_graph=True, **everything)
    along = (dz * z_dot).sum() + (dh * h_dot).sum()
    if not along.requires_grad:
        return dz, dh, dvalue, *(torch.zeros_like(a) for a in (z, h, controls))
    return dz, dh, dvalue, *torch.autograd.grad(along, (z, h, controls), **everything)


def check_closed_forms(case: LossCase, active, seed=0, tolerance=1e-10):
    z_dot, h_dot = directions(case, seed)
    dz, dh, dvalue, dz_dot, dh_dot, dcontrols = autograd_of_reference(case, active, z_dot, h_dot)
    head = LossHead(active)
    tape = head.forward(case.z, case.y, case.h, case.controls, case.context)

    def close(ours, theirs, what):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")

    close(tape.losses, reference_losses(case.z, case.y, case.h, case.controls, case.context, active), "values")
    close(tape.dlogits, dz, "dlogits")
    our_dz_dot, our_dh_dot, our_dcontrols = head.tangent(tape, z_dot, h_dot)
    close(our_dz_dot, dz_dot, "dlogits tangent")
    close(our_dcontrols, dcontrols, "dcontrols")
    close(head.control_gradient(tape), dvalue, "control gradient")
    if "info_nce" in active:
        close(tape.dfeatures, dh, "dfeatures")
        close(our_dh_dot, dh_dot, "dfeatures tangent")
    else:
        assert tape.dfeatures is None and our_dh_dot is None


@pytest.mark.parametrize("active", SUBSETS, ids="+".join)
@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("posterior", [True, False])
def test_closed_forms(active, adjusted, posterior):
    check_closed_forms(make_case(0, adjusted=adjusted, posterior=posterior), active)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    tasks=st.integers(1, 4),
    n=st.integers(1, 9),
    classes=st.integers(2, 7),
    scale=st.sampled_from([0.0, 0.3, 2.0, 6.0]),
    padded=st.booleans(),
    adjusted=st.booleans(),
    posterior=st.booleans(),
    active=st.sampled_from(SUBSETS),
)
def test_closed_forms_everywhere(seed, tasks, n, classes, scale, padded, adjusted, posterior, active):
    case = make_case(seed, tasks, n, classes, scale, padded, adjusted, posterior)
    check_closed_forms(case, active, seed)


@pytest.mark.parametrize(
    "controls",
    [
        dict(e=0.0),
        dict(e=0.999),
        dict(ew=0.0),
        dict(ew=1.0),
        dict(la=0.0),
        dict(gamma=0.0),
        dict(gamma=1.0),
        dict(eps=1.0),
        dict(q=0.0),
        dict(q=1.0),
        dict(lam=0.0),
        dict(beta=0.0),
        dict(beta=1.0),
    ],
    ids=str,
)
def test_closed_forms_at_the_edges_of_the_controls(controls):
    check_closed_forms(make_case(1).with_controls(**controls), BASIS_LOSSES)


def test_closed_forms_where_the_floors_hold():
    case = make_case(2, n=6)
    z = case.z.clone()
    z[0, 0, case.y[0, 0]] += 30  # 1 - p_y below the focal floor
    averaged = torch.softmax(
        z.masked_fill(~case.context.class_mask[:, None], -torch.inf), -1
    )  # 1 - <p, t> far below its floor where p_y is 1
    context = case.context.with_averages(
        case.context.own_probability * 1e-8, torch.ones_like(case.context.seen), averaged
    )
    floors = LossCase(z, case.y, case.h, case.controls, context).with_controls(ew=0.999)  # batch mean below its floor
    check_closed_forms(floors, BASIS_LOSSES)


def test_padded_classes_get_no_gradient_whatever_is_in_them():
    case = make_case(4)
    padding = ~case.context.class_mask[:, None, :].expand_as(case.z)
    assert padding.any()
    z_dot, h_dot = directions(case, 0)
    head, results = LossHead(BASIS_LOSSES), []
    for junk in (0.0, 1e4):
        z = case.z.masked_fill(padding, junk)
        tape = head.forward(z, case.y, case.h, case.controls, case.context)
        tangent = head.tangent(tape, z_dot.masked_fill(padding, junk), h_dot)
        assert (tape.dlogits[padding] == 0).all() and (tangent[0][padding] == 0).all()
        results.append((tape.losses, tape.dlogits, *tangent, head.control_gradient(tape)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


EXTREMES = {
    "right with p = 1": lambda case: (own_logit(case, 1e4), case.h),
    "wrong with p = 0": lambda case: (own_logit(case, -1e4), case.h),
    "huge logits": lambda case: (case.z.sign() * 1e4, case.h),
    "zero logits": lambda case: (case.z * 0, case.h),
    "zero features": lambda case: (case.z, case.h * 0),
    "huge features": lambda case: (case.z, case.h * 1e6),
    "equal features": lambda case: (case.z, torch.ones_like(case.h)),
    "ordinary": lambda case: (case.z, case.h),
}


def own_logit(case, value):
    return torch.zeros_like(case.z).scatter(-1, case.y[..., None], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
@settings(deadline=None, max_examples=10, derandomize=True, database=None)
@given(
    n=st.sampled_from([1, 2, 6]),
    one_class=st.booleans(),
    e=st.sampled_from([0.0, 1e-8, 0.3, 0.9999]),
    ew=st.sampled_from([0.0, 0.4, 1.0]),
    la=st.sampled_from([0.0, 1.5]),
    gamma=st.sampled_from([0.0, 0.5, 1.7, 3.3]),
    q=st.sampled_from([0.0, 0.3, 1.0]),
    own=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
def test_extreme_inputs_stay_finite(dtype, extreme, n, one_class, e, ew, la, gamma, q, own):
    case = make_case(5, n=n, posterior=False).with_controls(e=e, ew=ew, la=la, gamma=gamma, tau=0.05, q=q, lam=20.0)
    y = torch.zeros_like(case.y) if one_class else case.y
    context = case.context
    if own is not None:
        rest = (context.class_mask / (context.num_classes[:, None] - 1))[:, None, :].expand_as(case.z) * (1 - own)
        averaged = rest.scatter(-1, y[..., None], own)
        probability = torch.full(y.shape, own, dtype=torch.float64)
        context = context.with_averages(probability, torch.ones_like(y, dtype=torch.bool), averaged)
    case = LossCase(case.z, y, case.h, case.controls, context)
    z, h = EXTREMES[extreme](case)
    case = LossCase(z, y, h, case.controls, context).to(dtype)
    z_dot, h_dot = directions(case, 1)
    head = LossHead(BASIS_LOSSES)
    tape = head.forward(case.z, case.y, case.h, case.controls, case.context)
    results = dict(losses=tape.losses, dlogits=tape.dlogits, dfeatures=tape.dfeatures)
    results |= dict(zip(("dlogits_dot", "dfeatures_dot", "dcontrols"), head.tangent(tape, z_dot, h_dot), strict=True))
    results["control_gradient"] = head.control_gradient(tape)
    for name, value in results.items():
        assert value.isfinite().all(), name
    lowest = torch.zeros(len(BASIS_LOSSES), 1, 1, dtype=dtype)
    lowest[BASIS_LOSSES.index("elr")] = 20 * math.log(1e-4)
    assert (tape.losses >= 1.001 * lowest - 1e-6).all()
    for name, value in zip(
        ("reference dlogits", "reference dfeatures", "reference control gradient", "dz_dot", "dh_dot", "dcontrols"),
        autograd_of_reference(case, BASIS_LOSSES, z_dot, h_dot),
        strict=True,
    ):
        assert value.isfinite().all(), name


def test_float32_agrees_with_float64():
    case = make_case(6, tasks=4, n=32, classes=10)
    z_dot, h_dot = directions(case, 2)
    head = LossHead(BASIS_LOSSES)
    exact = head.tangent(head.forward(case.z, case.y, case.h, case.controls, case.context), z_dot, h_dot)
    low = case.to(torch.float32)
    rough = head.tangent(head.forward(low.z, low.y, low.h, low.controls, low.context), z_dot.float(), h_dot.float())
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_the_l2_multiplier_is_no_business_of_the_losses():
    case = make_case(7)
    head = LossHead(BASIS_LOSSES)
    tape = head.forward(case.z, case.y, case.h, case.controls, case.context)
    assert (head.control_gradient(tape)[:, CONTROL_INDEX["wd"]] == 0).all()
    assert (head.tangent(tape, *directions(case, 3))[2][:, CONTROL_INDEX["wd"]] == 0).all()
