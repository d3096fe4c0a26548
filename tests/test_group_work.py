"""A group done in parts gives what the whole gives, and memory that runs out makes parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palf_dist import units
from palf_dist.config import EstimatorConfig, OuterLossConfig, RunConfig
from palf_dist.faults import VARIABLE
from palf_dist.group_work import (
    CURVE_INTERVALS,
    EARLY_STOPPING_EVERY,
    Stretch,
    at_refreshes,
    final_accuracy,
    in_parts,
    join,
    measure,
    meta_gradient,
    moments,
    part_of,
)
from palf_dist.inner_loop import InnerLoop
from palf_dist.memory import GB, OutOfMemory
from palf_dist.outer_loss import accuracy
from palf_dist.rehearsal import Work, need
from palf_dist.types import Contribution, Rows
from tests import memory_cases
from tests.estimators.test_exact import ALONG_THE_RUN
from tests.groups import make_group
from tests.test_inner_loop import full_policy

ESTIMATORS = {
    "adjoint": EstimatorConfig(),
    "unroll": EstimatorConfig(kind="unroll"),
    "one_step": EstimatorConfig(kind="one_step"),
    "es": EstimatorConfig(kind="es", pairs=2),
    "pes": EstimatorConfig(kind="pes", pairs=2, window=3),
    "window": EstimatorConfig(window=3),
}


def stretches(estimator: EstimatorConfig, parts: int, dtype: torch.dtype, name: str = "mlp") -> list[Stretch]:
    """All windows of an inner run of five tasks, each done in ``parts`` parts."""
    config = RunConfig.model_validate(
        {
            "data": {"train": ["iris"], "held_out": ["wine"]},
            "estimator": estimator,
            "outer_loss": OuterLossConfig(every=2, running_sum=0.5, information=0.5, gamma=0.1, **ALONG_THE_RUN),
        }
    )
    policy, phi = full_policy()
    policy.shield = 0.9
    group = make_group(name, size=5, steps=7, dtype=dtype)
    done: list[Stretch] = []
    while not done or done[-1].carried is not None:
        start = len(done) * (estimator.window or 7)
        stop = min(7, start + (estimator.window or 7))
        carried = done[-1].carried if done else None
        loops = [InnerLoop(part, policy, config.inner) for part in in_parts(group, parts)]
        made = [
            meta_gradient(config, loop, phi.to(dtype), start, stop, ("k",), part_of(carried, loop.group))
            for loop in loops
        ]
        done.append(join(made))
    return done


def gap(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference relative to the largest entry; unknown entries must be the same ones."""
    assert first.shape == second.shape and first.dtype == second.dtype
    first, second = (np.asarray(array, np.float64) for array in (first, second))
    assert np.array_equal(np.isnan(first), np.isnan(second))
    scale = np.nanmax(np.abs(first), initial=1e-30)
    return float(np.nanmax(np.abs(first - second), initial=0.0) / scale)


@pytest.mark.parametrize("parts", [2, 4, 5])
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parts_join_to_the_whole(kind: str, parts: int) -> None:
    """To 1e-12 in float64: they differ by rounding alone, whatever the estimator keeps or carries."""
    whole, joined = (stretches(ESTIMATORS[kind], n, torch.float64) for n in (1, parts))
    assert len(whole) == len(joined) == (3 if ESTIMATORS[kind].window else 1)
    for a, b in zip(whole, joined, strict=True):
        assert np.linalg.norm(a.estimate.gradient) > 0
        assert gap(a.estimate.gradient, b.estimate.gradient) < 1e-12
        assert a.estimate.outer_loss == pytest.approx(b.estimate.outer_loss, rel=1e-12)
        assert a.estimate.metrics == pytest.approx(b.estimate.metrics, rel=1e-12)
        assert all(gap(value, b.estimate.records[name]) < 1e-6 for name, value in a.estimate.records.items())
        assert (a.carried is None) == (b.carried is None)
        for name, value in (a.carried or {}).items():
            assert b.carried is not None and gap(value, b.carried[name]) < 1e-12


