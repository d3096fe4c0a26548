"""An S3-compatible server on loopback, behind a proxy that can refuse everybody for a while."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

VARIABLES = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_EC2_METADATA_DISABLED": "true"}


@dataclass
class ObjectStore:
    """One bucket, kept in memory."""

    port: int
    down: threading.Event = field(default_factory=threading.Event)

    def uri(self, name: str) -> str:
        return f"s3://bucket/{name}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"


@contextlib.contextmanager
def _proxy(store: ObjectStore, listener: socket.socket, server: int) -> Iterator[None]:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                if store.down.is_set():
                    client.close()
                    continue
                upstream = socket.create_connection(("127.0.0.1", server))
                for source, sink in ((client, upstream), (upstream, client)):
                    threading.Thread(target=copy, args=(source, sink), daemon=True).start()

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and not store.down.is_set():
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture(scope="module")
def object_store() -> Iterator[ObjectStore]:
    """The server, its address and credentials in the environment, for the tests of a module."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would log every request
    before = dict(os.environ)
    os.environ.update(VARIABLES)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(request).close()
        listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        store = ObjectStore(listener.getsockname()[1])
        with _proxy(store, listener, port):
            yield store
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)
