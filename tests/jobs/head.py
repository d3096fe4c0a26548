"""A Ray head of the tests' own: on this machine, with token authentication, in a folder that goes with it."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from tests.processes import ROOT


@dataclass(frozen=True)
class Head:
    url: str  # of its dashboard
    port: int  # of the head itself
    token: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}


@contextmanager
def started(cache: Path) -> Iterator[Head]:
    """A head with two CPUs whose jobs run this code; every process of it has ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="palf-head-", dir="/tmp"))  # Ray's sockets need a short path
    port, dashboard, agent, client = free_ports(4)
    head = Head(f"http://127.0.0.1:{dashboard}", port, secrets.token_hex(32), folder)
    token = folder / "token"
    token.touch(0o600)
    token.write_text(head.token)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PALF_", "MLFLOW_"))}
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PALF_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",
    }
    options = f"--head --block --port={port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --num-cpus=2"
    # Both have a default, which another Ray of this machine may have; without its agent a head takes no jobs.
    options += f" --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    options += f" --temp-dir={folder}/r --object-store-memory=100000000 --disable-usage-stats"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options.split()],
            env={**kept, **variables, **head.environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_for(head, process)
        yield head
    finally:
        for _ in range(3):  # those that were just being started, too
            for member in processes(str(folder)):
                with suppress(psutil.Error):
                    member.kill()
            time.sleep(0.2)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def processes(word: str) -> list[psutil.Process]:
    """The processes whose command line or variables of Ray hold a word."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            words = [*process.cmdline(), environment.get("RAY_AUTH_TOKEN_PATH", ""), environment.get("PYTHONPATH", "")]
            if process.pid != os.getpid() and any(word in text for text in words):
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """So many different ports that nobody listens on.

    They lie between Ray's worker ports and those that the kernel gives away by itself, so that nothing takes one
    between this call and its use.
    """
    found: list[int] = []
    for port in random.sample(range(20_001, 32_768), 1_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


def _wait_for(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while True:
        with suppress(requests.RequestException):
            answer = requests.get(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}, timeout=5)
            if answer.status_code == 200 and "Ray runtime started" in (head.folder / "log").read_text():
                return
        said = (head.folder / "log").read_text()
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.3)


@dataclass
class Proxy:
    """A TCP proxy in front of a server; ``cut`` breaks every connection and refuses new ones until ``mend``."""

    target: int
    port: int = field(default_factory=lambda: free_ports(1)[0])
    sent: list[bytes] = field(default_factory=list)  # what clients sent, piece by piece
    _open: list[socket.socket] = field(default_factory=list)
    _server: socket.socket | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def cut(self) -> None:
        assert self._server is not None
        for end in (self._server, *self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._open += [near, far]
                for ends in ((near, far, self.sent), (far, near, [])):
                    threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, passed: list[bytes]) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
            passed.append(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
