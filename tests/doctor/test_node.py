from __future__ import annotations

import http.server
import socket
import threading
from contextlib import closing

import pytest

from palf_dist.doctor import node


def test_who_answers_without_a_token() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *arguments: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        assert node.answers("0.0.0.0", server.server_port)
        server.shutdown()
        thread.join()
    assert not node.answers("127.0.0.1", server.server_port)


def test_what_speaks_no_http_does_not_answer() -> None:
    def speak() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00\n")

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        thread = threading.Thread(target=speak)
        thread.start()
        assert not node.answers("127.0.0.1", server.getsockname()[1])
        thread.join()


@pytest.mark.parametrize(
    ("ip", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(ip: str, loopback: bool) -> None:
    assert node.is_loopback(ip) == loopback


def test_token_file(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path_factory.mktemp("token") / "token"
    token.touch(0o640)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    facts = node.look("token")
    assert (facts.token_file, facts.token_file_mode) == (str(token), token.stat().st_mode & 0o777)
    assert facts.versions["python"].count(".") == 2 and facts.versions["ray"]
    assert node.look("disabled").token_file is None
