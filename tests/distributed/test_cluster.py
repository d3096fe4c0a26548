from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

import palf_dist
from palf_dist.config import DistributedConfig
from palf_dist.distributed import cluster
from palf_dist.errors import ClusterError

ROOT = Path(palf_dist.__file__).parent.parent


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def connecting(**distributed: object) -> str:
    """The message with which the connection is refused."""
    with pytest.raises(ClusterError) as caught, cluster.connect(DistributedConfig.model_validate(distributed)):
        pass
    return str(caught.value)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = address_of(server)
    message = connecting(address=address)
    assert message.startswith(f"distributed.address: no Ray head answers at {address}") and "leave" in message


def test_a_server_that_is_no_ray_head_is_refused() -> None:
    """Ray itself would wait for it; this returns."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "no Ray head answers" in connecting(address=address_of(server))


@pytest.mark.parametrize("address", ["localhost", "ray://localhost:10001", "head:port", ":6379"])
def test_malformed_addresses_are_refused(address: str) -> None:
    assert "neither 'auto' nor HOST:PORT" in connecting(address=address)


def test_more_workers_than_this_machine_can_carry_are_refused() -> None:
    cores = os.cpu_count() or 1
    message = connecting(workers=4 * cores + 1)
    assert message.startswith(f"distributed.workers: {4 * cores + 1} workers") and f"{cores} cores" in message
    assert "2 thread(s)" in connecting(workers=2 * cores + 1, threads=2)


@pytest.mark.parametrize(
    ("nodes", "distributed", "expected"),
    [
        ([{"CPU": 2}], {"workers": 2}, (1, 0)),
        ([{"CPU": 3}, {"CPU": 1}], {"workers": 2, "threads": 2}, "room for 1"),
        ([{"CPU": 2}, {"CPU": 1}], {"workers": 4}, "2 node(s) with 3 CPUs and 0 GPUs, room for 3"),
        ([{"CPU": 8, "GPU": 2}], {"workers": 2}, (1, 1)),
        ([{"CPU": 8, "GPU": 1}], {"workers": 2}, (1, 0.5)),
        ([{"CPU": 8, "GPU": 2}], {"workers": 3}, (1, 0.5)),
        ([{"CPU": 8, "GPU": 2}], {"workers": 3, "gpus_per_worker": 1}, "2 GPUs, room for 2"),
        ([{"CPU": 8, "GPU": 2}], {"workers": 8, "gpus_per_worker": 0}, (1, 0)),
        ([{"CPU": 8}], {"workers": 1, "gpus_per_worker": 1}, "0 GPUs, room for 0"),
        ([{"CPU": 8, "GPU": 2}], {"workers": "auto"}, (1, 1)),
        ([{"CPU": 2}, {"CPU": 2, "GPU": 1}], {"workers": "auto", "gpus_per_worker": 0.25, "threads": 2}, (2, 0.25)),
        ([], {"workers": "auto", "address": "auto"}, (1, 0)),
        ([{"CPU": 8}], {"workers": "auto", "gpus_per_worker": 1}, "0 GPUs, room for 0"),
        ([], {"workers": "auto"}, "one worker (1 CPU and 0 GPU each) would take more"),
    ],
)
def test_share_of_a_worker(
    nodes: list[dict[str, float]], distributed: dict[str, Any], expected: tuple[int, float] | str
) -> None:
    config = DistributedConfig.model_validate(distributed)
    if isinstance(expected, str):
        with pytest.raises(ClusterError, match=r"^distributed\.workers: ") as caught:
            cluster.share_of(config, nodes)
        assert expected in str(caught.value)
    else:
        assert cluster.share_of(config, nodes) == cluster.Share(*expected)


HEAD, WIDE, NARROW = {"memory": 1e9}, {"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 6e9}


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([WIDE], 1, 8e9),
        ([WIDE], 3, 8e9 / 3),
        ([WIDE], "auto", 2e9),
        ([HEAD, WIDE, NARROW], 1, 6e9),
        ([HEAD, WIDE, NARROW], 2, 6e9),
        ([HEAD, WIDE, NARROW], 5, 8e9 / 3),
        ([HEAD, WIDE, NARROW], "auto", 2e9),
        ([HEAD], "auto", math.inf),
        ([{"CPU": 1.0}], 1, math.inf),
    ],
)
def test_memory_of_each_worker(nodes: list[dict[str, float]], workers: int | Literal["auto"], expected: float) -> None:
    """A node where none fits has no part in it."""
    assert cluster.memory_of_each(nodes, cluster.Share(1, 0), workers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("share", "room"), [(cluster.Share(1, 0), 7), (cluster.Share(2, 0), 3), (cluster.Share(1, 1), 2)], ids=str
)
def test_room_for_workers(share: cluster.Share, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 3}, {"CPU": 4, "GPU": 2}])
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: None)
    assert cluster.room(share) == room


def test_a_folder_that_a_killed_driver_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from palf_dist.distributed.cluster import _temporary_folder\n"
        "with _temporary_folder() as folder:\n"
        "    print(folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    abandoned = Path(done.stdout.strip())
    assert abandoned.is_dir()
    with cluster._temporary_folder() as mine:
        cluster._remove_abandoned_folders()
        assert mine.is_dir(), "a folder in use was removed"
    assert not abandoned.exists() and not mine.exists()


PRIVATE = """
import json, os, sys, time
import psutil
from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import connect
import ray

