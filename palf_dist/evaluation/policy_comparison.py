"""How far two policies differ in what they do: their controls in the same states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from palf_dist.config_loading import load_config
from palf_dist.evaluation.inner_runs import dataset_facts, read_inner_runs
from palf_dist.evaluation.policy_card import policy_place, run_of
from palf_dist.evaluation.report import last_trajectories
from palf_dist.explanation import POINTS, asked_along, grid_states, grid_values, held
from palf_dist.policies.policy_file import PolicyArtefact
from palf_dist.run_directory import CONFIG
from palf_dist.storage import join
from palf_dist.types import CONTROL_INDEX, CONTROLS


@dataclass(frozen=True)
class States:
    """N histories of R states that policies are asked in; a feature that one does not read is not shown to it."""

    features: tuple[str, ...]
    values: np.ndarray  # [N, R, S] raw; NaN where unknown
    origin: str  # where they are from, for people


@dataclass(frozen=True)
class Difference:
    """Of C controls that either of two policies sets; those that one does not set have their fixed values there."""

    controls: tuple[str, ...]
    means: np.ndarray  # [2, C] of each policy
    mean_change: np.ndarray  # [C] mean absolute difference
    largest_change: np.ndarray  # [C]


def compare_behaviour(first: PolicyArtefact, second: PolicyArtefact, states: States) -> Difference:
    """What both do in these states."""
    names = {name for item in (first, second) for name in (*item.spec.basis, *item.spec.hyperparameters)}
    controls = tuple(name for name in CONTROLS if name in names)
    columns = [CONTROL_INDEX[name] for name in controls]
    both = np.stack([_asked(item, states)[:, :, columns] for item in (first, second)]).reshape(2, -1, len(columns))
    change = np.abs(both[1] - both[0])
    return Difference(controls, both.mean(1), change.mean(0), change.max(0))


def states_for(places: Sequence[str], artefacts: Sequence[PolicyArtefact]) -> States:
    """Those that the first of these policies which lies in a run met there; where none does a grid of states."""
    for place in places:
        run = run_of(policy_place(place))
        if run is not None and (found := _recorded(run)) is not None:
            return found
    return _grid(artefacts)


def _recorded(run: str) -> States | None:
    """Of the last outer steps of a run; None where it has kept none."""
    config, table = load_config(join(run, CONFIG)), last_trajectories(run)
    if table is None:
        return None
    names = table["dataset"].unique().to_pylist()
    runs = read_inner_runs(table, config, dataset_facts(names, config.data.train))
    if not runs.count:
        return None
    return States(runs.features, runs.states, f"{runs.count} inner runs of the last outer steps of {run}")


def _grid(artefacts: Sequence[PolicyArtefact]) -> States:
    """One feature at a time of all that they read; usual values and spreads are those of the first that reads it."""
    usual: dict[str, float] = {}
    values: dict[str, np.ndarray] = {}
    for artefact in artefacts:
        policy = artefact.policy()
        for name, mean, row in zip(policy.features, policy.mean.tolist(), grid_values(policy), strict=True):
            usual.setdefault(name, mean)
            values.setdefault(name, row)
    middle = np.array([*usual.values()])
    grid = np.array([*values.values()]).reshape(len(middle), POINTS)
    states = np.concatenate([middle[None], grid_states(middle, grid)])
    origin = f"a grid: {POINTS} values of each of {len(usual)} features, the others at their usual values"
    return States(tuple(usual), held(states), origin)


def _asked(artefact: PolicyArtefact, states: States) -> np.ndarray:
    """The controls [N, R, U]."""
    place = {name: column for column, name in enumerate(states.features)}
    own = np.full((*states.values.shape[:2], len(artefact.spec.features)), np.nan)
    for column, name in enumerate(artefact.spec.features):
        if name in place:
            own[:, :, column] = states.values[:, :, place[name]]
    with torch.no_grad():
        return asked_along(artefact.policy(), torch.from_numpy(artefact.phi).double(), torch.from_numpy(own)).numpy()
