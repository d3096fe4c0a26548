"""Basis losses of a user's own, one function each, known by their names.

They join the mixtures of ``AdaptiveLoss``, where autograd differentiates them. The inner loop of meta-training works by
closed forms, which they have none of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.types import BASIS_LOSSES, CONTROLS

BasisLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, C] float32 or float64, labels [n] int64) -> the loss of each example [n], differentiable by autograd."""

Registered = TypeVar("Registered", bound=BasisLoss)

_LOSSES: dict[str, BasisLoss] = {}


def basis_loss(function: Registered) -> Registered:
    """Decorator: makes a function a basis loss under its own name, for the ``active_basis`` of a policy.

    The function maps logits [n, C] (float32 or float64) and labels [n] (int64) to the loss of each example [n], which
    autograd differentiates; each of them by its own row alone. n may be 0. ``palf_dist.testing.check_basis_loss``
    checks that. A function that is defined again at the same place takes the place of the one before, also in losses
    that were made with it: so the functions of a factory need names of their own.

    Raises:
        ConfigError: it has no name of its own, or the name is that of another basis loss or a control.
    """
    name = function.__name__
    if not name.isidentifier():
        raise ConfigError(f"basis_loss: {name} is no name to know a loss by; write it with def")
    known = _LOSSES.get(name)
    # read again, as by a notebook's cell, a function takes its own place
    again = known is not None and (known.__module__, known.__qualname__) == (function.__module__, function.__qualname__)
    if name in CONTROLS or (known is not None and not again):
        raise ConfigError(f"basis_loss: {name!r} is taken; give the function another name")
    _LOSSES[name] = function
    return function


def own_names(basis: Sequence[str]) -> tuple[str, ...]:
    """Those of the basis losses that are a user's own, in their order."""
    return tuple(name for name in basis if name not in BASIS_LOSSES)


def check_basis(basis: Sequence[str]) -> None:
    """Refuse, with a ConfigError, names of which there is no basis loss, or twice the same."""
    unknown = [name for name in basis if name not in BASIS_LOSSES and name not in _LOSSES]
    if unknown:
        raise ConfigError(
            f"basis: no loss is called {', '.join(unknown)}; there are {', '.join((*BASIS_LOSSES, *_LOSSES))}, and "
            "what palf_dist.basis_loss registers, once the module that does it is imported"
        )
    if not basis or len({*basis}) < len(basis):
        raise ConfigError(f"basis: {', '.join(basis) or 'nothing'} given; needs one loss or more, each once")


def refuse_own(basis: Sequence[str], where: str) -> None:
    """Refuse, with a ConfigError, a user's own losses where closed forms are needed; ``where`` is the field."""
    if own := [name for name in basis if name in _LOSSES]:
        raise ConfigError(
            f"{where}: {', '.join(own)} given, a basis loss of your own: it has no closed form, so nothing is "
            "meta-trained with it. Use it in AdaptiveLoss, with a fixed mixture or a policy of your own"
        )


def registered(name: str) -> BasisLoss:
    """The function of that name. Raises ConfigError where there is none."""
    check_basis([name])
    return _LOSSES[name]


def own_values(name: str, function: BasisLoss, z: Tensor, labels: Tensor) -> Tensor:
    """The values [n] of a loss at logits z [n, C] and labels [n]. Raises ConfigError if it gives anything else."""
    values = function(z, labels)
    if not isinstance(values, Tensor) or values.shape != labels.shape or not values.is_floating_point():
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"basis loss {name}: gave {got} for {len(labels)} examples; return one value of each, [n]")
    return values


def own_mixture(alpha: Mapping[str, Tensor], z: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """sum_k alpha_k l_k of each example [n], by the weights [1] of the losses; of soft targets [n, C] the mean over
    labels of their losses, at one call for each class."""
    total = z.new_zeros(len(z))
    for name, weight in alpha.items():
        function = registered(name)
        if targets is None:
            total = total + weight * own_values(name, function, z, labels)
            continue
        for label, share in enumerate(targets.unbind(1)):
            total = total + weight * share * own_values(name, function, z, torch.full_like(labels, label))
    return total
