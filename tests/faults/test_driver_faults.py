"""Whole runs that are killed or interrupted for real, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.distributed.driver import meta_train
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import fault, small_config
from tests.processes import Process, Spawn, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

Drive = Callable[..., Process]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | str]:
    """The fingerprint of small_config, run in process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    meta_train(small_config(), run_dir)
    return fingerprint(run_dir)


@pytest.fixture
def drive(spawn: Spawn, tmp_path: Path) -> Drive:
    """Starts a driver whose home is the empty folder tmp_path/home."""
    (tmp_path / "home").mkdir()

    def start(config: RunConfig, how: str, injected: str = "") -> Process:
        (tmp_path / "config.json").write_text(config.model_dump_json())
        variables = {"HOME": str(tmp_path / "home")} | ({faults.VARIABLE: injected} if injected else {})
        arguments = [str(tmp_path / "config.json"), str(tmp_path / "run"), how]
        return spawn("tests.faults.drive", *arguments, variables=variables)

    return start


def wait_for(path: Path, process: Process) -> None:
    assert wait_until(path.exists, process), process.communicate()


def family(process: Process) -> tuple[list[psutil.Process], list[Path]]:
    """The descendants of a driver, Ray's among them, and its temporary folder."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(child.name() == "raylet" for child in children), "the test sees too little"
    words = [word for child in children for word in child.cmdline()]
    folders = {word.split("=")[-1].split("/session_")[0] for word in words if "/tmp/palf-ray-" in word}
    return children, [Path(folder) for folder in folders if Path(folder).is_dir()]


def assert_gone(processes: list[psutil.Process], timeout: float = 15) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def finish(process: Process) -> dict[str, object]:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    result: dict[str, object] = json.loads(output.splitlines()[-1])
    return result


def test_a_killed_driver_is_resumed_as_if_nothing_had_been(
    drive: Drive, tmp_path: Path, undisturbed: dict[str, bytes | str]
) -> None:
    """kill -9 between a step and its log, then, resumed, between a step and its checkpoint, then to the end."""
    config = small_config(distributed={"workers": 2})
    applied, saving = tmp_path / "applied", tmp_path / "saving"
    left_folders: list[Path] = []
    agents: list[psutil.Process] = []
    for how, mark, injected in (
        ("new", applied, fault("driver_after_apply", ("driver", 1, 0), "hang", applied)),
        ("resume", saving, fault("driver_before_checkpoint", ("driver", 3, 0), "hang", saving)),
    ):
        process = drive(config, how, injected)
        wait_for(mark, process)
        children, folders = family(process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        # Ray's two agents try for a minute to report the loss, then end too
        agents += [child for child in children if child.name().endswith("Agent")]
        assert_gone([child for child in children if child not in agents])
        left_folders += folders
    assert len(left_folders) == 2 and len(agents) == 4
    assert finish(drive(config, "resume")) == {"interrupted": False, "outer_steps": 4}
    assert fingerprint(tmp_path / "run") == undisturbed
    assert not [folder for folder in left_folders if folder.exists()], (
        "the next run did not clear up after a killed one"
    )
    assert list((tmp_path / "home").iterdir()) == []
    assert_gone(agents, timeout=90)


def test_a_driver_killed_in_mid_checkpoint_goes_on_from_the_one_before(
    drive: Drive, tmp_path: Path, undisturbed: dict[str, bytes | str]
) -> None:
    """Killed between two files of a checkpoint."""
    process = drive(small_config(), "new", fault("driver_in_checkpoint", ("driver", 3, 0), "kill"))
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    (torn,) = (tmp_path / "run" / "checkpoints").glob(".step-*")
    assert torn.name == ".step-000003.tmp" and [path.name for path in torn.iterdir()] == ["policy.safetensors"]
    assert finish(drive(small_config(), "resume")) == {"interrupted": False, "outer_steps": 4}
    assert fingerprint(tmp_path / "run") == undisturbed
    assert not torn.exists()


def test_ctrl_c_ends_with_a_checkpoint_although_a_worker_hangs(
    drive: Drive, tmp_path: Path, undisturbed: dict[str, bytes | str]
) -> None:
    mark = tmp_path / "hangs"
    config = small_config(distributed={"workers": 2})
    process = drive(config, "new", fault("in_unit", ("meta_gradient", 2, 0), "hang", mark))
    wait_for(mark, process)
    children, folders = family(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    assert finish(process) == {"interrupted": True, "outer_steps": 2}
    assert_gone(children)
    assert folders and not [folder for folder in folders if folder.exists()]
    assert list((tmp_path / "home").iterdir()) == []
    assert not (tmp_path / "run" / "results.parquet").exists()
    meta_train(small_config(), tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == undisturbed


def test_a_second_ctrl_c_ends_at_once(drive: Drive, tmp_path: Path) -> None:
    """In process a unit cannot be abandoned by the first one."""
    mark = tmp_path / "hangs"
    process = drive(small_config(), "new", fault("in_unit", ("meta_gradient", 1, 0), "hang", mark))
    wait_for(mark, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "SIGINT: ending with a checkpoint" in errors
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()
