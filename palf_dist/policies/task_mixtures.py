"""Constant mixture weights, others for each task of a group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from palf_dist.learnloss.space import WeightSpace
from palf_dist.policies.base import WithoutParameters
from palf_dist.policies.static import mixture_controls


class TaskMixtures(WithoutParameters):
    """Of each task its own weights, at every step."""

    features: tuple[str, ...] = ()
    refresh = 1_000_000_000

    def __init__(self, space: WeightSpace, weights: Sequence[np.ndarray]) -> None:
        """``weights``: lambda [k] of the space for each task; with that of the reference, 1, normalised to the
        simplex."""
        self.active_basis = (space.reference, *space.names)
        lambdas = np.column_stack([np.ones(len(weights)), np.stack(weights)])
        alpha = torch.from_numpy(lambdas / lambdas.sum(1, keepdims=True)).float()
        self.vectors = mixture_controls(alpha, self.active_basis)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self.vectors.to(state)
