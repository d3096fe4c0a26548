"""The protocol of a policy pi_phi, equation (5)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor


class WithoutParameters:
    """Base of the policies that are not meta-learned."""

    num_parameters = 0
    reads_history = False
    shield: float | None = None

    def initial(self) -> np.ndarray:
        return np.zeros(0, np.float32)


class Policy(Protocol):
    """Maps the training state to controls. Stateless: everything it learned is in phi, and one that remembers is given
    all that it has seen in the run."""

    features: tuple[str, ...]  # names it reads, see training_state.FEATURES; or training_state.SNAPSHOTS alone
    refresh: int  # inner steps between two evaluations
    active_basis: tuple[str, ...]  # basis losses whose mixture weight may be non-zero
    num_parameters: int
    shield: float | None  # kappa of the Lyapunov shield, see palf_dist.shield; active_basis then holds ce. None: off
    reads_history: bool  # reads the states of all refreshes of the run so far, not of the present one alone

    def initial(self) -> np.ndarray:
        """phi before meta-training, float32 [num_parameters]."""
        ...

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        """Controls [G, U] (types.CONTROLS: mixture weights in the simplex, then bounded hyper-parameters) from raw
        features state [G, S]; from those of all n refreshes so far, [G, n, S], where it reads its history; or from the
        snapshots [G, n, 1 + K] where it reads those. phi is [num_parameters], or [G, num_parameters] for a policy per
        task. Differentiable in phi."""
        ...
