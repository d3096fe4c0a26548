"""The real things that a soak breaks: a Ray cluster of three nodes, a small file system, an MLflow server."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from palf_dist.distributed.cluster import _process_token, changed_environment
from tests.test_tracking_server import Server

NODES = 2
"""Besides the head, which carries the drivers and no worker. Each has room for one worker."""

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 6,
    "health_check_timeout_ms": 2000,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
DISK_BYTES = 64 << 20


class Over(Exception):
    """The soak ends before a fault could be done."""


@dataclass
class Stage:
    """What there is to break, and where."""

    folder: Path
    cluster: Cluster
    server: Server
    disk: Path  # where the runs write
    disk_is_its_own: bool  # a file system that can be filled
    driver: subprocess.Popen[str] | None = None  # at work now
    over: threading.Event = field(default_factory=threading.Event)  # no fault goes on

    def workers(self) -> list[psutil.Process]:
        """The processes of the workers on all nodes, oldest first; those that are just starting too."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::Worker"):
                    found.append((process.create_time(), process.pid, process))
        return [process for *_, process in sorted(found)]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Raises Over where nobody waits for it any more."""
        while not condition():
            if self.over.wait(0.01):
                raise Over

    def mark(self, point: str) -> Path:
        """While this file is there, the fault at ``point`` is not armed."""
        return self.folder / f"fired-{point}"


@contextlib.contextmanager
def set_up(folder: Path) -> Iterator[Stage]:
    """Everything up and running inside the block, and nothing left of it afterwards."""
    with contextlib.ExitStack() as stack:
        disk = folder / "disk"
        disk.mkdir()
        own = stack.enter_context(_file_system(disk))
        server = Server(folder)
        stack.callback(lambda: server.process and server.kill())
        stack.enter_context(changed_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _process_token()}))
        with ThreadPoolExecutor(1) as pool:
            serving = pool.submit(server.start)
            head = {
                **NODE,
                "num_cpus": 0,
                "temp_dir": str(folder / "ray"),
                "include_dashboard": False,
                "_system_config": HEALTH,
            }
            # no hooks: they can be set in the main thread only, and nodes are added in others too
            cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
            stack.callback(cluster.shutdown)
            for _ in range(NODES):
                cluster.add_node(**NODE)
            serving.result()
        yield Stage(folder, cluster, server, disk, own)


@contextlib.contextmanager
def _file_system(folder: Path) -> Iterator[bool]:
    """A small one of its own at ``folder``, where this user may mount any; whether there is."""
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
