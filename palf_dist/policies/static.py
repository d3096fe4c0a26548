"""Policies that do not change during training: one static loss, or a fixed mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.own_losses import check_basis, own_names
from palf_dist.policies.base import WithoutParameters, check_controls
from palf_dist.types import (
    BASIS_LOSSES,
    CONTROL_INDEX,
    CONTROLS,
    DEFAULT_HYPERPARAMETERS,
    FIRST_CONTROLS,
    NUM_BASIS,
)


def control_vector(alpha: Mapping[str, float], hyperparameters: Mapping[str, float] | None = None) -> Tensor:
    """Controls [U] with the given mixture weights (others 0) and hyper-parameters (others at their defaults). Weights
    of a user's own losses follow as further columns."""
    values = dict.fromkeys(BASIS_LOSSES, 0.0) | dict(alpha) | DEFAULT_HYPERPARAMETERS | dict(hyperparameters or {})
    return torch.tensor([values[name] for name in (*CONTROLS, *own_names([*alpha]))])


def mixture_controls(alpha: Tensor, basis: Sequence[str]) -> Tensor:
    """Controls [G, U] with mixture weights alpha [G, K] of the named losses and hyper-parameters at their defaults."""
    controls = control_vector(dict.fromkeys(basis, 0.0)).to(alpha).repeat(len(alpha), 1)
    places = CONTROL_INDEX | {name: len(CONTROLS) + place for place, name in enumerate(own_names(basis))}
    columns = torch.tensor([places[name] for name in basis], device=alpha.device)
    return controls.index_copy(1, columns, alpha)


def restored_controls(saved: Tensor) -> Tensor:
    """Controls [U] from saved ones: as they are, or with what was added since where they are ``FIRST_CONTROLS``."""
    if len(saved) != len(FIRST_CONTROLS):
        return saved
    columns = torch.tensor([CONTROL_INDEX[name] for name in FIRST_CONTROLS], device=saved.device)
    return control_vector({}).to(saved).index_copy(0, columns, saved)


class StaticPolicy(WithoutParameters):
    """The same controls at every step of every task."""

    features: tuple[str, ...] = ()

    def __init__(self, controls: Tensor, refresh: int = 1_000_000_000, own: Sequence[str] = ()) -> None:
        """``own``: the losses of a user's own that the columns after ``CONTROLS`` are for."""
        assert controls.shape == (len(CONTROLS) + len(own),)
        self.vector = controls
        self.refresh = refresh
        self.active_basis = tuple(
            name for name, weight in zip(BASIS_LOSSES, controls[:NUM_BASIS].tolist(), strict=True) if weight > 0
        ) + tuple(own)
        self.settings = {"controls": controls.tolist()}

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self.vector.to(state).expand(state.shape[0], -1)


def fixed_mixture(alpha: Mapping[str, float], **hyperparameters: float) -> StaticPolicy:
    """The policy with these weights of basis losses, a user's own among them, at every step.

    Args:
        alpha: shares >= 0 of sum 1, by the names of the losses.
        hyperparameters: of the losses, see ``types.HYPERPARAMETERS``; those left out have their defaults.

    Raises:
        ConfigError: a name is unknown, or a number does not fit.
    """
    check_basis([*alpha])
    if unknown := [name for name in hyperparameters if name not in DEFAULT_HYPERPARAMETERS]:
        known = ", ".join(DEFAULT_HYPERPARAMETERS)
        raise ConfigError(f"{', '.join(unknown)}: no such hyper-parameter; there are {known}")
    policy = StaticPolicy(control_vector(alpha, hyperparameters), own=own_names([*alpha]))
    check_controls(policy, policy.vector[None], tasks=1)
    return policy
