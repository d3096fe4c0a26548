"""The trainings of one search: what was asked, what came back, and the best of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from palf_dist.learnloss.records import Waypoint


@dataclass(frozen=True)
class Training:
    """One training that has been told. Its error is not finite when it failed."""

    identifier: int
    kind: str  # why it was asked, see Proposal
    weights: np.ndarray  # [k] it was trained with
    error: float  # of the trained model; of the last snapshot where it was ended early
    complete: bool
    predicted: float | None  # error that the model of the step promised
    cost: int  # gradient evaluations, those of the sensitivity included
    slope: np.ndarray | None = None  # [k] d e / d lambda
    curvature: np.ndarray | None = None  # [k, k]
    waypoints: tuple[Waypoint, ...] = ()  # of a training on the fly

    @property
    def usable(self) -> bool:
        return self.complete and bool(np.isfinite(self.error))

    def state(self) -> dict[str, Any]:
        """As JSON values; not finite numbers as text, which JSON has no form for."""
        values = asdict(self)
        for name in ("weights", "slope", "curvature"):
            if values[name] is not None:
                values[name] = values[name].tolist()
        values["waypoints"] = [waypoint.state() for waypoint in self.waypoints]
        return {**values, "error": repr(self.error)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Training:
        arrays = {
            name: None if state[name] is None else np.array(state[name], float)
            for name in ("weights", "slope", "curvature")
        }
        waypoints = tuple(Waypoint.from_state(item) for item in state["waypoints"])
        return cls(**{**state, **arrays, "error": float(state["error"]), "waypoints": waypoints})


@dataclass(frozen=True)
class Best:
    """The best final so far."""

    identifier: int  # of its first training
    weights: np.ndarray  # [k]
    error: float  # mean over its trainings
    trainings: int  # how many times these weights were trained


@dataclass(frozen=True)
class BestSnapshot:
    """The best model seen at any moment, perhaps in the middle of a training."""

    identifier: int
    row: int  # among the snapshots of that training
    error: float


@dataclass(frozen=True)
class TuneReport:
    """What a search came to."""

    best: Best | None
    best_snapshot: BestSnapshot | None
    trainings: int  # complete ones, failed ones included
    failed: int
    cost: int  # gradient evaluations in all
    predicted_gain: float | None  # median over the steps by a model of the decrease it promised
    realised_gain: float | None  # median of what those steps brought; negative: worse than where they began


def best_of(trainings: list[Training], noisy: bool) -> Best | None:
    """The least mean error over equal weights. In a noisy search, once some weights were trained more than once
    (retests), single lucky trainings do not count: that is the winner's curse."""
    groups = _by_weights(trainings)
    tested = [group for group in groups if len(group) > 1] if noisy else []
    if not groups:
        return None
    group = min(tested or groups, key=_mean_error)
    return Best(group[0].identifier, group[0].weights, _mean_error(group), len(group))


def promising(trainings: list[Training]) -> Training | None:
    """The best single training, where it looks better than whatever was trained more than once."""
    groups = _by_weights(trainings)
    singles = [group[0] for group in groups if len(group) == 1]
    tested = min((_mean_error(group) for group in groups if len(group) > 1), default=np.inf)
    best = min(singles, key=lambda training: training.error, default=None)
    return best if best is not None and best.error < tested else None


def _by_weights(trainings: list[Training]) -> list[list[Training]]:
    groups: dict[bytes, list[Training]] = {}
    for training in trainings:
        if training.usable:
            groups.setdefault(training.weights.tobytes(), []).append(training)
    return list(groups.values())


def _mean_error(group: list[Training]) -> float:
    return float(np.mean([training.error for training in group]))
