"""Canaries: secrets of the environment and of addresses come up in nothing that a run writes or says."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from palf_dist.distributed.pool import UnitBug
from palf_dist.tracking import deliver_spool, open_tracker
from palf_dist.units import Runner
from tests.command import SMOKE, Command
from tests.distributed.small import small_config

CANARY = "canary-0815-secret"
VARIABLES = (
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
)
S3 = f"s3://AKIA:{CANARY}@bucket/rows.parquet"


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")


def betrayals(folder: Path) -> list[str]:
    """Files below ``folder`` that hold a canary, in whatever form."""
    forms = (CANARY.encode(), base64.b64encode(f"me:{CANARY}".encode()), base64.b64encode(CANARY.encode()))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files, "nothing to look at"
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


def leaky(shape: object, num_classes: int) -> object:
    """A user's factory that says too much."""
    import os

    raise RuntimeError(f"401: {os.environ['HF_TOKEN']} is no token for {S3}")


class LeakyRunner(Runner):
    """Raises the like in the middle of a unit."""

    def run(self, *arguments: object, **more: object) -> object:  # type: ignore[override]
        leaky(None, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whole_run_and_its_report(cli: Command) -> None:
    cli._monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{cli.folder}/mlflow.db")
    options = ("--config", SMOKE, "--workers", "0", "--set", "evaluation.methods=[ce,policy]")
    ended = cli("meta-train", *options, "--set", "meta_learner.outer_steps=2", "--run-dir", "run")
    assert ended.code == 0, ended
    said = [ended, cli("report", "run"), cli("report", "run", "--json")]
    assert {"run", "mlflow.db"} <= {path.name for path in cli.folder.iterdir()}
    assert betrayals(cli.folder) == []
    assert all(CANARY not in item.out + item.err for item in said)


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://me:{CANARY}@127.0.0.1:9",
        f"data.train=[{{name: rows, path: '{S3}'}}]",
        f"data.train=['{S3}']",
        "tasks.architectures=[{kind: module, factory: 'tests.test_secrets:leaky'}]",
    ],
)
def test_mistakes_are_told_without_them(cli: Command, override: str) -> None:
    said = cli.refused("meta-train", "--config", SMOKE, "--workers", "0", "--set", override, "--run-dir", "run")
    assert CANARY not in said and "AKIA" not in said
    assert not (cli.folder / "run").exists()


def test_no_traceback_shows_them(cli: Command) -> None:
    """A unit that raises is no user's mistake: the traceback is shown, with the cause's own message in it."""
    from palf_dist.distributed import driver

    train = driver.meta_train
    cli._monkeypatch.setattr(driver, "meta_train", lambda *a, **k: train(*a, **k, make_runner=LeakyRunner))
    ended = cli("meta-train", "--config", SMOKE, "--workers", "0", "--run-dir", "run")
    assert ended.code == 1 and "Traceback" in ended.err and "UnitBug" in ended.err and "*** is no token" in ended.err
    assert CANARY not in ended.out + ended.err and "AKIA" not in ended.err
    assert betrayals(cli.folder) == []


def test_what_a_unit_says_is_hidden_for_callers_of_the_library_too(tmp_path: Path) -> None:
    from palf_dist.distributed.driver import meta_train

    with pytest.raises(UnitBug) as caught:
        meta_train(small_config(), tmp_path / "run", make_runner=LeakyRunner)
    assert "is no token for" in str(caught.value) and CANARY not in str(caught.value)


class Server(BaseHTTPRequestHandler):
    """An MLflow server that lets nobody in, and notes what it was shown."""

    shown: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.shown.append(self.headers["Authorization"])
        self.send_response(403)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.slow
def test_credentials_of_the_tracking_address(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They reach the server, and neither the spool nor the log nor a message."""
    for name in VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{CANARY}@127.0.0.1:{port}")
    config = small_config(tracking={"enabled": True})
    tracker = open_tracker(tmp_path, config)
    end = time.monotonic() + 120
    while not Server.shown and time.monotonic() < end:
        time.sleep(0.1)
    assert tracker.close(timeout=1) > 0
    assert set(Server.shown) == {"Basic " + base64.b64encode(f"me:{CANARY}".encode()).decode()}
    assert f"http://***@127.0.0.1:{port}" in (tmp_path / "tracking" / "destination.json").read_text()

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    known = len(Server.shown)
    assert deliver_spool(tmp_path, timeout=8) > 0
    assert len(Server.shown) == known and "set it as it was" in caplog.text
    assert betrayals(tmp_path) == [] and CANARY not in caplog.text
