"""What units need of memory, against what they take; and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from palf_dist import units
from palf_dist.errors import ConfigError
from palf_dist.memory import GB, Plan, halved, machine_memory, out_of_memory
from palf_dist.rehearsal import Meter, Need, Work, need, works
from palf_dist.types import Contribution, Unit
from tests import memory_cases

ADJOINT = Work("meta_gradient", 0, "adam")


def of_case(name: str) -> tuple[Need, int]:
    config, datasets, unit = memory_cases.case(name)
    kind = unit.kind if unit.kind == "meta_gradient" else "train"
    return need(config, datasets, Work(kind, 0, config.tasks.optimisers[0])), config.tasks.group_size


def measured(name: str) -> float:
    """In a fresh process; the method is told in ``tests.memory_cases``."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.memory_cases", name]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout))


def test_a_meter_counts_storages_from_their_making_to_their_end() -> None:
    outside = torch.ones(1000)
    with Meter() as meter:
        doubled = outside * 2
        view = doubled.view(10, 100)
        assert meter.live == 4000
        del doubled
        assert meter.live == 4000, "a view holds its storage"
        weight = torch.ones(1000, requires_grad=True)
        loss = (weight * view.flatten()).exp().sum()
        assert meter.live == 4000 + 4000 + 4000 + 4, "autograd keeps exp's result"
        del loss, view
        assert meter.live == 4000
    assert meter.peak >= 16000


@pytest.mark.parametrize("name", ["mlp adjoint adam", "conv unroll"])
def test_a_rehearsal_without_numbers_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_numbers, _ = of_case(name)
    monkeypatch.setattr("palf_dist.rehearsal.CHEAP", 0)
    without, _ = of_case(name)
    assert without.data == with_numbers.data
    assert without.work == pytest.approx(with_numbers.work, rel=0.03)


@pytest.mark.parametrize(
    ("every", "stability", "basis"),
    [(5, 0.0, None), (7, 0.0, None), (2, 1.0, None), (5, 0.0, ("ce", "elr", "bootstrap"))],
)
def test_the_rehearsal_of_a_few_steps_tells_the_tensors_of_all(
    every: int, stability: float, basis: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole unit under the meter, which does not see the allocator's part."""
    monkeypatch.setattr("palf_dist.rehearsal.HEAP", 1.0)
    config, datasets, unit = memory_cases.case("mlp adjoint adam")
    tasks = config.tasks.model_copy(update={"group_size": 5, "train_size": (400, 400)})
    outer = config.outer_loss.model_copy(update={"every": every, "stability": stability})
    inner = config.inner.model_copy(update={"steps": 30})
    policy = config.policy.model_copy(update={"basis": basis})
    config = config.model_copy(update={"tasks": tasks, "outer_loss": outer, "inner": inner, "policy": policy})
    runner = units.Runner(config, datasets)
    runner.run(unit, units.initial_policy(config), 0, memory_cases.prepared(config))
    with Meter() as meter:
        runner.run(unit, units.initial_policy(config), 0, memory_cases.prepared(config))
    found = need(config, datasets, ADJOINT)
    assert found.total(5) == pytest.approx(meter.peak, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp adjoint sgd, dense checkpoints", "conv select", "resnet adjoint adam"])
def test_the_estimate_is_what_a_fresh_process_grows_by(name: str) -> None:
    """As far as machines agree: oneDNN chooses a convolution's algorithm, and with it the scratch memory, by the
    processor, and a kernel that reclaims cold pages makes a slow process smaller."""
    found, tasks = of_case(name)
    assert 0.6 < measured(name) / found.total(tasks) < 1.4


def test_parts_double_until_they_fit() -> None:
    found = Need(data=1.0, work=10.0)
    assert found.total(12) == 132 and found.total(12, 5) == 12 + 30
    assert [found.parts(12, limit) for limit in (132, 131, 71, 41, 22, 21)] == [1, 2, 4, 8, 12, None]


def test_the_number_of_parts_is_a_function_of_the_configuration_alone() -> None:
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    whole = need(config, datasets, ADJOINT).total(48)
    limited = config.distributed.model_copy(update={"memory_per_worker": 0.6 * whole / GB, "workers": 7})
    config = config.model_copy(update={"distributed": limited})
    for available in (inf, whole, 0.6 * whole):  # the machine's memory refuses, it never chooses
        assert Plan(config, datasets, available).parts(ADJOINT, 48) == 2


def test_a_run_that_never_fits_is_refused_with_what_would() -> None:
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    found = need(config, datasets, ADJOINT)
    with pytest.raises(ConfigError) as told:
        Plan(config, datasets, found.total(48) / 2.1).check()
    message = str(told.value)
    assert message.startswith("tasks.group_size: a unit of 48 tasks (meta_gradient, mlp, adam) needs 0.6")
    assert "distributed.memory_per_worker: 0.3" in message and "in 4 parts" in message
    group_size = int(message.rpartition("tasks.group_size: ")[2])
    tasks = config.tasks.model_copy(update={"group_size": group_size})
    Plan(config.model_copy(update={"tasks": tasks}), datasets, found.total(48) / 2.1).check()
    little = config.distributed.model_copy(update={"memory_per_worker": found.work / 2 / GB})
    with pytest.raises(ConfigError, match=r"distributed\.memory_per_worker\); raise that, or lower inner\.steps"):
        Plan(config.model_copy(update={"distributed": little}), datasets).check()


def test_a_worker_on_a_gpu_that_is_too_small_refuses_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    units.Runner(config, datasets).check()  # the CPU's memory is the driver's matter
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for memory in (1e9, 1e8):
        monkeypatch.setattr(units.Runner, "_gpu_memory", lambda _, memory=memory: memory)
        runner = units.Runner(config, datasets)
        if memory == 1e9:
            runner.check()
        else:
            with pytest.raises(ConfigError, match=r"there are 0\.1 GB for each worker"):
                runner.check()


def test_every_kind_of_work_of_a_run_is_checked() -> None:
    config, datasets, _ = memory_cases.case("mlp adjoint adam")
    evaluation = config.evaluation.model_copy(update={"seeds": 1, "conditions": ("balanced",)})
    found = works(config.model_copy(update={"evaluation": evaluation}), datasets)
    assert found == {ADJOINT: 48, Work("train", 0, "adam"): 48, Work("evaluate", 0, "adam"): 4}


def test_what_there_is() -> None:
    assert 1e8 < machine_memory() < 1e14


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(told.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("expected scalar type Float")) and not out_of_memory(ValueError("x"))


def test_the_user_is_told_in_one_sentence() -> None:
    told = halved(Contribution(Unit("meta_gradient", 3, 1), 3, halvings=2))
    assert told.startswith("unit meta_gradient 3/1 ran out of memory and was done in 4 times as many parts")