@ray.remote(num_cpus=1)
class Actor:
    def ready(self):
        return 1

with connect(DistributedConfig(workers=2)):
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN"] != "f" * 64
    actors = [Actor.remote() for _ in range(2)]
    ray.get([actor.ready.remote() for actor in actors])
    time.sleep(3)  # agents open their ports a little later
    processes = psutil.Process().children(recursive=True)
    listening = [
        [process.name(), connection.laddr.ip]
        for process in [psutil.Process(), *processes]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    folder = ray._private.worker._global_node.get_temp_dir_path()
print(json.dumps({"pids": [p.pid for p in processes], "listening": listening, "folder": folder}))
"""


@pytest.mark.slow
def test_a_private_ray_keeps_to_itself(tmp_path: Path) -> None:
    """Loopback only, nothing in the home folder, and nothing left behind."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "f" * 64}  # for another one
    done = subprocess.run(
        [sys.executable, "-c", PRIVATE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    names = {name for name, _ in seen["listening"]}
    assert {"gcs_server", "raylet", "ray::Actor"} <= names, "the test sees too little"
    outside = [entry for entry in seen["listening"] if entry[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert not outside
    assert re.fullmatch(r"/tmp/palf-ray-\w+", seen["folder"]) and not Path(seen["folder"]).exists()
    assert list(tmp_path.iterdir()) == []
    left = [psutil.Process(pid) for pid in seen["pids"] if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=15)
    assert not alive


@pytest.mark.slow
def test_a_private_ray_that_does_not_start_is_one_clear_error() -> None:
    code = """
import os
from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import connect
from palf_dist.errors import ClusterError

os.environ["RAY_OVERRIDE_RESOURCES"] = "no JSON"
try:
    with connect(DistributedConfig(workers=1)):
        pass
except ClusterError as error:
    print(error)
del os.environ["RAY_OVERRIDE_RESOURCES"]
with connect(DistributedConfig(workers=1)) as share:
    print(share)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("distributed.workers: Ray did not start on this machine: Expecting value")
    assert second == "1 CPU and 0 GPU"


@pytest.mark.slow
def test_a_cluster_that_is_there_is_used_and_left_running() -> None:
    code = """
import subprocess, sys
from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import connect
from palf_dist.errors import ClusterError
import ray
from ray.cluster_utils import Cluster

here = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
try:
    for address in (here.address, "auto"):
        with connect(DistributedConfig(workers=2, address=address)) as share:
            assert share.cpus == 1 and ray.is_initialized()
            with connect(DistributedConfig(workers=1, address=address)):
                pass
            assert ray.is_initialized(), "an inner block closed the connection of the outer one"
        assert not ray.is_initialized()
    try:
        with connect(DistributedConfig(workers=3, address=here.address)):
            pass
    except ClusterError as error:
        print(error)
finally:
    here.shutdown()
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_ADDRESS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("distributed.workers: 3 workers") and "room for 2" in done.stdout
