"""What a learned policy does in which state: its controls along each feature, the others at their usual values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palf_dist.errors import ConfigError
from palf_dist.policies.base import Policy
from palf_dist.policies.meta_learned import LearnedPolicy, RecurrentPolicy
from palf_dist.types import CONTROL_INDEX

POINTS = 21
"""Values of each feature."""
SPREAD = 2.0
"""How far they go to either side of its mean, in standard deviations over meta-training."""
HELD = 10
"""Refreshes for which a policy that remembers is in the same state."""
_SHARES = (
    *("time", "entropy", "accuracy", "noise_rate", "disagreement", "bimodality", "imbalance", "neighbour_agreement"),
    *("validation_accuracy", "validation_noise_rate"),
)
_LOWEST = dict.fromkeys(("loss", "loss_variance", "log_rows", "prior_shift", "validation_loss"), 0.0)
RANGES = dict.fromkeys(_SHARES, (0.0, 1.0)) | {name: (low, math.inf) for name, low in _LOWEST.items()}
RANGES |= {"log_classes": (math.log(2), math.inf)}
"""What a feature can be; those that are not in here, anything."""


@dataclass(frozen=True)
class Explanation:
    """For S features and C controls, P values of each feature."""

    features: tuple[str, ...]  #: their names
    controls: tuple[str, ...]  #: that the policy sets, of types.CONTROLS; mixture weights, then hyper-parameters
    usual_state: np.ndarray  #: [S] raw
    usual: np.ndarray  #: [C] the controls there
    values: np.ndarray  #: [S, P] raw values of each feature
    curves: np.ndarray  #: [S, P, C] the controls when that feature has that value and the others are as usual

    @property
    def reach(self) -> np.ndarray:
        """Largest minus smallest value of each control along each feature, [S, C]."""
        return np.ptp(self.curves, 1)

    @property
    def order(self) -> list[int]:
        """The features, those first along which the controls go furthest; each control counts the same."""
        widest = self.reach.max(0, initial=1e-12)
        return sorted(range(len(self.features)), key=lambda row: -float((self.reach[row] / widest).sum()))


def explain(policy: Policy, phi: Tensor) -> Explanation:
    """What ``policy`` with parameters ``phi`` does. One that remembers has had ``HELD`` refreshes in each state. Raises
    ConfigError for a policy that is no learned one."""
    if not isinstance(policy, LearnedPolicy):
        raise ConfigError(f"explain: {type(policy).__name__} is no learned policy, and these alone have states to show")
    usual, values = policy.mean.double().numpy(), grid_values(policy)
    controls = (*policy.spec.basis, *policy.spec.hyperparameters)
    states = torch.from_numpy(held(np.concatenate([usual[None], grid_states(usual, values)])))
    with torch.no_grad():
        along = asked_along(policy, phi.detach().double().cpu(), states)
    found = along[:, -1, [CONTROL_INDEX[name] for name in controls]].numpy()
    return Explanation(
        policy.features, controls, usual, found[0], values, found[1:].reshape(*values.shape, len(controls))
    )


def grid_values(policy: LearnedPolicy) -> np.ndarray:
    """The values [S, P] of each feature, within what it can be. Of time: the whole run."""
    mean, std = policy.mean.double().numpy(), policy.std.double().numpy()
    lowest, highest = np.array([RANGES.get(name, (-math.inf, math.inf)) for name in policy.features]).reshape(-1, 2).T
    low, high = np.maximum(mean - SPREAD * std, lowest), np.minimum(mean + SPREAD * std, highest)
    whole = np.array([name == "time" for name in policy.features], bool)
    return np.linspace(np.where(whole, 0.0, low), np.where(whole, 1.0, high), POINTS, axis=1)


def grid_states(usual: np.ndarray, values: np.ndarray) -> np.ndarray:
    """States [S * P, S]: in each one feature has one of its ``values`` [S, P], and the others are as ``usual`` [S]."""
    states = np.tile(usual, (*values.shape, 1))
    each = np.arange(len(usual))
    states[each, :, each] = values
    return states.reshape(values.size, len(usual))


def held(states: np.ndarray) -> np.ndarray:
    """Histories [N, R, S] that stay in one of ``states`` [N, S]."""
    return np.repeat(states[:, None], HELD, 1)


def asked_along(policy: Policy, phi: Tensor, states: Tensor) -> Tensor:
    """The controls [N, R, U] that the policy asks for at each refresh of inner runs with raw states [N, R, S]."""
    if isinstance(policy, RecurrentPolicy):
        return policy.controls_along(phi, states).transpose(0, 1)
    assert not policy.reads_history, "how such a policy reads its history is not known here"
    return policy.controls(phi, states.flatten(0, 1)).unflatten(0, states.shape[:2])
