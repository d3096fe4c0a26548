"""Who is let in, asked of real heads: one that is open to all, and one that wants a token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray._common.tls_utils import generate_self_signed_tls_certs

from palf_dist.distributed import authentication
from palf_dist.distributed.cluster import connected
from palf_dist.errors import ClusterError

TOKEN = "f" * 64

HEAD = """
import sys
from ray.cluster_utils import Cluster

head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    print(head.address, flush=True)
    sys.stdin.read()
finally:
    head.shutdown()
"""


@contextmanager
def running_head(mode: str, **settings: str) -> Iterator[str]:
    """A head that other machines can reach; its address."""
    settings |= {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", HEAD],
        env={**os.environ, **settings, "RAY_ADDRESS": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        # Ray prints as well
        yield next(line.strip() for line in process.stdout if line.strip().rpartition(":")[2].isdigit())
        process.communicate("")


@pytest.fixture(scope="module", params=["disabled", "token"])
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The authentication mode of a head that other machines can reach, and its address."""
    with running_head(request.param) as address:
        yield request.param, address


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of a user with a token and a home of his own."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return monkeypatch


def refused(address: str) -> str:
    """What is said instead of connecting."""
    with (
        pytest.raises(ClusterError, match=r"^(distributed\.address: |RAY_AUTH_TOKEN_PATH )") as caught,
        connected(address, cpus=1),
    ):
        raise AssertionError("it was used")
    assert TOKEN not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_only_a_head_that_asks_for_the_token_is_used(
    head: tuple[str, str], token: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mode, address = head
    if authentication.is_loopback(address):
        pytest.skip("this machine has no address beyond loopback")
    if mode == "disabled":
        assert "takes commands from anybody who reaches it" in refused(address)
        token.setenv("RAY_AUTH_MODE", "disabled")
        assert "RAY_AUTH_MODE=token" in refused(address), "no setting of the user's opens what is closed"
        with pytest.raises(ClusterError, match="takes commands"):  # found by loopback, with a node beyond it
            authentication.refuse_open(address, ["127.0.0.1", address])
        authentication.refuse_open(address, ["127.0.0.1"])
        return
    assert authentication.auth_mode(address) == "token"
    authentication.refuse_open(address, [address])
    token.setenv("RAY_AUTH_TOKEN", "0" * 64)
    assert "refuses the token that was found in RAY_AUTH_TOKEN" in refused(address)
    token.delenv("RAY_AUTH_TOKEN")
    assert "asks for a token, and there is none here" in refused(address)
    token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "missing"))
    assert "RAY_AUTH_TOKEN_PATH" in refused(address)
    (tmp_path / "missing").write_text(TOKEN)
    assert authentication.auth_mode(address) == "token"


@pytest.mark.slow
def test_a_cluster_with_tls_is_used(token: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"RAY_USE_TLS": "1"}
    for content, names in zip(
        generate_self_signed_tls_certs(), (("SERVER_CERT", "CA_CERT"), ("SERVER_KEY",)), strict=True
    ):
        for name in names:
            settings[f"RAY_TLS_{name}"] = str(tmp_path / name)
            (tmp_path / name).write_text(content)
    with running_head("token", **settings) as address:
        assert "no Ray head answers" in refused(address), "without TLS"
        for name, value in settings.items():
            token.setenv(name, value)
        with connected(address, cpus=1):
            assert ray.get(ray.remote(lambda: 5).remote()) == 5


def test_tls_without_certificates_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.delenv("RAY_TLS_CA_CERT", raising=False)
    with pytest.raises(ClusterError, match=r"^RAY_USE_TLS: .*name them in RAY_TLS_SERVER_CERT, "):
        authentication.auth_mode("127.0.0.1:9")
    for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT"):
        monkeypatch.setenv(f"RAY_TLS_{name}", str(tmp_path / name))
    with pytest.raises(ClusterError, match=r"^RAY_USE_TLS: .*No such file.*SERVER_CERT"):
        authentication.auth_mode("127.0.0.1:9")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:6379", "localhost:1", "[::1]:6379", "::1", "127.1.2.3", "::ffff:127.0.0.1"]
)
def test_loopback(address: str) -> None:
    assert authentication.is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:6379", "192.0.2.2", "[2001:db8::1]:6379", "nosuch.invalid:1"])
def test_beyond_loopback(address: str) -> None:
    assert not authentication.is_loopback(address)


def test_the_token_file_that_ray_writes_for_all_is_closed(
    token: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authentication.protect_token_file()  # there is none yet
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text(TOKEN)
    path.chmod(0o644)
    authentication.protect_token_file()
    authentication.protect_token_file()
    assert path.stat().st_mode & 0o777 == 0o600
    assert caplog.text.count("could be read by other users") == 1 and TOKEN not in caplog.text
