"""Trajectories: every value in its place, nulls where the schema promises them, and a dataset that anybody can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from palf_dist.randomness import random_generator
from palf_dist.trajectory import (
    SCHEMA,
    TrajectoryWriter,
    build_table,
    read_trajectories,
    schema,
    to_parquet,
    trajectory_steps,
    write_trajectory,
)
from palf_dist.types import BASIS_LOSSES, CONTROL_INDEX, CONTROLS, HYPERPARAMETERS, TaskSpec, Unit

FEATURES = ("entropy", "gradient_norm", "time_left")


def specs(tasks: int) -> tuple[TaskSpec, ...]:
    return tuple(
        TaskSpec(("t", task), f"data-{task}", 60 + task, "pair_flip", task / 8, 1.0 + task, "uniform", task % 2, "sgd")
        for task in range(tasks)
    )


def records(steps: int, tasks: int) -> dict[str, np.ndarray]:
    generator = random_generator("trajectory", steps, tasks)
    found: dict[str, np.ndarray] = {
        "inner_step": np.arange(steps, dtype=np.int64) * 10,
        "state": generator.normal(size=(steps, tasks, len(FEATURES))),
        "controls": generator.random((steps, tasks, len(CONTROLS))),
    }
    for name in ("adaptive_loss", "cross_entropy", "train_accuracy", "outer_loss", "meta_validation_accuracy"):
        found[name] = generator.random((steps, tasks))
    return {name: array if name == "inner_step" else array.astype(np.float32) for name, array in found.items()}


def unit(step: int = 3) -> Unit:
    return Unit("meta_gradient", step, 1)


def test_schema_is_documented_and_complete() -> None:
    found = schema(FEATURES)
    assert all(field.metadata[b"description"] for field in found)
    assert set(SCHEMA.names) < set(found.names)
    assert [name for name in found.names if name.startswith("state_")] == [f"state_{name}" for name in FEATURES]
    assert {f"alpha_{name}" for name in BASIS_LOSSES} | set(HYPERPARAMETERS) < set(SCHEMA.names)
    nullable = {field.name for field in found if field.nullable}
    assert nullable == {"outer_loss", "meta_validation_accuracy"} | {f"state_{name}" for name in FEATURES}


def test_every_value_is_in_its_place() -> None:
    steps, tasks = 4, 3
    given = records(steps, tasks)
    given["outer_loss"][:3] = np.nan
    given["meta_validation_accuracy"][1] = np.nan
    given["state"][0, :, 1] = np.nan
    given["adaptive_loss"][2, 1] = np.nan
    table = build_table(unit(), specs(tasks), given, FEATURES)
    assert table.schema.equals(schema(FEATURES), check_metadata=True)
    rows = table.to_pylist()
    assert len(rows) == steps * tasks

    def value(array: np.ndarray) -> float | None:
        return None if np.isnan(array) else float(array)

    for index, row in enumerate(rows):
        step, task = divmod(index, tasks)
        spec = specs(tasks)[task]
        assert (row["outer_step"], row["group"], row["task"], row["inner_step"]) == (3, 1, task, 10 * step)
        assert row["dataset"] == spec.dataset and row["optimiser"] == "sgd" and row["architecture"] == task % 2
        assert (row["train_size"], row["noise_kind"], row["target_prior"]) == (60 + task, "pair_flip", "uniform")
        assert (row["noise_rate"], row["imbalance"]) == (spec.noise_rate, spec.imbalance)
        for feature, name in enumerate(FEATURES):
            assert row[f"state_{name}"] == value(given["state"][step, task, feature])
        for name, control in CONTROL_INDEX.items():
            column = f"alpha_{name}" if name in BASIS_LOSSES else name
            assert row[column] == float(given["controls"][step, task, control])
        for name in ("cross_entropy", "train_accuracy", "outer_loss", "meta_validation_accuracy"):
            assert row[name] == value(given[name][step, task])
        if (step, task) == (2, 1):
            assert np.isnan(row["adaptive_loss"]), "a diverged run is not a missing value"
        else:
            assert row["adaptive_loss"] == float(given["adaptive_loss"][step, task])


def test_shapes_are_checked() -> None:
    with pytest.raises(AssertionError):
        build_table(unit(), specs(3), records(4, 2), FEATURES)


def test_dataset_round_trip(tmp_path: Path) -> None:
    units = [Unit("meta_gradient", step, group) for step in (12, 0, 5) for group in (1, 0)]
    tables = {unit: build_table(unit, specs(2), records(3, 2), FEATURES) for unit in units}
    for unit, table in tables.items():
        write_trajectory(tmp_path, unit, to_parquet(table))
    assert (tmp_path / "trajectories" / "step=000012" / "group-0001.parquet").is_file()
    ordered = pa.concat_tables([tables[unit] for unit in sorted(tables)])
    for place in (tmp_path, str(tmp_path), tmp_path.as_uri()):
        assert trajectory_steps(place) == [0, 5, 12]
        assert read_trajectories(place).equals(ordered)
    found = read_trajectories(tmp_path)
    assert found.schema.equals(schema(FEATURES), check_metadata=True)
    few = read_trajectories(tmp_path, columns=["outer_loss", "task"], steps=[5, 12])
    assert few.column_names == ["outer_loss", "task"]
    assert few.num_rows == 24
    anybody = ds.dataset(tmp_path / "trajectories", partitioning="hive").to_table()
    assert anybody.num_rows == 36 and sorted(set(anybody["step"].to_pylist())) == [0, 5, 12]


def test_a_unit_done_again_writes_the_same_file(tmp_path: Path) -> None:
    table = build_table(unit(), specs(2), records(3, 2), FEATURES)
    path = write_trajectory(tmp_path, unit(), to_parquet(table))
    before = path.read_bytes()
    path.with_name(".group-0001.parquet.tmp").write_bytes(b"torn by kill -9")
    assert read_trajectories(tmp_path).num_rows == 6, "leftovers are not read"
    assert write_trajectory(tmp_path, unit(), to_parquet(table)) == path
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["group-0001.parquet"]


def test_runs_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have one file an outer step."""
    tables = [build_table(Unit("meta_gradient", 3, group), specs(2), records(3, 2), FEATURES) for group in (0, 1)]
    path = tmp_path / "trajectories" / "step=000003" / "part-0.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(to_parquet(pa.concat_tables(tables)))
    assert trajectory_steps(tmp_path) == [3]
    assert read_trajectories(tmp_path, steps=[3]).equals(pa.concat_tables(tables))


