"""The Lyapunov shield: V is the reference loss l_ref, plain cross-entropy, and alpha is mixed towards it by the least
amount that keeps the descent condition <grad l_alpha, grad l_ref> >= kappa ||grad l_ref||^2.

With an L-smooth V it makes every gradient step theta - rate * grad l_alpha of rate <= 2 kappa ||grad l_ref||^2 /
(L ||grad l_alpha||^2) one that does not raise V. The gradients are of the losses alone and on the minibatch at hand:
decoupled weight decay (wd) is no part of them, nor is what an optimiser makes of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palf_dist.loss_head import LossHead
from palf_dist.losses import LossContext
from palf_dist.types import BASIS_LOSSES, BASIS_PARTS, CONTROL_INDEX, NUM_BASIS, InnerModel

REFERENCE = CONTROL_INDEX["ce"]


def least_mixing(alpha: Tensor, products: Tensor, kappa: float) -> Tensor:
    """The least m [G] in [0, 1] for which (1 - m) alpha + m e_ref meets the descent condition; 0 where alpha does.

    Closed form, since the gradient of l_alpha is linear in alpha: with a = <grad l_alpha, grad l_ref> and
    r = ||grad l_ref||^2, (1 - m) a + m r = kappa r. No mixing where the gradients are not finite.

    Args:
        alpha: mixture weights [G, K].
        products: <grad l_k, grad l_ref> [G, K]; r is its column of the reference.
        kappa: in (0, 1], so that the reference itself meets the condition.
    """
    own = torch.stack([(alpha * products)[:, part].sum(1) for part in BASIS_PARTS]).sum(0)
    reference = products[:, REFERENCE]
    missing = kappa * reference - own
    acts = (missing > 0) & missing.isfinite()
    return torch.where(acts, missing / (reference - own), 0.0).clamp(max=1.0)


def mix(controls: Tensor, mixing: Tensor) -> Tensor:
    """Controls [G, U] with alpha mixed towards the reference by mixing [G]: (1 - m) alpha + m e_ref, which is linear in
    alpha, as m is a constant for every gradient. Hyper-parameters stay as they are."""
    m = mixing[:, None]
    vertex = torch.zeros_like(controls[:1, :NUM_BASIS])
    vertex[:, REFERENCE] = 1
    return torch.cat([(1 - m) * controls[:, :NUM_BASIS] + m * vertex, controls[:, NUM_BASIS:]], 1)


@torch.no_grad()
def reference_products(
    model: InnerModel,
    head: LossHead,
    theta: Tensor,
    outputs: tuple[Tensor, Tensor, Any],
    labels: Tensor,
    controls: Tensor,
    context: LossContext,
) -> Tensor:
    """<grad l_k, grad l_ref> [G, K] with respect to theta [G, P] on one minibatch, for all basis losses of ``head`` at
    once: their derivatives along grad l_ref, by one backward and one tangent pass. 0 for the others.

    Args:
        outputs: what ``model.forward`` returned for the minibatch: logits [G, B, C], features [G, B, D] and its tape.
        labels: [G, B]. controls: [G, U], of which only the hyper-parameters count.
    """
    assert BASIS_LOSSES[REFERENCE] in head.active, "the shield needs the reference among the basis losses"
    logits, features, tape = outputs
    at_reference = mix(controls, torch.ones_like(controls[:, 0]))
    evaluated = head.forward(logits, labels, features, at_reference, context)
    gradient = model.backward(theta, tape, evaluated.dlogits, evaluated.dfeatures)
    logits_dot, features_dot, _ = model.tangent(theta, tape, gradient)
    return head.tangent(evaluated, logits_dot, features_dot)[2][:, :NUM_BASIS]
