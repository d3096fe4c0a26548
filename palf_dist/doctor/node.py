"""What a node knows of itself. Runs on every node, so it needs nothing but the standard library and Ray's psutil."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path

import ray  # noqa: F401  # brings psutil along, which can be imported from then on

PACKAGES = ("ray", "torch", "palf-dist")
PROBE_SECONDS = 2.0
RAY_PROCESSES = ("raylet", "gcs_server", "ray::", "/ray/", "ray start")


@dataclass(frozen=True)
class Listener:
    """A port of Ray that other machines can reach."""

    port: int
    process: str
    answers: bool  # to HTTP, without a token


@dataclass
class NodeFacts:
    """One node. Times are in seconds."""

    host: str
    versions: dict[str, str]  # python and PACKAGES
    authentication: str  # "token" or "disabled"
    token_file: str | None = None  # where the token is read from a file
    token_file_mode: int | None = None
    listeners: list[Listener] = field(default_factory=list)
    gpus: int = 0  # that the driver of the machine knows
    torch_gpus: int | None = None  # that torch can use; None: not asked, as there are none
    ray_gpus: float = 0.0
    cpus: float = 0.0
    skew: float = 0.0  # clock of the node minus that of the driver
    skew_error: float = 0.0  # the former is not known better
    storage: str | None = None  # why the run directory cannot be written; None: it can, or there is none


def own_versions() -> dict[str, str]:
    """Of this process: python and PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def look(authentication: str) -> NodeFacts:
    """The facts of the machine that this process is on, but for those that only Ray or another node knows."""
    gpus = count_gpus()
    facts = NodeFacts(socket.gethostname(), own_versions(), authentication, gpus=gpus, listeners=listeners())
    if gpus:
        facts.torch_gpus = torch_gpus()
    if authentication == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        if path.exists():
            facts.token_file, facts.token_file_mode = str(path), path.stat().st_mode & 0o777
    return facts


def count_gpus() -> int:
    """GPUs by the machine's own tool, whatever CUDA_VISIBLE_DEVICES says here."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def torch_gpus() -> int:
    """GPUs that torch can use, asked in a process without Ray's restrictions; 0 for a torch without CUDA."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    try:
        asked = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
        )
        return int(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def listeners() -> list[Listener]:
    """The ports on which Ray's processes of this machine, as far as they can be seen, listen beyond loopback."""
    import psutil

    found: dict[int, Listener] = {}
    try:
        connections = psutil.net_connections(kind="inet")
    except psutil.AccessDenied:  # macOS shows them to root only
        return []
    for connection in connections:
        if connection.status != psutil.CONN_LISTEN or connection.pid is None or is_loopback(connection.laddr.ip):
            continue
        try:
            process = psutil.Process(connection.pid)
            command = " ".join(process.cmdline()) or process.name()
        except psutil.Error:
            continue
        if any(sign in command for sign in RAY_PROCESSES) and connection.laddr.port not in found:
            port = connection.laddr.port
            found[port] = Listener(port, process.name(), answers(connection.laddr.ip, port))
    return sorted(found.values(), key=lambda listener: listener.port)


def is_loopback(ip: str) -> bool:
    address = ip_address(ip.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def answers(ip: str, port: int) -> bool:
    """Whether an HTTP server answers somebody without a token."""
    host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(ip, ip.removeprefix("::ffff:"))
    url = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_SECONDS) as answer:
            return bool(answer.status < 400)
    except (OSError, ValueError, urllib.error.HTTPError):
        return False
    except Exception as error:  # gRPC answers in another language, which http.client calls BadStatusLine
        if type(error).__module__ == "http.client":
            return False
        raise
