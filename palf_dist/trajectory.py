"""The Arrow schema of what a worker reports, one row per task and recorded inner step, and its Parquet dataset.

trajectories/step=000123/group-0000.parquet, one file a unit, is a hive-partitioned dataset that any Parquet reader
understands; every column carries its description in the file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from palf_dist.atomic import write_atomic
from palf_dist.errors import RunDirectoryError
from palf_dist.run_directory import CONFIG, TRAJECTORIES
from palf_dist.storage import Storage, is_uri
from palf_dist.types import CONTROLS, HYPERPARAMETERS, NUM_BASIS, TaskSpec, Unit

WRITE_SECONDS = 20.0
"""How long a worker waits for the storage to take a trajectory."""

QUIET_SECONDS = 60.0
"""How long it leaves storage alone that did not."""


def _column(name: str, kind: pa.DataType, description: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"description": description})


CONTROL_COLUMNS = tuple(f"alpha_{name}" for name in CONTROLS[:NUM_BASIS]) + HYPERPARAMETERS

_KEYS = (
    _column("outer_step", pa.int32(), "outer step of the unit of work"),
    _column("group", pa.int32(), "task group within the outer step"),
    _column("task", pa.int32(), "task within the group"),
    _column("dataset", pa.string(), "name of the dataset"),
    _column("architecture", pa.int32(), "index into the configuration's tasks.architectures"),
    _column("optimiser", pa.string(), "inner optimiser: sgd, momentum or adam"),
    _column("train_size", pa.int32(), "training rows"),
    _column(
        "noise_kind",
        pa.string(),
        "uniform: resampled over all k classes; pair_flip: y -> y + 1 mod k; class_dependent and instance_dependent: "
        "wrong labels by the class, or by the inputs",
    ),
    _column(
        "noise_rate",
        pa.float32(),
        "share of training labels that the noise was applied to; of the last two kinds, share of wrong ones",
    ),
    _column("imbalance", pa.float32(), "largest : smallest class frequency in training"),
    _column("target_prior", pa.string(), "class frequencies of the judged rows: train or uniform"),
    _column("inner_step", pa.int32(), "inner step at which the row was recorded"),
)
_RESULTS = (
    _column("adaptive_loss", pa.float32(), "what the inner model minimises, on the minibatch"),
    _column("cross_entropy", pa.float32(), "plain cross-entropy on the minibatch"),
    _column("train_accuracy", pa.float32(), "accuracy on the minibatch against its noisy labels"),
    _column("outer_loss", pa.float32(), "on clean meta-validation rows; null except at checkpoints", nullable=True),
    _column("meta_validation_accuracy", pa.float32(), "on the same rows; null where not measured", nullable=True),
)


def schema(feature_names: Sequence[str]) -> pa.Schema:
    """The schema of a trajectory: keys, one state_<name> column a feature, controls, results."""
    features = [
        _column(f"state_{name}", pa.float32(), f"training-state feature {name}; null where undefined", nullable=True)
        for name in feature_names
    ]
    controls = [
        _column(name, pa.float32(), f"mixture weight of {name[6:]}" if index < NUM_BASIS else f"hyper-parameter {name}")
        for index, name in enumerate(CONTROL_COLUMNS)
    ]
    return pa.schema([*_KEYS, *features, *controls, *_RESULTS])


SCHEMA = schema(())
"""The columns every trajectory has; a policy's state features stand between inner_step and the controls."""


