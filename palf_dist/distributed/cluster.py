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
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

from palf_dist.config import DistributedConfig
from palf_dist.distributed import authentication
from palf_dist.errors import ClusterError
from palf_dist.storage import first_line

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

    def __str__(self) -> str:
        return f"{self.cpus} CPU and {self.gpus:g} GPU"


@contextlib.contextmanager
def connect(config: DistributedConfig, object_bytes: int = 0) -> Iterator[Share]:
    """Be connected to Ray inside the block; gives what each of ``config.workers`` workers takes of it. With ``auto`` a
    private Ray has room for a worker for each of the machine's cores; a cluster may have none yet.

    ``object_bytes``: size of the datasets, which a private Ray makes room for. A process that is connected already
    stays so, before and after. Raises ClusterError where the cluster cannot be reached or is too small for the workers.
    """
    assert config.workers != 0, "workers: 0 needs no Ray"
    most = _most_cpus()
    needed = config.threads * (1 if config.workers == "auto" else config.workers)
    if config.address is None and not ray.is_initialized() and needed > most:
        raise ClusterError(
            f"distributed.workers: {config.workers} workers of {config.threads} thread(s) are more than this machine's "
            f"{most // WORKERS_PER_CORE} cores can carry; the most is {most // config.threads} workers"
        )
    with connected(config.address, needed, object_bytes):
        yield share_of(config, _places())


@contextlib.contextmanager
def connected(address: str | None, cpus: int, object_bytes: int = 0) -> Iterator[None]:
    """As ``connect``, for whoever counts resources himself. A private Ray has ``cpus`` CPUs or as many as the machine
    has, whichever is more, but never more than the machine can carry."""
    if ray.is_initialized():
        _refuse_open()
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
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _process_token(),
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    _remove_abandoned_folders()
    with changed_environment(environment), _loopback_only(), _temporary_folder() as folder:
        try:
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
            except Exception as error:  # Ray raises no class of its own where one of its processes takes over 30 s
                raise ClusterError(
                    f"distributed.workers: Ray did not start on this machine: {first_line(error)}; if the machine is "
                    "busy with other work, try again when it is not, or set distributed.workers to 0"
                ) from error
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
    head = _head(address)
    authentication.protect_token_file()
    mode = authentication.auth_mode(head)
    with changed_environment({**QUIET, "RAY_AUTH_MODE": mode}):
        try:
            ray.init(address=head, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"distributed.address: cannot connect to a Ray cluster at {address!r}: {str(error).splitlines()[0]}; "
                "start one with `ray start --head`, or leave distributed.address out for a private Ray"
            ) from error
        try:
            _refuse_open()
            yield
        finally:
            ray.shutdown()


def _head(address: str) -> str:
    """HOST:PORT of the head that ``address`` stands for."""
    found: str | None = address
    if address == "auto":
        try:
            found = canonicalize_bootstrap_address("auto")
        except (ConnectionError, ValueError):
            found = None
        if found is None or found == "auto":
            raise ClusterError(
                "distributed.address: no Ray cluster runs on this machine and RAY_ADDRESS names none; start one with "
                "`ray start --head`, give its HOST:PORT, or leave distributed.address out for a private Ray"
            )
    assert found is not None
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit() or "://" in found:
        raise ClusterError(f"distributed.address: {found!r} is neither 'auto' nor HOST:PORT of a Ray head")
    return found


def _refuse_open() -> None:
    """Raises ClusterError where this process is connected to a cluster that others can reach and that asks nobody for a
    token."""
    hosts = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    authentication.refuse_open(ray.get_runtime_context().gcs_address, hosts)


def staying() -> list[dict[str, Any]]:
    """Ray's records of the nodes that are alive and not drained: by hand, by an autoscaler or as they are about to be
    preempted."""
    drained = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]


def nodes() -> list[dict[str, float]]:
    """The resources of each node that work may go to, as Ray names them."""
    return [node["Resources"] for node in staying()]


def worker_share(config: DistributedConfig) -> Share:
    """As ``share_of``, on the cluster that this process is connected to. Where it is to none, no worker has a GPU that
    did not ask for one."""
    if ray.is_initialized():
        return share_of(config, nodes())
    return Share(cpus=config.threads, gpus=config.gpus_per_worker or 0.0)


def _places() -> Sequence[Mapping[str, float]]:
    """Where workers may go: anywhere; but where this process belongs to a placement group (a trial of Ray Tune, which
    its workers join by themselves), in that group's bundles but the first, which this process has."""
    group = ray.util.get_current_placement_group()
    return nodes() if group is None else group.bundle_specs[1:]


def room(share: Share) -> int:
    """How many workers the nodes that there are now can carry, were there nothing else on them."""
    return sum(_workers_that_fit(place, share) for place in _places())


def memory_of_each(nodes: Sequence[Mapping[str, float]], share: Share, workers: int | Literal["auto"]) -> float:
    """Bytes that each worker can have, where they spread evenly over the nodes that they fit on, or with ``auto`` fill
    them; infinite where Ray names no memory. ``nodes``: as for ``share_of``."""
    fitting = [(node["memory"], _workers_that_fit(node, share)) for node in nodes if "memory" in node]
    most = level = max((fit for _, fit in fitting), default=0)
    if workers != "auto":  # the fewest on one node with which there is a place for all of them
        placed = (level for level in range(1, most) if sum(min(fit, level) for _, fit in fitting) >= workers)
        level = next(placed, most)
    return min((memory / min(fit, level) for memory, fit in fitting if fit), default=math.inf)


def share_of(config: DistributedConfig, nodes: Sequence[Mapping[str, float]]) -> Share:
    """CPUs and GPUs of one worker; raises ClusterError where the cluster can never give them to all workers. One at an
    address may grow: with ``workers: auto`` it needs no room yet.

    ``nodes``: the resources of each node, as Ray names them.
    ``gpus_per_worker`` none: a whole GPU each, or an equal part where there are fewer GPUs than workers; a whole one
    with ``workers: auto``, where there are any now.
    """
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if config.gpus_per_worker is not None:
        each = config.gpus_per_worker
    elif config.workers == "auto" or gpus >= config.workers or not gpus:
        each = min(1.0, gpus)
    else:
        each = 1.0 / math.ceil(config.workers / gpus)
    share = Share(cpus=config.threads, gpus=each)
    room = sum(_workers_that_fit(node, share) for node in nodes)
    if config.workers == "auto":
        least, workers = int(config.address is None), "one worker"
    else:
        least, workers = config.workers, f"{config.workers} workers"
    if least > room:
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        raise ClusterError(
            f"distributed.workers: {workers} ({share} each) would take more than the cluster can give: it has "
            f"{len(nodes)} node(s) with {cpus:g} CPUs and {gpus:g} GPUs, room for {room}"
        )
    return share


def _workers_that_fit(node: Mapping[str, float], share: Share) -> int:
    by_cpu = int(node.get("CPU", 0.0) // share.cpus)
    return by_cpu if share.gpus == 0 else min(by_cpu, int(node.get("GPU", 0.0) / share.gpus + 1e-9))
