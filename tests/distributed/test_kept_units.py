"""Phases that go on where an earlier process was stopped or killed: tuning, calibrating, and the comparison."""

from __future__ import annotations

import io
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config
from palf_dist.distributed import kept_units, phases
from palf_dist.distributed.driver import evaluate_policy, meta_train
from palf_dist.distributed.kept_units import KeptPhase, KeptUnits
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.session import Session
from palf_dist.errors import RunDirectoryError
from palf_dist.policies.policy_file import load_policy, save_policy
from palf_dist.progress import Progress
from palf_dist.run_directory import UNITS
from palf_dist.tasks.datasets import load_all
from palf_dist.types import Contribution, Unit
from palf_dist.units import Runner
from palf_dist.workplace import Workplace
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import fault, small_config
from tests.distributed.test_driver import stop_after, train
from tests.processes import ROOT

METHODS = {"methods": ["policy", "ce", "mae"]}
CONFIG = small_config(evaluation={**small_config().evaluation.model_dump(), **METHODS})


class CountingRunner(Runner):
    """Notes what it runs."""

    done: Counter[str]

    def run(self, unit: Unit, *arguments: Any, **named: Any) -> Contribution:
        self.done[unit.kind] += 1
        return super().run(unit, *arguments, **named)


def counting() -> tuple[Counter[str], dict[str, Any]]:
    """What is run, by kind, and the argument that has it noted."""
    done: Counter[str] = Counter()
    return done, {"make_runner": type("RunnerOfThisTest", (CountingRunner,), {"done": done})}


