"""What the learned policy does while an inner model trains, by kind of task; whether its runs have phases; and which
state features move its controls. From the trajectories of the last outer steps of meta-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import torch

from palf_dist.config import RunConfig
from palf_dist.evaluation.change_points import FEWEST_REFRESHES, PAPER_PHASES, Phases, find_phases, phase_of
from palf_dist.evaluation.importance import Importance, permutation_importance
from palf_dist.evaluation.inference import Estimate, clustered_mean
from palf_dist.evaluation.inner_runs import WEIGHT, DatasetFacts, InnerRuns, read_inner_runs
from palf_dist.policies.policy_file import PolicyArtefact

ALL = "all"


@dataclass(frozen=True)
class Curve:
    """The mean of each control over the inner runs of one kind of task."""

    moments: Sequence[Sequence[Estimate]]  # at each of R refreshes, of each of C controls
    phases: Sequence[Sequence[Estimate | None]]  # over each of the paper's phases; None where no refresh is in it
    runs: int
    clusters: int

    def array(self, of: str) -> np.ndarray:
        """A field of the estimates at each refresh, [R, C]."""
        return np.array([[getattr(estimate, of) for estimate in row] for row in self.moments])


@dataclass(frozen=True)
class Interpretation:
    """All of it. What cannot be had is empty or None, with its reason in ``not_measured``."""

    runs: InnerRuns
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)  # ALL | family | noise | architecture
    phases: Mapping[str, Phases] = field(default_factory=dict)  # ALL, and each family
    importance: Importance | None = None  # mean over the policies
    not_measured: Mapping[str, str] = field(default_factory=dict)  # curves | phases | importance -> why


def interpret(
    trajectories: pa.Table,
    config: RunConfig,
    facts: Mapping[str, DatasetFacts],
    policies: Sequence[PolicyArtefact | None],
) -> Interpretation:
    """``policies``: of each run directory, by the number that the column ``run`` has (a single one: without the
    column); None where it has none that can be read. ``facts``: of all datasets in ``trajectories``."""
    runs = read_inner_runs(trajectories, config, facts)
    if problem := _nothing_to_show(runs):
        return Interpretation(runs, not_measured=dict.fromkeys(("curves", "phases", "importance"), problem))
    masks = {ALL: {ALL: np.ones(runs.count, bool)}, **runs.groups}
    curves = {by: {label: _curve(runs, mask) for label, mask in own.items()} for by, own in masks.items()}
    not_measured, phases, importance = {}, {}, None
    if len(runs.times) < FEWEST_REFRESHES:
        not_measured["phases"] = (
            f"the policy is asked {len(runs.times)} times in a run, and two boundaries take {FEWEST_REFRESHES}"
        )
    else:
        scaled = (runs.controls / runs.spread)[:, :, runs.independent]
        of = {ALL: masks[ALL][ALL], **runs.groups["family"]}
        phases = {
            label: find_phases(scaled[mask], runs.clusters[mask].tolist(), runs.times) for label, mask in of.items()
        }
    found = _importance(runs, policies)
    if isinstance(found, str):
        not_measured["importance"] = found
    else:
        importance = found
    return Interpretation(runs, curves, phases, importance, not_measured)


def _nothing_to_show(runs: InnerRuns) -> str:
    if not runs.count:
        return f"no inner run of the trajectories is whole and finite ({runs.left_out} are not)"
    return "" if runs.names else "the policy moves no control"


def _curve(runs: InnerRuns, mask: np.ndarray) -> Curve:
    controls, clusters = runs.controls[mask], runs.clusters[mask].tolist()
    phase = phase_of(runs.times)

    def means(values: np.ndarray) -> list[Estimate]:
        return [clustered_mean(column, clusters) for column in values.T]

    return Curve(
        moments=[means(controls[:, moment]) for moment in range(len(runs.times))],
        phases=[
            means(controls[:, phase == index].mean(1)) if (phase == index).any() else [None] * len(runs.names)
            for index in range(len(PAPER_PHASES))
        ],
        runs=len(controls),
        clusters=len(set(clusters)),
    )


def _importance(runs: InnerRuns, policies: Sequence[PolicyArtefact | None]) -> Importance | str:
    """The mean over the run directories, each with its own policy and its own states; or why there is none."""
    found = []
    for number in np.unique(runs.policy):
        artefact, mask = policies[number], runs.policy == number
        if artefact is None:
            return "there is no policy that can be read"
        policy = artefact.policy()
        if not policy.features:
            return "the policy reads no state"
        if missing := [name for name in policy.features if name not in runs.features]:
            return f"the trajectories do not hold what the policy reads: {', '.join(missing)}"
        if mask.sum() < 2:
            return "a single inner run has no other to take a state from"
        states = runs.states[mask][:, :, [runs.features.index(name) for name in policy.features]]
        controls = [runs.names[index].removeprefix(WEIGHT) for index in runs.independent]
        found.append(permutation_importance(policy, torch.from_numpy(artefact.phi), states, controls, int(number)))
    by_run = np.empty((runs.count, len(found[0].features)))
    for number, each in zip(np.unique(runs.policy), found, strict=True):
        by_run[runs.policy == number] = each.by_run
    if not by_run.any():
        return "the policy says the same of all that was recorded"
    among, along = (np.mean([getattr(each, kind) for each in found], 0) for kind in ("among", "along"))
    return replace(found[0], among=among, along=along, by_run=by_run)
