"""The inner runs that trajectories recorded, as arrays: what the policy read and what it set at each refresh, and what
kind of task it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palf_dist.config import DatasetSource, RunConfig
from palf_dist.evaluation.plots import NOISE_LEVELS, noise_level
from palf_dist.evaluation.statistics import clusters_of
from palf_dist.tasks.registry import REGISTRY
from palf_dist.trajectory import CONTROL_COLUMNS

MOVES = 1e-4
"""A control whose values all lie this close together is one that the policy leaves where it is."""

WEIGHT = "alpha_"
"""What the names of mixture weights begin with; their basis loss follows."""

UNKNOWN = "unknown family"

_KEYS = ["run", "outer_step", "group", "task"]


@dataclass(frozen=True)
class DatasetFacts:
    """What the trajectories do not say of a dataset."""

    family: str  # tabular | image | text | UNKNOWN
    cluster: str  # for standard errors: the same for datasets with a source in common


@dataclass(frozen=True)
class InnerRuns:
    """N whole inner runs with R refreshes, C controls that move and S state features."""

    times: np.ndarray  # [R] t/T of each refresh
    names: tuple[str, ...]  # of the controls: columns of a trajectory
    controls: np.ndarray  # [N, R, C]
    spread: np.ndarray  # [C] standard deviation of each over all inner runs and refreshes
    features: tuple[str, ...]
    states: np.ndarray  # [N, R, S] raw; NaN where unknown
    policy: np.ndarray  # [N] number of the run directory, each of which has a policy of its own
    clusters: np.ndarray  # [N] of the datasets
    groups: Mapping[str, Mapping[str, np.ndarray]]  # family | noise | architecture -> label -> which runs, [N] bool
    left_out: int  # inner runs that are not whole, or have a control that is not finite

    @property
    def count(self) -> int:
        return len(self.controls)

    @property
    def independent(self) -> list[int]:
        """Columns of the controls without the first of two mixture weights, which is 1 minus the second: whatever adds
        controls up would count it twice."""
        weights = [index for index, name in enumerate(self.names) if name.startswith(WEIGHT)]
        return [index for index in range(len(self.names)) if len(weights) != 2 or index != weights[0]]


def dataset_facts(
    names: Iterable[str], sources: Iterable[DatasetSource], rows: Iterable[Mapping[str, Any]] = ()
) -> dict[str, DatasetFacts]:
    """Of these datasets, by name. ``sources``: those that are trained on. ``rows``: of results.parquet, which know the
    datasets that another fold judges; of the others it is the registry, or the configuration and the path."""
    by_name = {source.name: source for source in sources}
    known = {row["dataset"]: row for row in rows}
    families, origins = {}, []
    for name in sorted(names):
        source, row = by_name.get(name, DatasetSource(name=name)), known.get(name, {})
        registered = REGISTRY.get(name) if source.path is None else None
        families[name] = row.get("family") or source.family or (registered.family if registered else UNKNOWN)
        origin = row.get("origin") or source.path or (registered.origin if registered else name)
        origins.append({"dataset": name, "origin": origin})
    return {name: DatasetFacts(families[name], cluster) for name, cluster in clusters_of(origins).items()}


def read_inner_runs(trajectories: pa.Table, config: RunConfig, facts: Mapping[str, DatasetFacts]) -> InnerRuns:
    """The whole inner runs of ``trajectories``; a column ``run`` tells those of several run directories apart.

    Rows that were recorded at a reading of the outer loss repeat the controls of the last refresh, and are left out.
    The windows of one inner run are joined, though the policy was another one in each.
    """
    steps = np.arange(0, config.inner.steps, config.policy.refresh)
    windows = -(-config.inner.steps // (config.estimator.window or config.inner.steps))
    states = [name for name in trajectories.column_names if name.startswith("state_")]
    columns = [name for name in CONTROL_COLUMNS if name in trajectories.column_names]
    if "run" not in trajectories.column_names:
        trajectories = trajectories.append_column("run", pa.array(np.zeros(trajectories.num_rows, np.int64)))
    at_refresh = trajectories.filter(pc.is_null(trajectories["meta_validation_accuracy"]))
    about = ["dataset", "architecture", "noise_rate"]
    frame = at_refresh.select([*_KEYS, *about, "inner_step", *states, *columns]).to_pandas()
    frame["outer_step"] //= windows
    frame = frame.sort_values([*_KEYS, "inner_step"], ignore_index=True)
    recorded = len(frame[_KEYS].drop_duplicates())
    frame = frame[np.isfinite(frame[columns]).all(axis=1) & frame["inner_step"].isin(steps)]
    frame = frame[frame.groupby(_KEYS)["inner_step"].transform("size") == len(steps)]

    def array(names: list[str]) -> np.ndarray:
        return frame[names].to_numpy(np.float64).reshape(len(frame) // len(steps), len(steps), len(names))

    first = frame.iloc[:: len(steps)]
    controls = array(columns)
    moves = np.ptp(controls, (0, 1)) > MOVES if len(controls) else np.zeros(len(columns), bool)
    kinds = [item.kind for item in config.tasks.architectures]
    architectures = [kind if kinds.count(kind) == 1 else f"{kind} {place + 1}" for place, kind in enumerate(kinds)]
    levels = [name for name, *_ in NOISE_LEVELS]
    labels = {
        "family": (sorted({fact.family for fact in facts.values()}), [facts[n].family for n in first["dataset"]]),
        "noise": (levels, [levels[index] for index in noise_level(first["noise_rate"].to_numpy())]),
        "architecture": (architectures, [architectures[index] for index in first["architecture"]]),
    }
    return InnerRuns(
        times=steps / config.inner.steps,
        names=tuple(np.array(columns)[moves].tolist()),
        controls=controls[:, :, moves],
        spread=controls[:, :, moves].std((0, 1)) if len(controls) else np.zeros(0),
        features=tuple(name.removeprefix("state_") for name in states),
        states=array(states),
        policy=first["run"].to_numpy(),
        clusters=np.array([facts[name].cluster for name in first["dataset"]], dtype=str),
        groups={
            by: {label: np.array(own) == label for label in order if label in own}
            for by, (order, own) in labels.items()
        },
        left_out=recorded - len(first),
    )
