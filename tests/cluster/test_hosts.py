"""Three hosts of network namespaces, and a run on them that loses nodes: it ends as the laptop's own run does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import hosts as made
from cluster.hosts import HEAD, LAPTOP, RAYLET, WORKER, Hosts, HostsError, check, hosts
from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.distributed.driver import meta_train
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import fault, small_config

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "cluster" / "hosts.py"
DEADLINE = 300.0
"""Seconds in which the run has to end, whatever is lost: it must not hang."""


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    try:
        check()
    except HostsError as error:
        pytest.skip(str(error))


def until(condition: Callable[[], bool], what: str, process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert process is None or process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.02)


def long_config(**distributed: Any) -> RunConfig:
    """As small_config, with three units in every outer step, one for each host, and one selection score, at the end: a
    worker that stands still has a unit of the kind that there are enough of to tell that it is late."""
    meta_learner = {"outer_steps": 10, "groups_per_step": 3}
    evaluation = {"select_every": 10}
    return small_config(inner={"steps": 30}, meta_learner=meta_learner, evaluation=evaluation, distributed=distributed)


class Submitted:
    """A run that the laptop has sent to the cluster and follows."""

    def __init__(self, here: Hosts, folder: Path, config: RunConfig) -> None:
        self.run_dir, self._log, self.stopped = folder / "run", folder / "log", folder / "stopped"
        (folder / "config.yaml").write_text(config.model_dump_json())
        options = ["--config", str(folder / "config.yaml"), "--run-dir", str(self.run_dir)]
        submit = ["-m", "palf_dist", "submit", "--address", f"http://{HEAD}:8265", "--follow", "--"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                here.command(LAPTOP, sys.executable, *submit, "meta-train", *options),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def have_all_workers(self, here: Hosts, names: Sequence[str]) -> None:
        """Let the driver, which stands still after its first outer step, go on once each host has a worker at rest."""
        until(self.stopped.exists, "first outer step", self.process)
        until(lambda: all(here.signal(name, 0, WORKER) == 1 for name in names), "workers", self.process)
        at_work = f"{WORKER}."  # Ray calls it after what it does, if anything
        until(lambda: not any(here.signal(name, 0, at_work) for name in names), "workers at rest", self.process)
        here.signal(HEAD, signal.SIGCONT)

    def reach(self, outer_step: int) -> None:
        """Wait until the outer step is done."""
        done = self.run_dir / "trajectories" / f"step={outer_step:06d}"
        until(done.exists, f"outer step {outer_step}", self.process)


def test_a_run_that_is_cut_off_frozen_and_killed_ends_as_the_laptops_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host is cut off; another one's worker stands still, and then its node dies; the first one comes back."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PALF_CACHE", os.environ.get("PALF_CACHE") or str(tmp_path / "cache"))
    meta_train(long_config(workers=0), tmp_path / "laptop")
    monkeypatch.setenv(faults.VARIABLE, fault("driver_after_apply", ("driver", 0, 0), "stop", tmp_path / "stopped"))
    with hosts(3) as here:
        run = Submitted(here, tmp_path, long_config(workers=3))
        try:
            run.have_all_workers(here, [HEAD, "worker-1", "worker-2"])
            run.reach(1)
            here.cut("worker-1")
            run.reach(3)
            assert here.signal("worker-2", signal.SIGSTOP, WORKER) == 1
            run.reach(5)
            assert here.signal("worker-2", signal.SIGKILL, RAYLET) == 1
            here.heal("worker-1")
            here.join("worker-1")
            assert run.process.wait(DEADLINE) == 0
        finally:
            run.process.kill()
            run.process.wait()
            print(run.log)
    assert fingerprint(run.run_dir) == fingerprint(tmp_path / "laptop")
    died = [line for line in run.log.splitlines() if line.startswith("! worker ") and " died; " in line]
    assert len(died) >= 2, "the cut or the kill hit nothing"
    cut_off = died[0].removeprefix("! ").partition(" died; ")[0]
    # Where Ray takes long to notice, the unit has gone to another worker before.
    assert "is issued again" in died[0] or f"has been with {cut_off} for" in run.log, "the cut hit nothing"
    assert "it is issued a second time" in run.log, "nobody minded the worker that stood still"


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, with hosts of this test's own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--name", f"test-{os.getpid()}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )


REACH = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"
LISTEN = "import socket; server = socket.create_server(('', 5000)); print('listening', flush=True); server.accept()"


@pytest.fixture
def wired() -> Iterator[Hosts]:
    """Two hosts without Ray."""
    here = Hosts(f"test-{os.getpid()}")
    here.wire(2)
    yield here
    here.down()


def test_the_script_reaches_hosts_cuts_and_heals_them(wired: Hosts) -> None:
    assert main("exec", "worker-1", "--", "hostname").stdout == "worker-1\n"
    token = "stat -c '%a %n' ~/.ray/auth_token; cat ~/.ray/auth_token; pwd"
    (mode, first, folder), second = (
        main("exec", host, "--", "sh", "-c", token).stdout.splitlines() for host in (HEAD, LAPTOP)
    )
    assert mode == "600 /run/home/.ray/auth_token" and len(first) == 64 and second[1] == first
    assert folder == str(Path.cwd())
    command = wired.command("worker-1", sys.executable, "-c", LISTEN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "listening\n"
        reached = [main("exec", LAPTOP, "--", sys.executable, "-c", REACH, "localhost").returncode]
        for command in ("cut", "heal"):
            assert main(command, "worker-1").returncode == 0
            reached.append(main("exec", HEAD, "--", sys.executable, "-c", REACH, "worker-1").returncode)
    assert reached == [1, 1, 0]
    assert main("down").returncode == 0
    ended = main("cut", "worker-1")
    assert ended.returncode == 2 and ended.stderr.startswith("error: there is no host 'laptop' of the name 'test-")
    assert main("down").returncode == 0


def test_a_host_is_there_once_its_first_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell that sets it up is slow to become that program; until then the host can be lost from sight."""
    monkeypatch.setattr(made, "FIRST_PROCESS", made.FIRST_PROCESS.replace('exec "$3"', 'sleep 0.5\nexec "$3"'))
    here = Hosts(f"test-{os.getpid()}-slow")
    here.wire(1)
    try:
        (target,) = (word for word in here.command(HEAD) if word.startswith("--target="))
        assert Path("/proc", target.removeprefix("--target="), "comm").read_text().startswith("python")
    finally:
        here.down()


def test_hosts_end_with_the_process_that_has_them() -> None:
    """Also when it is killed, with everything that runs on them."""
    code = f"""
import subprocess, sys, time
from cluster.hosts import Hosts
here = Hosts("test-{os.getpid()}-crash")
here.wire(2, daemon=False)
subprocess.Popen(here.command("worker-1", "sleep", "987654321"))
print("up", flush=True)
time.sleep(600)
"""
    here = Hosts(f"test-{os.getpid()}-crash")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "up\n"
        sleeping = Path("/proc") / str(one_process(b"sleep\0987654321\0"))
        owner.kill()
    until(lambda: not sleeping.exists(), "end of what ran on the host")

    def gone() -> bool:
        try:
            here.command(HEAD, "true")
        except HostsError as error:
            return "there is no host 'head'" in str(error)
        return False

    until(gone, "end of the hosts")


def one_process(command: bytes) -> int:
    """The process with this command line, once there is one."""
    found: list[int] = []

    def look() -> bool:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if file.read_bytes() == command:
                    found.append(int(file.parent.name))
        return bool(found)

    until(look, f"process {command!r}")
    return found[0]
