"""The reference formulas against other people's code and against their definitions."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss

from palf_dist.losses import LossContext, posterior_weights, reference_losses, reference_mixture
from palf_dist.types import AVERAGED_BASIS, BASIS_LOSSES, CONTROL_INDEX, FIRST_BASIS
from tests.loss_cases import make_case

ROW = {name: index for index, name in enumerate(BASIS_LOSSES)}


def losses_of(case, active=BASIS_LOSSES):
    return reference_losses(case.z, case.y, case.h, case.controls, case.context, active)


def test_cross_entropies_are_torchs():
    case = make_case(0, padded=False)
    losses = losses_of(case)
    logits = case.z.transpose(1, 2)
    torch.testing.assert_close(losses[ROW["ce"]], torch.nn.functional.cross_entropy(logits, case.y, reduction="none"))
    for g in range(case.y.shape[0]):
        smoothing = case.controls[g, CONTROL_INDEX["eps"]].item()
        theirs = torch.nn.functional.cross_entropy(case.z[g], case.y[g], reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(losses[ROW["label_smoothing"], g], theirs)


def test_padding_changes_nothing():
    wide = make_case(1)
    for g, k in enumerate(wide.context.num_classes.int().tolist()):
        context = LossContext.create(
            wide.context.class_mask[g : g + 1, :k], wide.context.log_prior_ratio[g : g + 1, :k]
        )
        remembered = (wide.context.own_probability, wide.context.seen, wide.context.averaged[..., :k])
        context = context.with_averages(*(values[g : g + 1] for values in remembered))
        narrow = reference_losses(
            wide.z[g : g + 1, :, :k],
            wide.y[g : g + 1],
            wide.h[g : g + 1],
            wide.controls[g : g + 1],
            context,
            BASIS_LOSSES,
        )
        torch.testing.assert_close(losses_of(wide)[:, g], narrow[:, 0])


def test_info_nce_is_the_supervised_contrastive_loss():
    case = make_case(2, n=12)
    tau = 0.3
    ours = losses_of(case.with_controls(tau=tau))[ROW["info_nce"]]
    for g in range(case.y.shape[0]):
        y = case.y[g]
        with_positive = (y[:, None] == y).sum(1) > 1
        theirs = SupConLoss(temperature=tau)(case.h[g], y)
        # the peer leaves out examples without a positive and normalises without our floor of 1e-6
        torch.testing.assert_close(ours[g][with_positive].mean(), theirs, rtol=1e-5, atol=1e-6)
        assert (ours[g][~with_positive] == 0).all()


def test_focal_symmetric_and_robust_by_their_definitions():
    case = make_case(3, padded=False)
    losses = losses_of(case)
    control = {name: case.controls[:, index, None] for name, index in CONTROL_INDEX.items()}
    own = torch.softmax(case.z, -1).gather(-1, case.y[..., None])[..., 0]
    torch.testing.assert_close(losses[ROW["focal"]], -((1 - own) ** control["gamma"]) * own.log())
    symmetric = control["a"] * -own.log() + control["b"] * 4 * (1 - own)
    torch.testing.assert_close(losses[ROW["symmetric_ce"]], symmetric)
    prior = torch.exp(control["la"] * case.context.log_prior_ratio)[:, None, :]
    weighed = torch.softmax(case.z, -1) * prior
    r = (weighed / weighed.sum(-1, keepdim=True)).gather(-1, case.y[..., None])[..., 0]
    corrected = -torch.log((1 - control["e"]) * r + control["e"] / 5)
    weights = posterior_weights(case.context, control["ew"])
    torch.testing.assert_close(losses[ROW["robust_ce"]], weights * corrected)
    q, ew = case.context.own_probability, control["ew"]
    belief = torch.where(case.context.seen, (1 - ew) * q / ((1 - ew) * q + ew / 5), 0.5)
    torch.testing.assert_close(weights, belief / belief.mean(1, keepdim=True))


def test_robust_without_its_corrections_is_cross_entropy():
    case = make_case(4, posterior=False).with_controls(e=0.0, la=0.0)
    losses = losses_of(case)
    torch.testing.assert_close(losses[ROW["robust_ce"]], losses[ROW["ce"]])


def test_generalised_absolute_early_learning_and_bootstrap_by_their_definitions():
    case = make_case(8)
    losses = losses_of(case)
    p = torch.softmax(case.z.masked_fill(~case.context.class_mask[:, None], -torch.inf), -1)
    own = p.gather(-1, case.y[..., None])[..., 0]
    q, lam = (case.controls[:, CONTROL_INDEX[name], None] for name in ("q", "lam"))
    torch.testing.assert_close(losses[ROW["generalised_ce"]], (1 - own**q) / q)
    one_hot = torch.nn.functional.one_hot(case.y, p.shape[-1])
    torch.testing.assert_close(losses[ROW["mae"]], (one_hot - p).abs().sum(-1))
    targets = case.context.averaged * case.context.seen[..., None]
    assert 0 < case.context.seen.sum() < case.context.seen.numel()
    term = torch.log(1 - (1 - 1e-4) * (p * targets).sum(-1))
    torch.testing.assert_close(losses[ROW["elr"]], -own.log() + lam * term)
    beta = case.controls[:, CONTROL_INDEX["beta"], None, None]
    mixed = torch.where(case.context.seen[..., None], beta * one_hot + (1 - beta) * targets, one_hot.double())
    torch.testing.assert_close(losses[ROW["bootstrap"]], -torch.special.xlogy(mixed, p).sum(-1))


def test_generalised_cross_entropy_lies_between_cross_entropy_and_half_the_absolute_error():
    case = make_case(9)
    losses = losses_of(case.with_controls(q=1.0))
    torch.testing.assert_close(losses[ROW["generalised_ce"]], losses[ROW["mae"]] / 2)
    losses = losses_of(case.with_controls(q=0.0))  # floored
    torch.testing.assert_close(losses[ROW["generalised_ce"]], losses[ROW["ce"]], rtol=0.05, atol=0)
    assert (losses[ROW["generalised_ce"]] < losses[ROW["ce"]]).all()


@pytest.mark.parametrize("name", AVERAGED_BASIS)
def test_without_averages_or_before_the_first_it_is_cross_entropy(name):
    case = make_case(10)
    unseen = case.context.with_averages(
        case.context.own_probability, torch.zeros_like(case.context.seen), case.context.averaged
    )
    for context in (make_case(10, posterior=False).context, unseen):
        losses = reference_losses(case.z, case.y, case.h, case.controls, context, ("ce", name))
        assert torch.equal(losses[ROW[name]], losses[ROW["ce"]])


@pytest.mark.parametrize("name", AVERAGED_BASIS)
def test_it_pulls_towards_what_was_predicted_before(name):
    """Of an example whose averaged prediction is another class than its label, the pull of the label is less."""
    case = make_case(11, padded=False)
    other = (case.y + 1) % 5
    averaged = torch.nn.functional.one_hot(other, 5).double()
    context = case.context.with_averages(case.context.own_probability, torch.ones_like(case.context.seen), averaged)
    z = torch.zeros_like(case.z).requires_grad_()
    slopes = {}
    for each in ("ce", name):
        loss = reference_losses(z, case.y, case.h, case.controls, context, (each,))[ROW[each]].sum()
        slopes[each] = torch.autograd.grad(loss, z)[0].gather(-1, other[..., None])
    assert (slopes[name] < slopes["ce"]).all()


def test_inactive_rows_are_zero_and_the_mixture_is_the_weighted_mean():
    case = make_case(5)
    losses = losses_of(case, ("ce", "robust_ce"))
    for name in set(BASIS_LOSSES) - {"ce", "robust_ce"}:
        assert (losses[ROW[name]] == 0).all()
    mixture = reference_mixture(case.z, case.y, case.h, case.controls, case.context, ("ce", "robust_ce"))
    by_hand = case.controls[:, 0] * losses[0].mean(1) + case.controls[:, 5] * losses[5].mean(1)
    torch.testing.assert_close(mixture, by_hand)


def test_basis_losses_that_came_later_do_not_change_the_bits_of_mixtures_without_them():
    """Each is summed as it was when the first six were all; on some processors another order has other bits."""
    active = ("ce", "focal", "symmetric_ce", "robust_ce")
    for dtype in (torch.float32, torch.float64):
        case = make_case(12, tasks=40, n=9).to(dtype)
        controls = case.controls.clone()
        controls[:, len(FIRST_BASIS) : len(BASIS_LOSSES)] = 0
        losses = reference_losses(case.z, case.y, case.h, controls, case.context, active)
        mixture = reference_mixture(case.z, case.y, case.h, controls, case.context, active)
        first = controls[:, : len(FIRST_BASIS)].contiguous()
        assert torch.equal(mixture, torch.einsum("gk,kgn->g", first, losses[: len(FIRST_BASIS)]) / 9)
        active = (*active, "generalised_ce", "mae", "elr")  # which came together
        controls = case.controls.clone()
        controls[:, BASIS_LOSSES.index("bootstrap")] = 0
        losses = reference_losses(case.z, case.y, case.h, controls, case.context, active)
        mixture = reference_mixture(case.z, case.y, case.h, controls, case.context, active)
        then = [torch.einsum("gk,kgn->g", controls[:, a:b], losses[a:b]) for a, b in ((0, 6), (6, 9))]
        assert torch.equal(mixture, (then[0] + then[1]) / 9)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("adjusted", [True, False])
def test_context_flags(padded, adjusted):
    context = make_case(6, padded=padded, adjusted=adjusted).context
    assert (context.padding is not None, context.adjusted) == (padded, adjusted)
    torch.testing.assert_close(context.uniform.sum(-1), torch.ones(3, 1, dtype=torch.float64))


def test_posterior_weights_do_not_differentiate_the_averages():
    case = make_case(7)
    q = case.context.own_probability.clone().requires_grad_()
    ew = torch.full((3, 1), 0.4, dtype=torch.float64, requires_grad=True)
    weights = posterior_weights(case.context.with_averages(q, case.context.seen), ew)
    (weights**2).sum().backward()
    assert q.grad is None and ew.grad.abs().min() > 0
