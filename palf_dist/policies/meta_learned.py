"""The meta-learned policy: a small tanh MLP from the normalised training state to mixture weights and bounded loss
hyper-parameters. Its output layer starts at zero, so that an untrained policy is exactly its static starting point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import PolicyConfig, PolicyStart
from palf_dist.randomness import random_generator
from palf_dist.training_state import (
    NOISE_FEATURES,
    PAPER_FEATURES,
    TASK_FEATURES,
    check_features,
    normalise,
)
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, CONTROLS, DEFAULT_HYPERPARAMETERS, HYPERPARAMETERS

OUTPUT_SCALE = 2.0  # multiplies the output layer: a unit of phi moves a control by a useful amount

_UPPER = {"e": 0.95, "ew": 1.0, "eps": 0.5}
"""Hyper-parameters in (0, upper): upper * sigmoid."""
_LOG_RANGE = {"la": (-4.0, 1.0), "wd": (-2.0, 1.5), "gamma": (-2.0, 1.0), "a": (-4.0, 2.0), "b": (-4.0, 2.0)}
_LOG_RANGE["tau"] = (-1.5, 1.5)
"""Positive hyper-parameters: start * exp, the exponent clamped to this range."""

_PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "palf": {"features": PAPER_FEATURES, "basis": BASIS_LOSSES[:5], "hyperparameters": ()},
    "robust": {
        "features": ("time", "entropy", "loss", "loss_variance", *NOISE_FEATURES, *TASK_FEATURES),
        "basis": ("ce", "robust_ce"),
        "hyperparameters": ("e", "la", "ew", "wd"),
    },
}
_ROBUST_SHARE = 0.96  # mixture weight of robust_ce at the start of the robust preset: nearly the static S5


@dataclass(frozen=True)
class PolicySpec:
    """Everything that defines a learned policy but its parameters; written into the policy file."""

    kind: str
    features: tuple[str, ...]
    basis: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    hidden: int
    refresh: int
    seed: int
    initial_weights: tuple[float, ...]  # mixture weights of ``basis`` at phi's zero output layer
    start: Mapping[str, float] = field(default_factory=dict)  # see ``start_values``
    shield: float | None = None  # kappa of the Lyapunov shield

    def __post_init__(self) -> None:
        check_features(self.features)
        assert len(self.initial_weights) == len(self.basis)


def start_values(start: PolicyStart) -> dict[str, float]:
    """The hyper-parameters that start elsewhere than at ``types.DEFAULT_HYPERPARAMETERS``: equal policies have equal
    specs, however their configurations say so."""
    given = start.model_dump(exclude_none=True)
    return {name: value for name, value in given.items() if value != DEFAULT_HYPERPARAMETERS[name]}


def policy_spec(config: PolicyConfig) -> PolicySpec:
    """Fill in the preset's values for fields that the configuration leaves out."""
    preset = _PRESETS[config.kind]
    basis = config.basis or preset["basis"]
    others = max(len(basis) - 1, 1)
    if "robust_ce" in basis and len(basis) > 1:
        weights = tuple(_ROBUST_SHARE if name == "robust_ce" else (1 - _ROBUST_SHARE) / others for name in basis)
    else:
        weights = (1 / len(basis),) * len(basis)
    return PolicySpec(
        kind=config.kind,
        features=preset["features"] if config.features is None else config.features,
        basis=basis,
        hyperparameters=preset["hyperparameters"] if config.hyperparameters is None else config.hyperparameters,
        hidden=config.hidden,
        refresh=config.refresh,
        seed=config.seed,
        initial_weights=weights,
        start=start_values(config.start),
        shield=config.shield,
    )


class LearnedPolicy:
    """alpha, hyper-parameters = pi_phi(s_t), equation (5); ``mean`` and ``std`` [S] normalise the state and are frozen
    into the policy file. Hyper-parameters that the policy does not set keep their starting values."""

    def __init__(self, spec: PolicySpec, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        self.spec = spec
        self.features = spec.features
        self.refresh = spec.refresh
        self.active_basis = spec.basis
        self.shield = spec.shield
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)
        inputs, outputs = len(spec.features), len(spec.basis) + len(spec.hyperparameters)
        assert self.mean.shape == self.std.shape == (inputs,)
        self._start = DEFAULT_HYPERPARAMETERS | dict(spec.start)
        self._shapes = ((inputs, spec.hidden), (spec.hidden,), (spec.hidden, outputs), (outputs,))
        self.num_parameters = sum(math.prod(shape) for shape in self._shapes)

    def initial(self) -> np.ndarray:
        inputs, hidden = self._shapes[0]
        first = random_generator("policy", self.spec.seed).normal(size=(inputs, hidden)) / math.sqrt(max(inputs, 1))
        phi = np.zeros(self.num_parameters, np.float32)
        phi[: first.size] = first.ravel()
        return phi

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        raw = OUTPUT_SCALE * self._network(phi, normalise(state, self.mean.to(state), self.std.to(state)))
        columns: list[Tensor] = [torch.zeros_like(raw[:, 0])] * len(BASIS_LOSSES)
        start = torch.tensor(self.spec.initial_weights, dtype=raw.dtype, device=raw.device).log()
        alpha = torch.softmax(start + raw[:, : len(self.spec.basis)], -1)
        for column, name in zip(alpha.unbind(1), self.spec.basis, strict=True):
            columns[CONTROL_INDEX[name]] = column
        outputs = dict(zip(self.spec.hyperparameters, raw[:, len(self.spec.basis) :].unbind(1), strict=True))
        columns += [_bounded(name, self._start[name], outputs.get(name), raw[:, 0]) for name in HYPERPARAMETERS]
        assert len(columns) == len(CONTROLS)
        return torch.stack(columns, 1)

    def _network(self, phi: Tensor, state: Tensor) -> Tensor:
        sizes = [math.prod(shape) for shape in self._shapes]
        w1, b1, w2, b2 = (
            part.reshape(*phi.shape[:-1], *shape)
            for part, shape in zip(phi.split(sizes, -1), self._shapes, strict=True)
        )
        if phi.dim() == 1:
            return torch.tanh(state @ w1 + b1) @ w2 + b2
        hidden = torch.tanh(torch.einsum("gs,gsh->gh", state, w1) + b1)
        return torch.einsum("gh,gho->go", hidden, w2) + b2


def _bounded(name: str, start: float, raw: Tensor | None, like: Tensor) -> Tensor:
    if raw is None:
        return torch.full_like(like, start)
    if name in _UPPER:
        share = start / _UPPER[name]
        return _UPPER[name] * torch.sigmoid(raw + math.log(share / (1 - share)))
    return start * raw.clamp(*_LOG_RANGE[name]).exp()
