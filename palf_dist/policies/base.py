"""The protocol of a policy pi_phi, equation (5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.own_losses import own_names
from palf_dist.types import BASIS_LOSSES, CONTROLS, HYPERPARAMETERS, NUM_BASIS

UPPER_BOUNDS = {"e": 0.95, "ew": 1.0, "eps": 1.0, "q": 1.0, "beta": 1.0}
"""Of hyper-parameters; those that are not named have none. None is negative."""

ALPHA_ERROR = 1e-4
"""By which mixture weights may miss the simplex: float32 sums of a few numbers."""


class WithoutParameters:
    """Base of the policies that are not meta-learned; a user's own policy, too, has only the rest to write."""

    num_parameters = 0
    reads_history = False
    shield: float | None = None
    settings: Mapping[str, Any] = {}  #: what tells policies of one class apart, as plain data

    def initial(self) -> np.ndarray:
        return np.zeros(0, np.float32)


class Policy(Protocol):
    """Maps the training state to controls. Stateless: everything it learned is in phi, and one that remembers is given
    all that it has seen in the run."""

    refresh: int  #: inner steps between two evaluations
    num_parameters: int  #: of phi
    reads_history: bool  #: reads the states of all refreshes of the run so far, not of the present one alone

    # Read-only, so that an attribute of a narrower type is one, as ("loss",) of type tuple[str].
    @property
    def features(self) -> tuple[str, ...]:
        """Names it reads, see training_state.FEATURES; or training_state.SNAPSHOTS alone."""
        ...

    @property
    def active_basis(self) -> tuple[str, ...]:
        """Basis losses whose mixture weight may be non-zero."""
        ...

    @property
    def shield(self) -> float | None:
        """kappa of the Lyapunov shield (palf_dist.shield), or None; active_basis then holds ce."""
        ...

    def initial(self) -> np.ndarray:
        """phi before meta-training, float32 [num_parameters]."""
        ...

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        """Controls [G, U] (types.CONTROLS: mixture weights in the simplex, then bounded hyper-parameters) from raw
        features state [G, S], in which what is not known is NaN; from those of all n refreshes so far, [G, n, S], where
        it reads its history; or from the snapshots [G, n, 1 + K] where it reads those. phi is [num_parameters], or
        [G, num_parameters] for a policy per task. Differentiable in phi.

        Where ``active_basis`` names losses of a user's own (``own_losses``), their weights follow as further columns,
        in its order."""
        ...


def check_controls(policy: Policy, controls: Tensor, tasks: int) -> None:
    """Look at controls [G, U] as a policy gave them for so many tasks.

    Raises:
        ConfigError: they are no mixture of its basis losses, or a hyper-parameter is out of its bounds.
    """
    who, own = f"policy {type(policy).__name__}", own_names(policy.active_basis)
    if controls.shape != (tasks, len(CONTROLS) + len(own)):
        raise ConfigError(
            f"{who}: controls {list(controls.shape)} given; needs [{tasks}, {len(CONTROLS) + len(own)}], one row for "
            "each task, as mixture_controls makes them"
        )
    controls = controls.detach().cpu()  # a GPU is waited for once
    if not controls.isfinite().all():
        raise ConfigError(f"{who}: controls are not finite; features that are not known are NaN, see torch.nan_to_num")
    alpha = torch.cat([controls[:, :NUM_BASIS], controls[:, len(CONTROLS) :]], 1)
    if (alpha < 0).any() or ((alpha.sum(1) - 1).abs() > ALPHA_ERROR).any():
        raise ConfigError(f"{who}: mixture weights {alpha.tolist()} are no shares >= 0 of sum 1; use a softmax, say")
    names = (*BASIS_LOSSES, *own)
    mixed = [name for name, weights in zip(names, alpha.unbind(1), strict=True) if weights.any()]
    if others := [name for name in mixed if name not in policy.active_basis]:
        raise ConfigError(f"{who}: {', '.join(others)} has a mixture weight; name it in active_basis")
    for name, values in zip(HYPERPARAMETERS, controls[:, NUM_BASIS : len(CONTROLS)].unbind(1), strict=True):
        high = UPPER_BOUNDS.get(name, math.inf)
        if ((values < 0) | (values > high)).any():
            raise ConfigError(f"{who}: hyper-parameter {name} is {values.tolist()}; needs numbers from 0 to {high:g}")
