"""Addresses at which no Ray answers, or an open one does."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import ray

from palf_dist.errors import ClusterError
from palf_dist.jobs import client
from palf_dist.jobs.client import JobsClient, UnreachableError, resolve_address


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers everybody, in the words of the server's ``text``; ``shown`` are the tokens that it was sent."""

    def do_GET(self) -> None:
        self.server.shown.append(self.headers["Authorization"])  # type: ignore[attr-defined]
        body = self.server.text.encode()  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    for name in (*client.ADDRESS_VARIABLES, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary" * 8)
    with http.server.HTTPServer(("0.0.0.0", 0), Handler) as server:
        server.shown = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def outside_address() -> str | None:
    """An address of this machine that others can reach it by; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def test_something_else_answers(server: http.server.HTTPServer) -> None:
    server.text = "<html>"  # type: ignore[attr-defined]
    address = resolve_address(f"127.0.0.1:{server.server_port}")
    with pytest.raises(ClusterError, match=r"what answers there \(HTTP 200\) is not Ray's dashboard") as refused:
        JobsClient(address)
    assert "canary" not in str(refused.value)
    assert server.shown == [None, "Bearer " + "canary" * 8]  # type: ignore[attr-defined]


def test_the_token_file_is_closed_on_a_machine_that_only_submits(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("f" * 64)
    path.chmod(0o644)
    server.text = "<html>"  # type: ignore[attr-defined]
    with pytest.raises(ClusterError, match="is not Ray's dashboard"):
        JobsClient(f"http://127.0.0.1:{server.server_port}")
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_sent_to_a_cluster_that_asks_nobody_for_a_token(server: http.server.HTTPServer) -> None:
    host = outside_address()
    if host is None:
        pytest.skip("this machine has no address beyond loopback")
    server.text = f'{{"ray_version": "{ray.__version__}"}}'  # type: ignore[attr-defined]
    with pytest.raises(ClusterError, match=r"takes commands from anybody who reaches it; .*RAY_AUTH_MODE=token"):
        JobsClient(f"http://{host}:{server.server_port}")
    assert server.shown == [None]  # type: ignore[attr-defined]
    server.text = "<html>"  # type: ignore[attr-defined]
    with pytest.raises(ClusterError, match="is not Ray's dashboard"):
        JobsClient(f"http://{host}:{server.server_port}")
    assert server.shown == [None, None]  # type: ignore[attr-defined]


def test_what_never_answers_is_not_waited_for(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PROBE_SECONDS", 0.3)
    message = r"no Ray dashboard answers there \(no answer in time\)"
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(UnreachableError, match=message):
        JobsClient(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://", "--address http://: not a URL"),
        ("http://host:port", "not a URL; write http://HOST:PORT"),
        ("http://me:canary@host:8265", "--address: holds a user or password; leave them out"),
    ],
)
def test_addresses_that_are_none(server: http.server.HTTPServer, address: str, message: str) -> None:
    with pytest.raises(ClusterError) as refused:
        resolve_address(address)
    assert message in str(refused.value) and "canary" not in str(refused.value)


def test_variables_go_before_the_option_as_with_ray(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_address(None) == "http://127.0.0.1:8265"
    assert resolve_address("https://ray.example:443/") == "https://ray.example:443"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    assert resolve_address("http://b:2") == "http://a:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://c:3")
    assert resolve_address("http://b:2") == "http://c:3"
