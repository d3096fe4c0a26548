"""Evolution strategies: meta-gradients from outer losses alone, by antithetic Gaussian perturbations of phi.

Every task has perturbations of its own (phi is [G, number of policy parameters]), so that one pair of runs gives G
samples. ``ES`` is unbiased for the smoothed outer loss of its stretch; on truncated windows that stretch ignores what
earlier controls did to it. ``PES`` carries both perturbed inner states and the sum of all perturbations so far from
window to window, which removes that truncation bias (Vicol et al. 2021).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.estimators.base import Estimate, Recorder
from palf_dist.inner_loop import InnerLoop, InnerState, StepResult
from palf_dist.randomness import random_generator


class ES:
    """Antithetic ES: mean over pairs and tasks of (J(phi + s xi) - J(phi - s xi)) / (2 s) * xi."""

    def __init__(self, config: EstimatorConfig, outer: OuterLossConfig) -> None:
        self.config, self.outer = config, outer

    def estimate(
        self,
        loop: InnerLoop,
        phi: Tensor,
        state: InnerState,
        stop: int,
        keys: tuple[int | str, ...],
        carried: dict[str, np.ndarray] | None = None,
    ) -> Estimate:
        origin = state.to_arrays()
        samples = []
        for pair in range(self.config.pairs):
            xi = self._perturbation(loop, phi, (*keys, state.step, pair))
            up, down = (
                self._run(
                    loop, phi + sign * self.config.sigma * xi, InnerState.from_arrays(origin, phi.device), stop
                ).objective()
                for sign in (1, -1)
            )
            samples.append((up - down)[:, None] / (2 * self.config.sigma) * xi)
        gradient = torch.stack(samples).mean((0, 1)).double().cpu().numpy()
        recorder = self._run(loop, phi, state, stop)
        return Estimate(gradient, float(recorder.objective().mean()), recorder.arrays(), metrics=recorder.metrics())

    def _perturbation(self, loop: InnerLoop, phi: Tensor, keys: tuple[int | str, ...]) -> Tensor:
        group = loop.group  # perhaps a part of the unit's tasks: the draws are those of the whole
        draws = random_generator("perturbation", *keys).standard_normal((group.first + group.size, phi.shape[-1]))
        return torch.from_numpy(draws[group.first :]).to(phi)

    def _run(self, loop: InnerLoop, phi: Tensor, state: InnerState, stop: int) -> Recorder:
        """What a forward run under phi, one per task or shared, leaves behind."""
        loop.resume(state, phi)
        recorder = Recorder(loop, self.outer, state, stop)

        def after_step(now: InnerState, result: StepResult) -> None:
            recorder.step(now, result)
            if now.step in recorder.checkpoints:
                logits, features, _ = loop.group.model.forward(now.theta, loop.group.meta_validation.inputs)
                recorder.checkpoint(now.step, logits, features)

        loop.run(state, phi, stop, after_step=after_step)
        return recorder


class PES(ES):
    """Persistent ES: as ``ES``, but the perturbed states go on into the next window and each difference is multiplied
    by the sum of all perturbations that led to it."""

    def estimate(
        self,
        loop: InnerLoop,
        phi: Tensor,
        state: InnerState,
        stop: int,
        keys: tuple[int | str, ...],
        carried: dict[str, np.ndarray] | None = None,
    ) -> Estimate:
        origin = state.to_arrays()
        carried = carried or {}
        samples: list[Tensor] = []
        onward: dict[str, np.ndarray] = {}
        for pair in range(self.config.pairs):
            xi = self._perturbation(loop, phi, (*keys, state.step, pair))
            total = xi + torch.from_numpy(np.array(carried[f"{pair}/total"])).to(xi) if carried else xi
            outer = []
            for side, sign in (("up", 1), ("down", -1)):
                prefix = f"{pair}/{side}/"
                begin = {name[len(prefix) :]: value for name, value in carried.items() if name.startswith(prefix)}
                perturbed = InnerState.from_arrays(begin or origin, phi.device)
                outer.append(self._run(loop, phi + sign * self.config.sigma * xi, perturbed, stop).objective())
                onward |= {prefix + name: value for name, value in perturbed.to_arrays().items()}
            onward[f"{pair}/total"] = total.cpu().numpy()
            samples.append((outer[0] - outer[1])[:, None] / (2 * self.config.sigma) * total)
        gradient = torch.stack(samples).mean((0, 1)).double().cpu().numpy()
        recorder = self._run(loop, phi, state, stop)
        return Estimate(gradient, float(recorder.objective().mean()), recorder.arrays(), onward, recorder.metrics())