def build_table(
    unit: Unit, specs: Sequence[TaskSpec], records: Mapping[str, np.ndarray], feature_names: Sequence[str]
) -> pa.Table:
    """Rows of one unit, ordered by inner step, then task.

    ``records`` (R recorded inner steps): inner_step [R], state [R, G, S], controls [R, G, U] and, each [R, G],
    adaptive_loss, cross_entropy, train_accuracy, outer_loss, meta_validation_accuracy. NaN becomes null in the nullable
    columns and stays NaN, a diverged run, in the others.
    """
    steps, tasks = len(records["inner_step"]), len(specs)
    assert records["state"].shape == (steps, tasks, len(feature_names))
    assert records["controls"].shape == (steps, tasks, len(CONTROLS))
    task = np.tile(np.arange(tasks), steps)
    names = [field.name for field in _KEYS]
    columns = {"outer_step": np.full(steps * tasks, unit.outer_step), "group": np.full(steps * tasks, unit.group)}
    columns |= {"task": task, "inner_step": np.repeat(records["inner_step"], tasks)}
    for name in names[names.index("dataset") : names.index("inner_step")]:
        columns[name] = pa.array([getattr(spec, name) for spec in specs]).take(pa.array(task))
    columns |= {f"state_{name}": records["state"][..., index].ravel() for index, name in enumerate(feature_names)}
    columns |= {name: records["controls"][..., index].ravel() for index, name in enumerate(CONTROL_COLUMNS)}
    columns |= {field.name: records[field.name].ravel() for field in _RESULTS}
    fields = schema(feature_names)
    arrays = [
        pa.array(columns[field.name], from_pandas=field.nullable).cast(field.type)  # from_pandas: NaN becomes null
        for field in fields
    ]
    return pa.Table.from_arrays(arrays, schema=fields)


def trajectory_name(unit: Unit) -> str:
    """Where the trajectory of a unit lies in its run directory."""
    return f"{TRAJECTORIES}/step={unit.outer_step:06d}/group-{unit.group:04d}.parquet"


def to_parquet(table: pa.Table) -> bytes:
    """The content of a trajectory's file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_trajectory(run_dir: Path, unit: Unit, content: bytes) -> Path:
    """Write the trajectory of one unit, from ``to_parquet``. A unit that is done again writes the same file."""
    path = run_dir / trajectory_name(unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return path


class TrajectoryWriter:
    """Puts the trajectories of a worker's own units where every node can reach them, past the driver."""

    def __init__(self, uri: str) -> None:
        """``uri``: the run directory. Nothing is asked of it yet."""
        self._uri = uri
        self._storage: Storage | None = None
        self._thread = ThreadPoolExecutor(1, "palf-trajectory")
        self._quiet_until = 0.0

    def write(self, unit: Unit, table: pa.Table) -> pa.Table | None:
        """None once the storage has it; where it does not take it in time the table, which the driver then keeps."""
        if time.monotonic() < self._quiet_until:
            return table
        try:
            self._thread.submit(self._write, trajectory_name(unit), to_parquet(table)).result(WRITE_SECONDS)
        except (OSError, RunDirectoryError):  # a timeout is an OSError too
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            return table
        return None

    def _write(self, name: str, content: bytes) -> None:
        if self._storage is None:
            storage = Storage(self._uri)
            storage.read(CONFIG)  # a node that lacks the mount would otherwise fill a folder of its own
            self._storage = storage
        self._storage.write(name, content)


def trajectory_steps(run_dir: str | Path) -> list[int]:
    """Outer steps of which there are trajectories, in order. ``run_dir`` may be a URI. Raises OSError."""
    storage = Storage(_uri(run_dir))
    folders = (name.rpartition("step=")[2] for name in storage.names(TRAJECTORIES, recursive=False))
    return sorted(int(step) for step in folders if step.isdigit())


def read_trajectories(
    run_dir: str | Path, columns: Sequence[str] | None = None, steps: Sequence[int] | None = None
) -> pa.Table:
    """Trajectories of a run, ordered by outer step and group: all, or some columns, or some outer steps.

    ``run_dir`` may be a URI. A run without trajectories gives an empty table of SCHEMA. Raises OSError.
    """
    storage = Storage(_uri(run_dir))
    folders = [TRAJECTORIES] if steps is None else [f"{TRAJECTORIES}/step={step:06d}" for step in sorted(set(steps))]
    names = [name for folder in folders for name in storage.names(folder) if name.endswith(".parquet")]
    if not names:
        return SCHEMA.empty_table().select(columns or SCHEMA.names)
    filesystem, paths = storage.open_dataset_files(names)
    return ds.dataset(paths, format="parquet", filesystem=filesystem).to_table(columns=columns and list(columns))


def _uri(run_dir: str | Path) -> str:
    return str(run_dir) if is_uri(run_dir) else Path(run_dir).absolute().as_uri()
