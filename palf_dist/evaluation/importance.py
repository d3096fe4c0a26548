"""Permutation importance of the state features for the controls (Breiman 2001, of the policy's output in place of an
error): how far the controls go when the policy is given a feature's values of another task, or of other moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palf_dist.explanation import asked_along
from palf_dist.policies import Policy
from palf_dist.randomness import random_generator
from palf_dist.types import CONTROL_INDEX

SEEDS = 10
"""Permutations of each feature."""

STILL = 1e-9
"""Spread of a control up to which it is only rounding that moves it."""


@dataclass(frozen=True)
class Importance:
    """Mean absolute change of each control in units of its spread (the standard deviation over all inner runs and
    refreshes of what the policy says of the recorded states); 0 for a control that it leaves where it is. For Q
    permutations, F features, C controls and N inner runs."""

    features: tuple[str, ...]
    controls: tuple[str, ...]  # of types.CONTROLS
    among: np.ndarray  # [Q, F, C] the feature's values of another task, at the same inner steps
    along: np.ndarray  # [Q, F, C] the same task's values at other refreshes of its run
    by_run: np.ndarray  # [N, F] both added up, mean over permutations and controls


def permutation_importance(
    policy: Policy, phi: Tensor, states: np.ndarray, controls: Sequence[str], *keys: int | str
) -> Importance:
    """Of the features of ``policy`` with parameters ``phi`` for these ``controls``.

    Args:
        states: raw features [N, R, S] of N inner runs at R refreshes, NaN where unknown.
        controls: names of C columns of ``types.CONTROLS``.
        keys: of the random permutations.

    A feature that is the same for all tasks at an inner step, like time, has 0 among tasks, and one that stays the same
    along each run has 0 along the run. For a policy that remembers, a whole history is exchanged. What the policy asks
    for is meant, before its shield.
    """
    columns = [CONTROL_INDEX[name] for name in controls]
    given = torch.from_numpy(np.asarray(states, np.float64))

    def asked(changed: Tensor) -> np.ndarray:
        return asked_along(policy, phi.double(), changed)[:, :, columns].numpy()

    with torch.no_grad():
        base = asked(given)
        spread = base.std((0, 1))
        scale = np.where(spread > STILL, 1 / np.maximum(spread, STILL), 0.0)
        found = np.zeros((2, SEEDS, len(policy.features), len(states), len(columns)))
        for seed in range(SEEDS):
            random = random_generator("importance", *keys, seed)
            others = random.permutation(len(states))
            moments = random.permuted(np.tile(np.arange(states.shape[1]), (len(states), 1)), axis=1)
            for feature in range(len(policy.features)):
                own = given[:, :, feature]
                for kind, values in enumerate((own[others], own.gather(1, torch.from_numpy(moments)))):
                    changed = given.clone()
                    changed[:, :, feature] = values
                    found[kind, seed, feature] = np.abs(asked(changed) - base).mean(1) * scale
    among, along = found.mean(3)
    return Importance(policy.features, tuple(controls), among, along, found.sum(0).mean((0, 3)).T)
