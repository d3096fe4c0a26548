"""The reference estimator: plain autograd through the whole stretch, with the plain formulas of the losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.estimators.base import Estimate, Recorder
from palf_dist.inner_loop import InnerLoop, InnerState


class Unroll:
    """Exact, slow and hungry for memory: what the others are checked against."""

    def __init__(self, config: EstimatorConfig, outer: OuterLossConfig) -> None:
        self.outer = outer

    def estimate(
        self,
        loop: InnerLoop,
        phi: Tensor,
        state: InnerState,
        stop: int,
        keys: tuple[int | str, ...],
        carried: dict[str, np.ndarray] | None = None,
    ) -> Estimate:
        rows = loop.group.meta_validation
        with torch.enable_grad():
            leaf = phi.detach().requires_grad_(True)
            state.theta = state.theta.detach().requires_grad_(True)
            loop.resume(state, leaf)
            recorder = Recorder(loop, self.outer, state, stop)
            while state.step < stop:
                result = loop.step(state, leaf, differentiable=True)
                recorder.step(state, result)
                if state.step in recorder.checkpoints:
                    recorder.checkpoint(state.step, *loop.group.model.apply(state.theta, rows.inputs))
            objective = recorder.objective().mean()
            (gradient,) = torch.autograd.grad(objective, leaf)
        state.theta = state.theta.detach()
        state.slots = tuple(slot.detach() for slot in state.slots)
        state.controls = None
        return Estimate(
            gradient=gradient.double().cpu().numpy(),
            outer_loss=float(objective.detach()),
            records=recorder.arrays(),
            metrics=recorder.metrics(),
        )
