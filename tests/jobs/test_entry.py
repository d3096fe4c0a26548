"""The entry point of a job, with a driver that is a small program in the place of palf_dist's command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import ROOT

DRIVER = """
import json, os, signal, sys, time
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "--resume" not in sys.argv:
    os.makedirs("/".join(sys.argv[sys.argv.index("--run-dir") + 1:][:1]), exist_ok=True)
    open(sys.argv[sys.argv.index("--run-dir") + 1] + "/config.yaml", "w").close()
how = open("how").read().split()
with open("how", "w") as file:
    file.write(" ".join(how[1:]))
if how[0] == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(130))
    print("waiting", flush=True)
    time.sleep(60)
os.kill(os.getpid(), signal.SIGKILL) if how[0] == "die" else sys.exit(int(how[0]))
"""


class Job:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "palf_dist").mkdir()
        (folder / "palf_dist" / "__init__.py").touch()
        (folder / "palf_dist" / "__main__.py").write_text(DRIVER)
        self.run_dir = folder / "run"

    def start(self, how: str, *arguments: str, script: str = "meta_train.py", **variables: str) -> subprocess.Popen:
        """The entry script of this repository; ``python -m palf_dist`` in its folder is the driver above."""
        (self.folder / "how").write_text(how)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = [str(ROOT / "jobs" / script), "--config", "c.yaml", "--run-dir", str(self.run_dir), *arguments]
        return subprocess.Popen(
            [sys.executable, *own],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, how: str, *arguments: str, script: str = "meta_train.py", **variables: str) -> tuple[int, str]:
        process = self.start(how, *arguments, script=script, **variables)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_driver_that_dies_is_started_again_and_resumes(job: Job) -> None:
    code, output = job("die 1 0", "--max-restarts", "3", RAY_ADDRESS="10.0.0.1:6379")
    assert code == 0
    rest, place = ["meta-train", "--config", "c.yaml"], str(job.run_dir)
    assert job.calls()[0] == [*rest, "--run-dir", place, "--address", "auto"]
    assert job.calls()[1:] == [[*rest, "--resume", place, "--address", "auto"]] * 2
    assert "the driver was killed by SIGKILL" in output and "restart 1 of 3" in output
    assert "the driver ended with exit code 1" in output and "restart 2 of 3" in output


def test_restarts_come_to_an_end(job: Job) -> None:
    assert job("die die 0", "--max-restarts", "1")[0] == 128 + signal.SIGKILL
    assert len(job.calls()) == 2


@pytest.mark.parametrize("code", [0, 2, 130])
def test_an_end_that_another_attempt_would_not_mend(job: Job, code: int) -> None:
    assert job(f"{code} 0", "--max-restarts", "3")[0] == code
    assert len(job.calls()) == 1


def test_a_job_that_is_stopped_lets_its_driver_save(job: Job) -> None:
    process = job.start("wait 0", "--max-restarts", "3")
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "the driver has ended"
    [driver] = psutil.Process(process.pid).children()
    for pid in (process.pid, driver.pid):  # as Ray does
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(job.calls()) == 1


def test_off_a_cluster_and_a_run_directory(job: Job) -> None:
    assert job("0", script="tune.py")[0] == 0
    assert job.calls() == [["tune", "--config", "c.yaml", "--run-dir", str(job.run_dir)]]
    assert job("die 0", "best", "--max-restarts", "1", script="evaluate.py")[0] == 0
    rest = ["evaluate", "--config", "c.yaml", "best"]
    assert job.calls()[1:] == [[*rest, option, str(job.run_dir)] for option in ("--resume", "--resume")]
    command = [sys.executable, str(ROOT / "jobs" / "meta_train.py"), "--config", "c.yaml"]
    ended = subprocess.run(command, cwd=job.folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: --run-dir: a job needs one, so that it can go on when it is started again\n",
    )


def test_another_version_is_refused(job: Job) -> None:
    code, output = job("0", "--for-version", "0.0.9")
    assert code == 2 and "the job was submitted with 0.0.9; install the same on both sides" in output
    assert not (job.folder / "calls.jsonl").exists()


def test_the_command_line_is_shown_without_secrets(job: Job) -> None:
    code, output = job("0", "--set", "tracking.uri=http://me:canary@host", MY_TOKEN="canary-too", NAME="canary-too")
    assert code == 0 and "palf_dist job: palf-dist meta-train" in output and "canary" not in output
