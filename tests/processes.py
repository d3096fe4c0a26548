"""Programs of this project in processes of their own, which a test may interrupt and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import palf_dist

ROOT = Path(palf_dist.__file__).parent.parent

Process = subprocess.Popen[str]
Spawn = Callable[..., Process]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """``spawn(module, *arguments, cwd=..., variables=...)`` starts ``python -m module`` in a session of its own, with
    its cache in ``tmp_path`` and without this process's settings of Ray and palf_dist. The end of the test kills it."""
    started: list[Process] = []

    def start(module: str, *arguments: str, cwd: Path = ROOT, variables: Mapping[str, str] | None = None) -> Process:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PALF_"))}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=cwd,
                env={**kept, "PYTHONPATH": str(ROOT), "PALF_CACHE": str(tmp_path / "cache"), **(variables or {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool], process: Process, seconds: float = 200.0) -> bool:
    """Until ``condition`` holds; False where the process ended before. Looks again every 20 ms."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return condition()
        assert time.monotonic() < end, "the process does not go on"
        time.sleep(0.02)
    return True