def evaluate(policy: Path, run_dir: Path, config: RunConfig = CONFIG, **arguments: Any) -> list[dict[str, Any]]:
    progress = Progress(Console(file=io.StringIO()))
    rows = evaluate_policy(config, policy, run_dir=run_dir, progress=progress, **arguments)
    return [row | {"seconds": 0.0} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    meta_train(CONFIG, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def policy(trained: Path) -> Path:
    return trained / "best"


@pytest.fixture(scope="module")
def undisturbed(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return evaluate(policy, tmp_path_factory.mktemp("undisturbed") / "kept")


def test_an_evaluation_that_was_stopped_does_what_is_left(
    policy: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped in its tuning, then in its comparison, then let be; finished, it is read."""
    kept = tmp_path / "kept"
    for unit, resume in ((("tune", 0, 2), False), (("evaluate", 0, 0), True)):
        with pytest.raises(KeyboardInterrupt):
            evaluate(policy, kept, resume=resume, **stop_after(unit))
        assert (kept / UNITS).exists() and not (kept / "results.parquet").exists()
    done, runner = counting()
    assert evaluate(policy, kept, resume=True, **runner) == undisturbed
    assert done == {"evaluate": 2}, "of three methods on one group of tasks"
    assert {path.name for path in kept.iterdir()} == {".lock", "best", "config.yaml", "results.parquet"}
    done.clear()
    (kept / UNITS).mkdir()  # killed before it was removed
    assert evaluate(policy, kept, resume=True, **runner) == undisturbed
    assert not done and not (kept / UNITS).exists()
    (kept / "results.parquet").write_bytes(b"damaged")
    assert evaluate(policy, kept, resume=True, **runner) == undisturbed
    assert done == {"tune": 8, "evaluate": 3}


@pytest.mark.parametrize(("unit", "left"), [(("tune", 0, 5), {"tune": 2}), (("evaluate", 0, 0), {"evaluate": 2})])
def test_a_meta_training_does_too(
    unit: tuple[str, int, int], left: dict[str, int], trained: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    result, _ = train(CONFIG, run_dir, **stop_after(unit))
    assert result.interrupted and (run_dir / UNITS).exists()
    done, runner = counting()
    train(CONFIG, run_dir, resume=True, **runner)
    assert {kind: done[kind] for kind in left} == left and (unit[0] == "tune") == (done["meta_gradient"] > 0)
    assert fingerprint(run_dir) == fingerprint(trained) and not (run_dir / UNITS).exists()


def test_one_that_was_killed_as_it_began_takes_its_policy_again(
    policy: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    (kept / "best").mkdir(parents=True)
    (kept / "config.yaml").write_text(dump_config(CONFIG))
    shutil.copy(policy / "policy.safetensors", kept / "best")  # its card is not there
    assert evaluate(policy, kept, resume=True) == undisturbed
    assert (kept / "best" / "policy.json").read_bytes() == (policy / "policy.json").read_bytes()


def test_results_are_not_those_of_steps_that_were_lost(trained: Path, tmp_path: Path) -> None:
    """The last checkpoint of a finished run is lost, and what comes instead may be another policy."""
    run_dir = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    result, _ = train(CONFIG, run_dir, resume=True, **stop_after(("meta_gradient", 3, 0)))
    assert result.interrupted and not (run_dir / "results.parquet").exists()
    train(CONFIG, run_dir, resume=True)
    assert fingerprint(run_dir) == fingerprint(trained)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_does_what_is_left(
    policy: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(CONFIG.model_dump_json())
    script = f"""
from pathlib import Path
from palf_dist.config import RunConfig
from palf_dist.distributed import kept_units
from palf_dist.distributed.driver import evaluate_policy
kept_units.WRITE_SECONDS = 0.0
config = RunConfig.model_validate_json(Path("config.json").read_text())
evaluate_policy(config, {str(policy)!r}, run_dir="kept")
"""
    variables = {"PYTHONPATH": str(ROOT), faults.VARIABLE: fault("after_unit", ("tune", 0, 3), "kill")}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, **variables})
    assert ended.returncode == -signal.SIGKILL
    done, runner = counting()
    assert evaluate(policy, tmp_path / "kept", resume=True, **runner) == undisturbed
    assert done == {"tune": 5, "evaluate": 3}, "3 of 8 were kept"


def test_what_cannot_be_gone_on_with(policy: Path, trained: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        evaluate(policy, kept, stop=stop)
    with pytest.raises(RunDirectoryError, match=f"go on with palf-dist evaluate --resume {kept}"):
        meta_train(CONFIG, kept, resume=True)
    artefact = load_policy(policy)
    save_policy(tmp_path / "other", replace(artefact, phi=artefact.phi + 1))
    with pytest.raises(RunDirectoryError, match="keeps an evaluation of another policy; leave the policy out"):
        evaluate(tmp_path / "other", kept, resume=True)
    with pytest.raises(RunDirectoryError, match=f"go on with palf-dist meta-train --resume {trained}"):
        evaluate(policy, trained, resume=True)
    with pytest.raises(RunDirectoryError, match="holds no run"):
        evaluate(policy, tmp_path / "nothing", resume=True)


BROADCAST = Broadcast(np.array([0.1, -2.0], np.float32), 3, {"reference": {"0/adam": {"learning_rate": 0.1}}})
ROWS = [{"method": "ce", "accuracy": 0.1 + 0.2, "ece": None, "curve": [1 / 3, math.nan, -math.inf], "seed": 7}]


def place(folder: Path) -> Workplace:
    folder.mkdir(exist_ok=True)
    return Workplace(folder, folder, on_event=lambda _: None)


def contribution(group: int) -> Contribution:
    unit = Unit("evaluate", 0, group, '{"method":"ce"}')
    arrays = {"sum": np.array([1e-300, math.inf]), "count": np.zeros((2, 2))}
    return Contribution(unit, 3, {"accuracy": 2 / 3}, rows=ROWS, arrays=arrays, halvings=1, seconds=0.1)


def phase(folder: Path, broadcast: Broadcast = BROADCAST, config: RunConfig = CONFIG) -> KeptPhase:
    return KeptUnits(place(folder), config, load_all(CONFIG.data)).under(broadcast)


def test_what_is_found_is_what_was_kept(tmp_path: Path) -> None:
    for first in (0, 2):  # two processes
        writing = phase(tmp_path)
        writing.keep(contribution(first))
        writing.keep(contribution(first + 1))
        writing.write()
    found = phase(tmp_path).found([contribution(group).unit for group in (3, 9, 0)])
    assert [item.unit.group for item in found] == [3, 0]
    for item in found:
        expected = contribution(item.unit.group)
        assert repr(item) == repr(expected)
        assert all(item.arrays[name].dtype == np.float64 for name in expected.arrays)


def test_what_is_damaged_is_left_out(tmp_path: Path) -> None:
    writing, work = phase(tmp_path), [contribution(group).unit for group in range(4)]
    for group in range(3):
        writing.keep(contribution(group))
    writing.write()
    (part,) = (tmp_path / UNITS).rglob("part-*")
    torn = part.read_text()[:-9].replace("0.6666", "0.7666", 1)
    part.write_text('{"a": 1}\n{"sha256": "00", "contribution": 3}\n[]\n' + torn)
    (part.parent / "part-0001.jsonl").mkdir()
    assert [item.unit.group for item in phase(tmp_path).found(work)] == [1]
    writing.keep(contribution(3))
    writing.write()
    part.unlink()
    writing.keep(contribution(0))
    writing.write()
    assert [item.unit.group for item in phase(tmp_path).found(work)] == [0, 3], "nothing is written over"


def test_what_another_policy_or_other_data_came_to_is_not_looked_at(tmp_path: Path) -> None:
    writing, work = phase(tmp_path), [contribution(0).unit]
    writing.keep(contribution(0))
    writing.write()
    assert len(phase(tmp_path).found(work)) == 1
    free = CONFIG.model_copy(update={"distributed": CONFIG.distributed.model_copy(update={"workers": 2})})
    assert len(phase(tmp_path, config=free).found(work)) == 1
    fewer = {name: dataset for name, dataset in load_all(CONFIG.data).items() if name != "iris"}
    for other in (
        phase(tmp_path, replace(BROADCAST, policy=BROADCAST.policy + 1)),
        phase(tmp_path, replace(BROADCAST, version=4)),
        phase(tmp_path, replace(BROADCAST, prepared={})),
        phase(tmp_path, config=small_config(inner={"steps": 13})),
        KeptUnits(place(tmp_path), CONFIG, fewer).under(BROADCAST),
    ):
        assert other.found(work) == []


def test_it_is_written_every_now_and_then_and_again_where_the_disk_did_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, work = phase(tmp_path), [contribution(group).unit for group in range(3)]
    writing.keep(contribution(0))
    assert not (tmp_path / UNITS).exists()
    monkeypatch.setattr(kept_units, "WRITE_SECONDS", 0.0)
    (tmp_path / UNITS).touch()  # no folder can be made there
    writing = phase(tmp_path)
    writing.keep(contribution(0))
    writing.keep(contribution(1))
    (tmp_path / UNITS).unlink()
    assert phase(tmp_path).found(work) == []
    writing.keep(contribution(2))
    assert [item.unit.group for item in phase(tmp_path).found(work)] == [0, 1, 2]


def test_what_has_arrived_is_written_while_other_workers_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing arrives for long after the second."""
    work = [contribution(group).unit for group in range(2)]
    writing, now = phase(tmp_path), time.monotonic()
    for seconds, arrives, expected in ((30, 0, 1), (31, 1, 1), (45, None, 1), (51, None, 2)):
        monkeypatch.setattr(kept_units, "monotonic", lambda seconds=seconds: now + seconds)
        if arrives is None:
            writing.write_when_due()
        else:
            writing.keep(contribution(arrives))
        assert len(phase(tmp_path).found(work)) == expected


def test_a_phase_has_it_written_while_nothing_arrives(tmp_path: Path) -> None:
    """Between two contributions, not only with the next one."""
    session = SimpleNamespace(kept=KeptUnits(place(tmp_path), CONFIG, load_all(CONFIG.data)))
    session.progress = SimpleNamespace(begin=lambda *_: None, advance=lambda _: None)
    work = [contribution(group).unit for group in range(2)]

    def gather(units: Any, broadcast: Any, *, each: Any, meanwhile: Any) -> None:
        each(contribution(0))
        later = time.monotonic() + 60
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kept_units, "monotonic", lambda: later)
            meanwhile()
        assert len(phase(tmp_path).found(work)) == 1
        each(contribution(1))

    session.gather = gather
    assert len(phases._phase(cast(Session, session), "evaluating", work, BROADCAST)) == 2
    assert len(phase(tmp_path).found(work)) == 2
