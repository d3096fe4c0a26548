"""A real `mlflow server` for tests, which they may stop and kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path


class Server:
    """A tracking server on loopback with its own process group."""

    def __init__(self, folder: Path, *options: str, variables: Mapping[str, str] | None = None) -> None:
        """``options`` of ``mlflow server`` and environment ``variables`` besides the usual ones."""
        self.folder, self._options, self._variables = folder, options, variables or {}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        arguments += ["--artifacts-destination", str(self.folder / "artifacts")]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments, *self._options],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **self._variables},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(self.uri + "/health", timeout=1).status == 200
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process = None


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
