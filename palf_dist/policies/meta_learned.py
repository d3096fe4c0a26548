"""The meta-learned policy: a small tanh MLP, or a GRU cell over the refreshes, from the normalised training state to
mixture weights and bounded loss hyper-parameters. Its output layer starts at zero, so that an untrained policy is
exactly its static starting point. And a point that each task adapts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from palf_dist.config import PolicyConfig, PolicyStart
from palf_dist.errors import ConfigError
from palf_dist.randomness import random_generator
from palf_dist.training_state import (
    NEIGHBOUR_FEATURES,
    NOISE_FEATURES,
    PAPER_FEATURES,
    TASK_FEATURES,
    VALIDATION_FEATURES,
    check_features,
    normalise,
)
from palf_dist.types import (
    BASIS_LOSSES,
    CONTROL_INDEX,
    CONTROLS,
    DEFAULT_HYPERPARAMETERS,
    HYPERPARAMETERS,
    PAPER_BASIS,
)

OUTPUT_SCALE = 2.0  # multiplies the output layer: a unit of phi moves a control by a useful amount

_UPPER = {"e": 0.95, "ew": 1.0, "eps": 0.5, "q": 1.0, "beta": 1.0}
"""Hyper-parameters in (0, upper): upper * sigmoid."""
_LOG_RANGE = {"la": (-4.0, 1.0), "wd": (-2.0, 1.5), "gamma": (-2.0, 1.0), "a": (-4.0, 2.0), "b": (-4.0, 2.0)}
_LOG_RANGE |= {"tau": (-1.5, 1.5), "lam": (-4.0, 1.5)}
"""Positive hyper-parameters: start * exp, the exponent clamped to this range."""

_ROBUST_FEATURES = ("time", "entropy", "loss", "loss_variance", *NOISE_FEATURES, *TASK_FEATURES)
_ROBUST = {"basis": ("ce", "robust_ce"), "hyperparameters": ("e", "la", "ew", "wd")}
_PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "robust": {"features": _ROBUST_FEATURES, **_ROBUST},
    "informed": {
        "features": (*_ROBUST_FEATURES, *NEIGHBOUR_FEATURES, *VALIDATION_FEATURES),
        "basis": (*_ROBUST["basis"], "symmetric_ce", "elr"),
        "hyperparameters": (*_ROBUST["hyperparameters"], "a", "b", "lam"),
    },
    "validation_free": {"features": _ROBUST_FEATURES, **_ROBUST},
    "recurrent": {"features": _ROBUST_FEATURES, **_ROBUST},
    "schedule": {"features": ("time",), **_ROBUST},
    "constant": {"features": (), **_ROBUST},
    "maml": {"features": (), **_ROBUST},
    "palf": {"features": PAPER_FEATURES, "basis": PAPER_BASIS, "hyperparameters": ()},
    "widened": {"features": PAPER_FEATURES, "basis": PAPER_BASIS, "hyperparameters": ("gamma", "eps", "a", "b")},
}
_ROBUST_SHARE = 0.96  # mixture weight of robust_ce at the start of the robust preset: nearly the static S5

DESCENT = "descent_"
"""What an adapting policy reads, by control: the sum of the gradients of its validation loss."""
_ADAPTATION_RATE = 0.25  # of the untrained policy: how far a sum of its usual size moves an output
_LOG_RATE_RANGE = (-5.0, 3.0)  # of what meta-training makes of that rate


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
        if self.kind != "maml" or self.features != descents(self.basis, self.hyperparameters):
            check_features(self.features)
            if problem := misread(self.kind, self.features):
                raise ConfigError(f"policy.features: {problem}")
        assert len(self.initial_weights) == len(self.basis)


def start_values(start: PolicyStart) -> dict[str, float]:
    """The hyper-parameters that start elsewhere than at ``types.DEFAULT_HYPERPARAMETERS``: equal policies have equal
    specs, however their configurations say so."""
    given = start.model_dump(exclude_none=True)
    return {name: value for name, value in given.items() if value != DEFAULT_HYPERPARAMETERS[name]}


def descents(basis: Sequence[str], hyperparameters: Sequence[str]) -> tuple[str, ...]:
    """The features of an adapting policy that sets these controls, one for each of its outputs."""
    return tuple(DESCENT + name for name in (*basis, *hyperparameters))


def misread(kind: str, features: tuple[str, ...]) -> str | None:
    """What is wrong with features that would make a policy another one than its kind says; None: nothing."""
    if kind in ("schedule", "constant") and features != _PRESETS[kind]["features"]:
        reads = "time alone" if kind == "schedule" else "no state"
        given = ", ".join(features) or "none"
        return f"{given} given, but a {kind} policy reads {reads}; leave it out, or choose policy.kind: robust"
    if kind == "maml":
        return "a maml policy reads its own validation loss alone; leave it out, or choose policy.kind: robust"
    validation = [name for name in features if name in VALIDATION_FEATURES]
    if kind == "validation_free" and validation:
        return (
            f"{', '.join(validation)} read validation rows, which policy.kind: validation_free rules out; leave them "
            "out, or choose policy.kind: robust"
        )
    return None


def policy_spec(config: PolicyConfig) -> PolicySpec:
    """Fill in the preset's values for fields that the configuration leaves out."""
    preset = _PRESETS[config.kind]
    basis = config.basis or preset["basis"]
    hyperparameters = preset["hyperparameters"] if config.hyperparameters is None else config.hyperparameters
    features = descents(basis, hyperparameters) if config.kind == "maml" else preset["features"]
    others = max(len(basis) - 1, 1)
    if "robust_ce" in basis and len(basis) > 1:
        weights = tuple(_ROBUST_SHARE if name == "robust_ce" else (1 - _ROBUST_SHARE) / others for name in basis)
    else:
        weights = (1 / len(basis),) * len(basis)
    return PolicySpec(
        kind=config.kind,
        features=features if config.features is None else config.features,
        basis=basis,
        hyperparameters=hyperparameters,
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

    reads_history = False
    _drawn = 1  # how many of its layers start from a draw; the others start at zero

    def __init__(self, spec: PolicySpec, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        self.spec = spec
        self.features = spec.features
        self.refresh = spec.refresh
        self.active_basis = spec.basis
        self.shield = spec.shield
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)
        inputs = len(spec.features)
        assert self.mean.shape == self.std.shape == (inputs,)
        self._start = DEFAULT_HYPERPARAMETERS | dict(spec.start)
        self._shapes = self._layers(inputs, len(spec.basis) + len(spec.hyperparameters))
        self.num_parameters = sum(math.prod(shape) for shape in self._shapes)

    def _layers(self, inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts of phi."""
        hidden = 0 if self.spec.kind == "constant" else self.spec.hidden  # what never varies needs the last bias alone
        return (inputs, hidden), (hidden,), (hidden, outputs), (outputs,)

    def initial(self) -> np.ndarray:
        random = random_generator("policy", self.spec.seed)
        drawn = [random.normal(size=shape) / math.sqrt(max(shape[0], 1)) for shape in self._shapes[: self._drawn]]
        values = np.concatenate([part.ravel() for part in drawn])
        phi = np.zeros(self.num_parameters, np.float32)
        phi[: values.size] = values
        return phi

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self._controls_from(self._network(self._parts(phi), self._normalised(state)))

    def _normalised(self, state: Tensor) -> Tensor:
        return normalise(state, self.mean.to(state), self.std.to(state))

    def _controls_from(self, outputs: Tensor) -> Tensor:
        """Controls [G, U] from the network's outputs [G, number of controls that are set]."""
        raw = OUTPUT_SCALE * outputs
        columns: list[Tensor] = [torch.zeros_like(raw[:, 0])] * len(BASIS_LOSSES)
        start = torch.tensor(self.spec.initial_weights, dtype=raw.dtype, device=raw.device).log()
        alpha = torch.softmax(start + raw[:, : len(self.spec.basis)], -1)
        for column, name in zip(alpha.unbind(1), self.spec.basis, strict=True):
            columns[CONTROL_INDEX[name]] = column
        given = dict(zip(self.spec.hyperparameters, raw[:, len(self.spec.basis) :].unbind(1), strict=True))
        columns += [_bounded(name, self._start[name], given.get(name), raw[:, 0]) for name in HYPERPARAMETERS]
        assert len(columns) == len(CONTROLS)
        return torch.stack(columns, 1)

    def _parts(self, phi: Tensor) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in self._shapes]
        parts = zip(phi.split(sizes, -1), self._shapes, strict=True)
        return [part.reshape(*phi.shape[:-1], *shape) for part, shape in parts]

    def _network(self, parts: list[Tensor], state: Tensor) -> Tensor:
        """Outputs [G, number of controls that are set] from the normalised state [G, S]."""
        w1, b1, w2, b2 = parts
        return _times(torch.tanh(_times(state, w1) + b1), w2) + b2


class RecurrentPolicy(LearnedPolicy):
    """A GRU cell (Cho et al. 2014, as torch.nn.GRUCell) over the refreshes of a run, and a linear layer on its hidden
    state. It is given the states of all refreshes so far, [G, n, S], and starts from a hidden state of zero each time:
    so it stays a function of phi and what was seen, and its meta-gradient goes back through every refresh of the run,
    whatever the window. (Runs have ten to twenty refreshes: to go through them again costs next to nothing. What a
    graph keeps, ``controls_along`` makes once.)"""

    reads_history = True
    _drawn = 2

    def _layers(self, inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
        hidden = self.spec.hidden
        return (inputs, 3 * hidden), (hidden, 3 * hidden), (3 * hidden,), (hidden, outputs), (outputs,)

    def _network(self, parts: list[Tensor], state: Tensor) -> Tensor:
        *_, w_out, b_out = parts
        return _times(self._memories(parts, state)[-1], w_out) + b_out

    def controls_along(self, phi: Tensor, state: Tensor) -> Tensor:
        """The controls [n, G, U] of all n refreshes of state [G, n, S], in one pass: those of refresh i are
        ``controls(phi, state[:, : i + 1])``."""
        parts = self._parts(phi)
        *_, w_out, b_out = parts
        memories = self._memories(parts, self._normalised(state))
        return torch.stack([self._controls_from(_times(memory, w_out) + b_out) for memory in memories])

    def _memories(self, parts: list[Tensor], state: Tensor) -> list[Tensor]:
        """The hidden state [G, H] after each refresh."""
        w_state, w_memory, bias, _, _ = parts
        memory, found = state.new_zeros(len(state), self.spec.hidden), []
        for now in state.unbind(1):
            seen = _times(now, w_state) + bias
            reset_in, update_in, new_in = seen.chunk(3, -1)
            reset_on, update_on, new_on = _times(memory, w_memory).chunk(3, -1)
            update = torch.sigmoid(update_in + update_on)
            new = torch.tanh(new_in + torch.sigmoid(reset_in + reset_on) * new_on)
            memory = torch.lerp(new, memory, update)
            found.append(memory)
        return found


class AdaptingPolicy(LearnedPolicy):
    """An initial point of the outputs that each task then moves down its own validation loss: MAML (Finn et al. 2017)
    with the controls in the place of the weights. phi is that point u_0 and the logarithm of the rate eta;

        u = u_0 - eta * (sum of d Val / d u over the refreshes so far) / rms.

    It reads that sum [G, A], one entry for each output; ``mean`` and ``std`` give its usual root mean square. The
    sum is a constant for the meta-gradient, as every state is: first-order MAML.
    """

    def _layers(self, inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
        return (outputs,), (1,)

    def initial(self) -> np.ndarray:
        return np.zeros(self.num_parameters, np.float32)

    def controls(self, phi: Tensor, state: Tensor) -> Tensor:
        return self._controls_from(self._point(phi, state))

    def descent(self, phi: Tensor, state: Tensor, of_controls: Tensor) -> Tensor:
        """The gradient [G, A] in the outputs, from that in the controls [G, U]; 0 where that is not finite."""
        with torch.enable_grad():
            point = self._point(phi, state).detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad((self._controls_from(point) * of_controls).sum(), point)
        return torch.where(gradient.isfinite(), gradient, 0.0)

    def _point(self, phi: Tensor, state: Tensor) -> Tensor:
        start, log_rate = self._parts(phi)
        rate = _ADAPTATION_RATE * log_rate.clamp(*_LOG_RATE_RANGE).exp()
        return start - rate * torch.nan_to_num(state / torch.hypot(self.mean, self.std).to(state))


def needs_parameters(policy: PolicyConfig | PolicySpec) -> str | None:
    """The field by which a policy takes gradients with respect to a model's parameters, so that ``AdaptiveLoss``, which
    sees the logits alone, refuses it. None: there is none."""
    if policy.shield is not None:
        return "shield"
    return "kind" if policy.kind == "maml" else None


def check_for_use(spec: PolicySpec) -> None:
    """Refuse, with a ConfigError, a policy that ``AdaptiveLoss`` cannot follow."""
    field = needs_parameters(spec)
    if field == "shield":
        raise ConfigError(
            f"policy.shield: the policy was meta-trained under a Lyapunov shield ({spec.shield:g}), which compares "
            "gradients with respect to a model's parameters; a loss sees the logits alone, where the condition "
            "promises nothing. Meta-train a policy without one"
        )
    if field == "kind":
        raise ConfigError(
            f"policy.kind: a {spec.kind} policy takes gradients of the validation loss with respect to a model's "
            "parameters; a loss sees the logits alone. Meta-train a policy of another kind"
        )


def make_policy(spec: PolicySpec, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> LearnedPolicy:
    """The policy that ``spec`` describes."""
    kinds = {"recurrent": RecurrentPolicy, "maml": AdaptingPolicy}
    return kinds.get(spec.kind, LearnedPolicy)(spec, mean, std)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [G, a] times weight [a, b], or times each task's own [G, a, b]."""
    return x @ weight if weight.dim() == 2 else torch.einsum("gs,gsh->gh", x, weight)


def _bounded(name: str, start: float, raw: Tensor | None, like: Tensor) -> Tensor:
    if raw is None:
        return torch.full_like(like, start)
    if name in _UPPER:
        share = start / _UPPER[name]
        return _UPPER[name] * torch.sigmoid(raw + math.log(share / (1 - share)))
    return start * raw.clamp(*_LOG_RANGE[name]).exp()