def test_workers_write_where_every_node_can_reach(tmp_path: Path) -> None:
    """The same bytes as the driver; a node that lacks the folder leaves the trajectory to the driver."""
    table = build_table(unit(), specs(2), records(3, 2), FEATURES)
    there, missing = tmp_path / "a b%", tmp_path / "not mounted"
    there.mkdir()
    (there / "config.yaml").touch()
    assert TrajectoryWriter(there.as_uri()).write(unit(), table) is None
    written = there / "trajectories" / "step=000003" / "group-0001.parquet"
    assert written.read_bytes() == write_trajectory(tmp_path, unit(), to_parquet(table)).read_bytes()
    assert [file.name for file in written.parent.iterdir()] == [written.name]
    writer = TrajectoryWriter(missing.as_uri())
    assert writer.write(unit(), table) is table
    missing.mkdir()
    (missing / "config.yaml").touch()
    assert writer.write(unit(), table) is table, "storage that failed is left alone for a while"
    assert not (missing / "trajectories").exists()
    assert TrajectoryWriter("nowhere://x/y").write(unit(), table) is table


def test_a_run_without_trajectories(tmp_path: Path) -> None:
    assert read_trajectories(tmp_path).schema.names == SCHEMA.names
    assert read_trajectories(tmp_path, columns=["task"]).num_rows == 0
