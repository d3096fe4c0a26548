"""The Hessian trace of a loss in the parameters of anybody's model, of which nothing is known but the graph behind its
logits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from palf_dist.training_state import HUTCHINSON_ROWS, hutchinson_probes


def parameters_behind(z: Tensor) -> list[Tensor]:
    """The parameters that ``z`` was computed from, each once, in an order that the graph alone determines.

    Raises:
        RuntimeError: the graph allows no backward pass besides the one of the training step.
    """
    found, nodes = {}, [z.grad_fn]
    known = {z.grad_fn}
    for node in nodes:  # which grows
        if node is None:
            continue
        wrapper = getattr(node, "ddp_weakref", None)  # of DistributedDataParallel, behind what it returned
        if wrapper is not None and wrapper().static_graph:  # it would take that pass for the first, and reduce nothing
            raise RuntimeError("DistributedDataParallel with static_graph allows one backward pass")
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found[id(variable)] = variable
        following = [after for after, _ in node.next_functions if after not in known]
        known.update(following)
        nodes += dict.fromkeys(following)
    return [*found.values()]


@lru_cache(maxsize=1)
def _probes(size: int) -> Tensor:
    """The probes of a model, drawn once and kept in one byte a sign: drawing them takes longer than using them."""
    return hutchinson_probes(size, torch.int8)


@torch.enable_grad()
def graph_hessian_trace(z: Tensor, y: Tensor) -> Tensor | None:
    """Hutchinson's trace [1] of the mean cross-entropy of the first few rows, by double backward; None where no
    parameter is behind the logits z [n, C] or there is no row.

    Raises:
        RuntimeError: as ``parameters_behind``; or a part of the model has no second derivative, as a compiled one or a
            fused kernel.
    """
    parameters = parameters_behind(z)
    if not parameters:
        return None
    few = functional.cross_entropy(z[:HUTCHINSON_ROWS], y[:HUTCHINSON_ROWS])
    sizes = [p.numel() for p in parameters]
    probes = _probes(sum(sizes))
    total = z.new_zeros(1)
    gradients = torch.autograd.grad(few, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    for probe in probes:
        v = [part.view_as(p).to(p) for part, p in zip(probe.split(sizes), parameters, strict=True)]
        product = sum((g * part).sum() for g, part in zip(gradients, v, strict=True))
        hv = torch.autograd.grad(product, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        total += sum((a * b).sum() for a, b in zip(hv, v, strict=True)).detach()
    # not before: in a model that is spread over ranks a backward pass is one that all make together
    return total / len(probes) if len(y) else None
