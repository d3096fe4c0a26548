"""Trajectories read back are what was played, one row per refresh."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from palf_dist.config import DatasetSource
from palf_dist.evaluation.inner_runs import UNKNOWN, dataset_facts, read_inner_runs
from palf_dist.trajectory import SCHEMA
from tests.evaluation.recorded import (
    FAMILIES,
    by_noise,
    constant,
    facts,
    played,
    rising,
    run_config,
    specs,
    time,
)

CONTROLS = {"robust_ce": rising, "ce": lambda task, times: 1 - rising(task, times), "e": by_noise, "la": constant(0.7)}
FEATURES = {"time": time, "noise_rate": by_noise}


def test_whole_runs_are_read_as_they_were_played() -> None:
    table = pa.concat_tables([played(step, CONTROLS, FEATURES) for step in (8, 9)])
    runs = read_inner_runs(table, run_config(), facts())
    assert runs.times == pytest.approx(np.arange(15) / 15)
    assert runs.names == ("alpha_ce", "alpha_robust_ce", "e"), "la, wd and the others stay where they are"
    tasks = specs(8) * 2
    assert runs.controls.shape == (36, 15, 3) and (runs.count, runs.left_out) == (36, 0)
    for index, name in enumerate(("ce", "robust_ce", "e")):
        expected = [CONTROLS[name](task, runs.times) for task in tasks]
        assert runs.controls[:, :, index] == pytest.approx(np.array(expected), abs=1e-6)
    assert runs.features == ("time", "noise_rate")
    assert runs.states[:, :, 0] == pytest.approx(np.tile(runs.times, (36, 1)))
    assert runs.states[:, 0, 1] == pytest.approx([0.1 + task.noise_rate for task in tasks])
    assert runs.clusters.tolist() == [task.dataset for task in tasks] and not runs.policy.any()
    assert runs.spread == pytest.approx(runs.controls.reshape(-1, 3).std(0))


def test_kinds_of_tasks() -> None:
    groups = read_inner_runs(played(0, CONTROLS, FEATURES), run_config(), facts()).groups
    tasks = specs(0)
    assert list(groups) == ["family", "noise", "architecture"]
    assert list(groups["family"]) == ["image", "tabular", "text"]
    assert groups["family"]["text"].tolist() == [FAMILIES[task.dataset] == "text" for task in tasks]
    assert list(groups["noise"]) == ["no label noise", "noise up to 0.3", "noise above 0.3"]
    assert groups["noise"]["noise up to 0.3"].tolist() == [task.noise_rate == 0.2 for task in tasks]
    assert list(groups["architecture"]) == ["conv", "mlp 2", "mlp 3"], "two of a kind go by their place"
    assert groups["architecture"]["mlp 3"].tolist() == [task.architecture == 2 for task in tasks]


def test_readings_of_the_outer_loss_are_not_refreshes() -> None:
    alone, both = (
        read_inner_runs(played(0, CONTROLS, FEATURES, every=every), run_config(), facts()) for every in (None, 25)
    )
    assert played(0, CONTROLS, FEATURES, every=25).num_rows == 18 * (15 + 6)
    assert (both.controls == alone.controls).all() and (both.states == alone.states).all() and not both.left_out


def test_what_is_not_whole_or_not_finite_is_left_out_and_counted() -> None:
    table = played(0, CONTROLS, FEATURES)
    place = table.column_names.index("e")
    values = table["e"].to_numpy().copy()
    values[(table["task"].to_numpy() == 4) & (table["inner_step"].to_numpy() == 70)] = np.nan
    broken = table.set_column(place, table.schema.field("e"), pa.array(values))
    short = broken.filter(~((pc.field("task") == 7) & (pc.field("inner_step") > 100)))
    runs = read_inner_runs(short, run_config(), facts())
    assert (runs.count, runs.left_out) == (16, 2) and np.isfinite(runs.controls).all()
    assert runs.controls[:, 0, 2] == pytest.approx(
        [0.1 + task.noise_rate for index, task in enumerate(specs(0)) if index not in (4, 7)]
    )
    assert read_inner_runs(short, run_config("inner.steps=300"), facts()).count == 0


def test_the_windows_of_a_run_are_joined() -> None:
    """Of 50 inner steps each: outer steps 3, 4 and 5 are one inner run, 6 the begin of another."""
    table = played(0, CONTROLS, FEATURES)
    parts = []
    for outer_step in (3, 4, 5, 6):
        window = outer_step % 3
        part = table.filter(pc.equal(pc.divide(table["inner_step"], 50), window))
        own = pa.array([outer_step] * part.num_rows, pa.int32())
        parts.append(part.set_column(0, part.schema.field("outer_step"), own))
    runs = read_inner_runs(pa.concat_tables(parts), run_config("estimator.window=50"), facts())
    whole = read_inner_runs(table, run_config(), facts())
    assert (runs.controls == whole.controls).all() and (runs.count, runs.left_out) == (18, 18)


def test_runs_of_several_directories_stay_apart() -> None:
    table = played(0, CONTROLS, FEATURES)
    both = pa.concat_tables([table.append_column("run", pa.array([index] * table.num_rows)) for index in (0, 1)])
    assert read_inner_runs(both, run_config(), facts()).policy.tolist() == [0] * 18 + [1] * 18


def test_a_policy_that_moves_nothing_and_no_trajectories() -> None:
    still = read_inner_runs(played(0, {"e": constant(0.3)}, FEATURES), run_config(), facts())
    assert still.names == () and still.controls.shape == (18, 15, 0)
    none = read_inner_runs(SCHEMA.empty_table(), run_config(), {})
    assert (none.count, none.left_out, none.names) == (0, 0, ())


def test_facts_of_datasets() -> None:
    sources = [
        DatasetSource(name="digits"),
        DatasetSource(name="optdigits"),
        DatasetSource(name="own", path="own.parquet", family="text"),
        DatasetSource(name="twin", path="own.parquet"),
        DatasetSource(name="wine", path="other.parquet"),
    ]
    rows = [{"dataset": "judged", "family": "image", "origin": "somewhere"}]
    found = dataset_facts(["digits", "optdigits", "own", "twin", "wine", "judged", "strange"], sources, rows)
    assert {name: fact.family for name, fact in found.items()} == {
        "digits": "image",
        "optdigits": "tabular",
        "own": "text",
        "twin": UNKNOWN,
        "wine": UNKNOWN,  # not that of the registry
        "judged": "image",
        "strange": UNKNOWN,
    }
    assert found["digits"].cluster == found["optdigits"].cluster and found["own"].cluster == found["twin"].cluster
    assert len({fact.cluster for fact in found.values()}) == 5
