"""Who may use a Ray cluster: found out by asking its head, with and without the token, before anything is sent to it.

Whoever can reach an open cluster runs code on all of it: beyond loopback, none without token authentication is used.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import grpc
from ray._common.tls_utils import load_certs_from_env
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
from ray.core.generated.gcs_service_pb2 import CheckAliveReply, CheckAliveRequest
from ray.exceptions import AuthenticationError

from palf_dist.errors import ClusterError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
REMEDY = (
    "start every node with RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token (`ray "
    "get-auth-token --generate` makes one; on Kubernetes authOptions.mode: token in the RayCluster), and have the same "
    "token here; see docs/security.md"
)


def auth_mode(address: str) -> str:
    """How the Ray head at ``address`` (HOST:PORT) is to be talked to: "token", or "disabled" for one on loopback only.

    Answers within seconds. Raises ClusterError for an open head beyond loopback, and where the token is missing or is
    not the cluster's.
    """
    if _admits(address, None):
        if not is_loopback(address):
            raise _open_to_all(address)
        return "disabled"
    token = own_token()
    if token is None:
        raise ClusterError(
            f"distributed.address: the Ray cluster at {address} asks for a token, and there is none here; put it into "
            "RAY_AUTH_TOKEN, or into a file named by RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        )
    if not _admits(address, token):
        raise ClusterError(
            f"distributed.address: the Ray cluster at {address} refuses the token that was found in {origin()}; have "
            "the cluster's own there (`ray get-auth-token` on its head prints it)"
        )
    return "token"


def is_loopback(address: str) -> bool:
    """Whether a host (with or without a port) is this machine and cannot be reached from another one.

    A name counts as what it stands for, all of it; one that stands for nothing does not count.
    """
    try:
        found = socket.getaddrinfo(_host(address), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    ips = (ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found)
    return all((getattr(ip, "ipv4_mapped", None) or ip).is_loopback for ip in ips)


def refuse_open(address: str, hosts: Iterable[str]) -> None:
    """Raises ClusterError where the head at ``address`` asks for no token and one of the cluster's ``hosts`` is beyond
    loopback: its head then listens there too, by whatever address it was found."""
    if any(not is_loopback(host) for host in hosts) and _admits(address, None):
        raise _open_to_all(address)


def own_token() -> str | None:
    """The token as Ray finds it: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token; None
    without any of them. Raises ClusterError where RAY_AUTH_TOKEN_PATH names no file that can be read."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    try:
        if not loader.has_token(ignore_auth_mode=True):
            return None
        return str(loader.get_raw_token(ignore_auth_mode=True))
    except AuthenticationError as error:
        raise ClusterError(f"{str(error).partition('. ')[0]}; name the file that holds the cluster's token") from None


def origin() -> str:
    """Where ``own_token`` has it from, in words."""
    return next(
        (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token"
    )


def protect_token_file() -> None:
    """Make ~/.ray/auth_token the user's alone: Ray writes it for everybody on the machine to read."""
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # there is none, or it is somebody else's to mend
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
            logger.warning("%s could be read by other users of this machine; it no longer can (mode 0600)", path)


def _open_to_all(address: str) -> ClusterError:
    """The refusal of a cluster that anybody who reaches ``address`` can run code on."""
    return ClusterError(
        f"distributed.address: the Ray cluster at {address} takes commands from anybody who reaches it, as its "
        f"authentication is disabled; {REMEDY}"
    )


def _admits(address: str, token: str | None) -> bool:
    """Whether the head answers somebody with this token (None: with none). ClusterError where none answers."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with _channel(address) as channel:
        ask = channel.unary_unary(
            "/ray.rpc.NodeInfoGcsService/CheckAlive",
            request_serializer=CheckAliveRequest.SerializeToString,
            response_deserializer=CheckAliveReply.FromString,
        )
        try:
            ask(CheckAliveRequest(), timeout=PROBE_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ClusterError(
                f"distributed.address: no Ray head answers at {address} ({error.code().name.lower()}); check the "
                "address and the network, or leave distributed.address out for a private Ray"
            ) from None
    return True


def _channel(address: str) -> grpc.Channel:
    """To the head, encrypted where Ray itself is told to by RAY_USE_TLS. ClusterError where it lacks certificates."""
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options=options)
    try:
        chain, key, authority = load_certs_from_env()
    except (RuntimeError, OSError) as error:
        raise ClusterError(
            f"RAY_USE_TLS: the cluster at {address} is to be reached with TLS, and its certificates cannot be read "
            f"({error}); name them in RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT, as on the nodes"
        ) from None
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, chain), options=options)


def _host(address: str) -> str:
    """``address`` without its port and brackets."""
    head, _, port = address.rpartition(":")
    return (head if head and port.isdigit() and (head.endswith("]") or ":" not in head) else address).strip("[]")
