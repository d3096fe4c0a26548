"""Mixture weights learned during one training run from the run itself: LearnLoss over its own snapshots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.learnloss.space import WeightSpace
from palf_dist.policies.base import WithoutParameters
from palf_dist.policies.static import mixture_controls
from palf_dist.training_state import SNAPSHOTS

REFERENCE = "ce"
PER_EXAMPLE = (REFERENCE, "focal", "label_smoothing", "symmetric_ce")
"""The paper's basis losses that are a function of the model and one example: LearnLoss compares their means between
snapshots. info_nce depends on the rest of the batch, robust_ce, elr and bootstrap on the run's averaged predictions."""


class OnlineLearnLoss(WithoutParameters):
    """Re-learns the mixture weights at every refresh: LearnLoss over all snapshots (phi, e) of the run so far, where
    phi_k is the mean of basis loss k and e the validation error.

    Cross-entropy has weight 1 and each other basis loss one within [low, high]; alpha is that, normalised to the
    simplex. Before two snapshots are known all weights are at the middle of the box (in log scale). Hyper-parameters
    keep their defaults. Nothing is learned between runs: equal snapshots give equal controls.
    """

    features: tuple[str, ...] = (SNAPSHOTS,)

    def __init__(
        self, basis: Sequence[str] = PER_EXAMPLE, *, low: float = 0.01, high: float = 100.0, refresh: int = 10
    ) -> None:
        """
        Raises:
            ConfigError: basis does not fit, or [low, high] is no interval of positive numbers.
        """
        others = [name for name in basis if name != REFERENCE]
        if len(set(basis)) < len(basis) or REFERENCE not in basis or not others or not set(basis) <= set(PER_EXAMPLE):
            raise ConfigError(
                f"basis: {', '.join(basis)} given; needs {REFERENCE} and at least one more of "
                f"{', '.join(PER_EXAMPLE[1:])}, each once"
            )
        self.space = WeightSpace.of({name: (low, high) for name in others}, REFERENCE)
        self.active_basis = (REFERENCE, *self.space.names)
        self.settings = {"basis": list(self.active_basis), "low": low, "high": high}
        self.refresh = refresh

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        """Controls [G, U] from the snapshots state [G, n, 1 + K]: e, then phi in the order of ``active_basis``."""
        mixtures = np.stack([self.mixture(task) for task in state.detach().double().cpu().numpy()])
        return mixture_controls(torch.from_numpy(mixtures).to(state), self.active_basis)

    def mixture(self, snapshots: np.ndarray) -> np.ndarray:
        """alpha [K] in the order of ``active_basis`` from snapshots [n, 1 + K] of one run. Those that are not finite
        (no validation error, a diverged model) are left out."""
        known = snapshots[np.isfinite(snapshots).all(1)]
        start = self.space.weights(self.space.centre)
        if len(known) < 2:
            weights = start
        else:
            from palf_dist.learnloss.on_the_fly import learn_weights  # scipy takes a second to load

            weights = learn_weights(self.space, known[:, 1:], known[:, 0])
        alpha: np.ndarray = np.concatenate([[1.0], weights])
        alpha /= alpha.sum()
        return alpha
