"""The Ray a run works on: a private one on this machine, or a cluster that is already there.

A private Ray listens on loopback only, asks for a token that only this process and its children know, keeps its files
in a short temporary folder of its own and takes everything with it when it goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import math
import os
import secrets
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

from palf_dist.config import DistributedConfig
from palf_dist.errors import ClusterError

PROBE_SECONDS = 5.0
WORKERS_PER_CORE = 4
MINIMUM_STORE_BYTES = 100_000_000
FOLDER_PREFIX = "palf-ray-"
LOCK_FILE = "in-use"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behaviour to come; without it Ray warns
}


@dataclass(frozen=True)
class Share:
    """What one worker takes of the cluster."""

    cpus: int
    gpus: float


@contextlib.contextmanager
def connect(config: DistributedConfig, object_bytes: int = 0) -> Iterator[Share]:
    """Be connected to Ray inside the block; gives what each of ``config.workers`` workers takes of it.

    ``object_bytes``: size of the datasets, which a private Ray makes room for. A process that is connected already
    stays so, before and after. Raises ClusterError where the cluster cannot be reached or is too small for the workers.
    """
    assert config.workers > 0, "workers: 0 needs no Ray"
    most = _most_cpus()
    needed = config.workers * config.threads
    if config.address is None and not ray.is_initialized() and needed > most:
        raise ClusterError(
            f"distributed.workers: {config.workers} workers of {config.threads} thread(s) are more than this machine's "
            f"{most // WORKERS_PER_CORE} cores can carry; the most is {most // config.threads} workers"
        )
    with connected(config.address, needed, object_bytes):
        yield share_of(config, _room())


@contextlib.contextmanager
def connected(address: str | None, cpus: int, object_bytes: int = 0) -> Iterator[None]:
    """As ``connect``, for whoever counts resources himself. A private Ray has ``cpus`` CPUs or as many as the machine
    has, whichever is more, but never more than the machine can carry."""
    if ray.is_initialized():
        yield
    elif address is None:
        with _private_ray(max(os.cpu_count() or 1, min(cpus, _most_cpus())), object_bytes):
            yield
    else:
        with _existing_cluster(address):
            yield


def _most_cpus() -> int:
    """CPUs that a private Ray may have: workers share cores."""
    return WORKERS_PER_CORE * (os.cpu_count() or 1)


@contextlib.contextmanager
def _private_ray(cpus: int, object_bytes: int) -> Iterator[None]:
    environment = {
        **QUIET,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE") or "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or _process_token(),
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    _remove_abandoned_folders()
    with changed_environment(environment), _loopback_only(), _temporary_folder() as folder:
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=MINIMUM_STORE_BYTES + 2 * object_bytes,
                _temp_dir=str(folder),
            )
            yield
        finally:
            ray.shutdown()


@functools.cache
def _process_token() -> str:
    """One secret for the life of this process, as Ray keeps the first one it sees."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def changed_environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables inside the block, known to Ray too, which otherwise reads some when it is imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Ray's own switch for machines without clusters: only with it does every one of its servers bind to loopback.

    ``_node_ip_address="127.0.0.1"`` would not do: Ray turns it into the address of the outside interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder right under /tmp, as Ray's socket paths may have 107 bytes; locked while this process lives."""
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir="/tmp"))
    lock = os.open(folder / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(lock)
        _remove(folder)


def _remove_abandoned_folders() -> None:
    """Remove what drivers that were killed left behind: our folders whose lock nobody holds."""
    for lock_file in Path("/tmp").glob(f"{FOLDER_PREFIX}*/{LOCK_FILE}"):
        with contextlib.suppress(OSError):
            lock = os.open(lock_file, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock_file.parent)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Delete ``folder``, although agents that are still ending may write to it meanwhile."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def _existing_cluster(address: str) -> Iterator[None]:
    if address != "auto":
        _probe(address)
    with changed_environment({**QUIET, "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE") or _cluster_auth_mode()}):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"distributed.address: cannot connect to a Ray cluster at {address!r}: {str(error).splitlines()[0]}; "
                "start one with `ray start --head`, or leave distributed.address out for a private Ray"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _cluster_auth_mode() -> str:
    """Token where one is at hand, as ``ray start`` decides it."""
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return "token" if named or (Path.home() / ".ray" / "auth_token").exists() else "disabled"


def _probe(address: str) -> None:
    """Fail within seconds where no Ray head answers; ray.init alone would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise ClusterError(f"distributed.address: {address!r} is neither 'auto' nor HOST:PORT of a Ray head")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">HBBBI", 0, 0, 4, 0, 0)  # and an empty SETTINGS frame
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS) as connection:
            connection.sendall(preface)
            answer = connection.recv(9)  # a gRPC server's first frame is SETTINGS (type 4)
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"distributed.address: no Ray head answers at {address} ({error}); check the address and the network, "
            "or leave distributed.address out for a private Ray"
        ) from error
    if len(answer) < 4 or answer[3] != 4:
        raise ClusterError(f"distributed.address: what listens at {address} is no Ray head; give the head's GCS port")


def nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive, as Ray names them."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def worker_share(config: DistributedConfig) -> Share:
    """As ``share_of``, on the cluster that this process is connected to. Where it is to none, no worker has a GPU that
    did not ask for one."""
    if ray.is_initialized():
        return share_of(config, nodes())
    return Share(cpus=config.threads, gpus=config.gpus_per_worker or 0.0)


def _room() -> Sequence[Mapping[str, float]]:
    """Where workers may go: anywhere; but where this process belongs to a placement group (a trial of Ray Tune, which
    its workers join by themselves), in that group's bundles but the first, which this process has."""
    group = ray.util.get_current_placement_group()
    return nodes() if group is None else group.bundle_specs[1:]


def share_of(config: DistributedConfig, nodes: Sequence[Mapping[str, float]]) -> Share:
    """CPUs and GPUs of one worker; raises ClusterError where the cluster can never give them to all workers.

    ``nodes``: the resources of each node, as Ray names them.
    ``gpus_per_worker`` none: a whole GPU each, or an equal part where there are fewer GPUs than workers.
    """
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if config.gpus_per_worker is not None:
        each = config.gpus_per_worker
    elif gpus >= config.workers or not gpus:
        each = min(1.0, gpus)
    else:
        each = 1.0 / math.ceil(config.workers / gpus)
    share = Share(cpus=config.threads, gpus=each)
    room = sum(_workers_that_fit(node, share) for node in nodes)
    if config.workers > room:
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        raise ClusterError(
            f"distributed.workers: {config.workers} workers ({share.cpus} CPU and {share.gpus:g} GPU each) are more "
            f"than the cluster can give: it has {len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs, "
            f"room for {room}"
        )
    return share


def _workers_that_fit(node: Mapping[str, float], share: Share) -> int:
    by_cpu = int(node.get("CPU", 0.0) // share.cpus)
    return by_cpu if share.gpus == 0 else min(by_cpu, int(node.get("GPU", 0.0) / share.gpus + 1e-9))