@pytest.mark.parametrize("name", ["mlp_deep_categorical", "conv", "resnet", "transformer"])
def test_in_float32_parts_differ_by_rounding(name: str) -> None:
    (whole,), (joined,) = (stretches(ESTIMATORS["adjoint"], n, torch.float32, name) for n in (1, 3))
    assert gap(whole.estimate.gradient, joined.estimate.gradient) < 1e-4


def test_the_other_work_in_parts() -> None:
    policy, phi = full_policy()
    group = make_group(size=5)
    config = memory_cases.case("mlp adjoint adam")[0]
    parts = [InnerLoop(part, policy, config.inner) for part in in_parts(group, 2)]
    whole = InnerLoop(group, policy, config.inner)
    measured = [measure(loop, phi, early_stopping=True) for loop in parts]
    for name, value in measure(whole, phi, early_stopping=True).items():
        joined = np.concatenate([each[name] for each in measured])
        assert joined == pytest.approx(value, rel=1e-9, nan_ok=True), name
    seen, *of_parts = (at_refreshes(loop, phi, lambda state: state.last_features) for loop in (whole, *parts))
    assert np.concatenate(of_parts, 1) == pytest.approx(seen, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_measured_run_is_the_run_itself(early_stopping: bool) -> None:
    """Its accuracy bit for bit, and its curve that of runs which are asked at each moment."""
    policy, phi = full_policy()
    inner = memory_cases.case("mlp adjoint adam")[0].inner
    group = make_group(size=5, steps=40, rows=20, learning_rate=0.5, dtype=torch.float32)
    loop = InnerLoop(group, policy, inner)
    got = measure(loop, phi.float(), early_stopping=early_stopping)
    assert np.array_equal(got["accuracy"], final_accuracy(loop, phi.float(), early_stopping=early_stopping))
    asked = moments(40)

    def read(theta: torch.Tensor, rows: Rows) -> np.ndarray:
        return accuracy(loop.evaluate(theta, rows), rows.labels, rows.mask, group.class_mask).double().numpy()

    assert (asked[0], asked[-1], len(asked)) == (0, 40, CURVE_INTERVALS + 1) and got["curve_accuracy"].shape == (5, 16)
    if early_stopping:
        # By a plain loop: at each moment the latest look so far with the best validation accuracy, at first the start.
        state = loop.start()
        looks = [(0, np.full(5, -1.0), read(state.theta, group.test))]
        for step in range(EARLY_STOPPING_EVERY, 41, EARLY_STOPPING_EVERY):
            loop.run(state, phi.float(), step)
            looks.append((step, read(state.theta, group.validation), read(state.theta, group.test)))
        for task in range(5):
            for index, moment in enumerate(asked):
                _, _, kept = max((v[task], step, t[task]) for step, v, t in looks if step <= moment)
                assert got["curve_accuracy"][task, index] == kept
            assert got["validation_accuracy"][task] == max(validation[task] for _, validation, _ in looks)
    else:
        state = loop.start()
        for index, step in enumerate(asked):
            loop.run(state, phi.float(), step)
            right = accuracy(
                loop.evaluate(state.theta, group.test), group.test.labels, group.test.mask, group.class_mask
            )
            assert np.array_equal(got["curve_accuracy"][:, index], right.double().numpy())
        assert np.array_equal(got["validation_accuracy"], read(state.theta, group.validation))
        logits = loop.evaluate(state.theta, group.validation)
        for task in range(5):
            real, classes = group.validation.mask[task] > 0, group.class_mask[task]
            labels = group.validation.labels[task, real]
            want = torch.nn.functional.cross_entropy(logits[task, real][:, classes], labels)
            assert got["validation_loss"][task] == pytest.approx(float(want), rel=1e-5)
    assert np.ptp(got["curve_accuracy"]) > 0
    for task in range(group.size):
        real = group.train.mask[task] > 0
        wrong = (group.train.labels[task] != group.clean_train_labels[task])[real].double().mean()
        assert got["wrong_share"][task] == pytest.approx(float(wrong))


def test_moments_are_the_steps_themselves_in_a_short_run() -> None:
    assert moments(4) == [0, 1, 2, 3, 4] and moments(1) == [0, 1]
    assert moments(150) == list(range(0, 151, 10))


@pytest.fixture(scope="module")
def small() -> tuple[RunConfig, dict[str, Any]]:
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    tasks = config.tasks.model_copy(update={"group_size": 6})
    inner = config.inner.model_copy(update={"steps": 10})
    return config.model_copy(update={"tasks": tasks, "inner": inner}), datasets


def contribution(
    small: tuple[RunConfig, dict[str, Any]], halvings: int = 0, memory: float | None = None
) -> Contribution:
    config, datasets = small
    if memory is not None:
        limited = config.distributed.model_copy(update={"memory_per_worker": memory})
        config = config.model_copy(update={"distributed": limited})
    (unit, *_) = units.meta_gradient_units(config, 0)
    runner = units.Runner(config, datasets)
    phi = units.initial_policy(config)
    return runner.run(unit, phi, 0, memory_cases.prepared(config), halvings=halvings)


def same(first: Contribution, second: Contribution) -> bool:
    assert first.gradient is not None and second.gradient is not None
    return first.gradient.tobytes() == second.gradient.tobytes() and first.trajectory.equals(second.trajectory)


def test_memory_that_runs_out_halves_the_batch(
    small: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contribution(small)
    faults = [
        {"point": "in_unit", "action": "oom", "once_file": str(tmp_path / "first")},
        {"point": "in_unit", "action": "oom", "once_file": str(tmp_path / "second")},
    ]
    monkeypatch.setenv(VARIABLE, json.dumps(faults))
    quarters = contribution(small)
    monkeypatch.delenv(VARIABLE)
    assert (whole.halvings, quarters.halvings) == (0, 2)
    assert same(quarters, contribution(small, halvings=2)), "the parts decide the bytes, not how they came about"
    assert whole.gradient is not None and quarters.gradient is not None
    assert gap(whole.gradient, quarters.gradient) < 2e-3, "float32; either is 8e-3 away from float64's here"
    assert quarters.trajectory.num_rows == whole.trajectory.num_rows
    assert quarters.trajectory.column("task").equals(whole.trajectory.column("task"))


def test_parts_that_the_configuration_asks_for_are_no_halvings(small: tuple[RunConfig, dict[str, Any]]) -> None:
    needed = need(*small, Work("meta_gradient", 0, "adam")).total(6)
    planned = contribution(small, memory=0.7 * needed / GB)
    assert planned.halvings == 0
    assert same(planned, contribution(small, halvings=1))


def test_one_task_that_takes_too_much_ends_it(
    small: tuple[RunConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps([{"point": "in_unit", "action": "oom"}]))
    with pytest.raises(
        OutOfMemory, match=r"^inner\.steps: memory ran out with one of 6 tasks .* smaller architecture$"
    ):
        contribution(small)


REAL = """
import resource, numpy as np, torch
from palf_dist import units
from tests import memory_cases
torch.set_num_threads(1)
config, datasets, unit = memory_cases.case("mlp unroll")
runner = units.Runner(config, datasets)
few = units.Runner(config.model_copy(update={"tasks": config.tasks.model_copy(update={"group_size": 2})}), datasets)
phi, prepared = units.initial_policy(config), memory_cases.prepared(config)
few.run(unit, phi, 0, prepared)
limit = memory_cases.memory_line("VmSize") + 60_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
made = runner.run(unit, phi, 0, prepared)
assert np.isfinite(made.gradient).all()
print(made.halvings)
"""


@pytest.mark.slow
def test_a_real_lack_of_memory_halves_the_batch() -> None:
    """The whole needs some 80 MB beyond what is loaded, and the process may have 60."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", REAL], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (1, 2, 3)
