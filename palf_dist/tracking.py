"""MLflow behind a small protocol, with a null twin. The driver writes to a spool and never waits for MLflow.

A separate process delivers the spool (tracking_delivery.py). Whatever a dead, hanging or returning server does, a call
here costs the microseconds of appending a line; what could not be delivered is delivered by a later resume or report.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import palf_dist
from palf_dist.atomic import exclusive
from palf_dist.config import RunConfig, TrackingConfig
from palf_dist.tracking_spool import Spool

logger = logging.getLogger("palf_dist.tracking")

DEFAULT_URI = "sqlite:///mlflow.db"
GRACE = 60.0  # seconds for which a delivery process goes on after a driver that was killed


class Tracker(Protocol):
    """Where the driver reports to. No method but ``close`` ever waits, and none raises for a server's sake."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run, or None as long as no server has been reached."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values of one outer step."""
        ...

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Have a file, or a folder with all it holds, uploaded to ``folder`` of the run's artifacts.

        It is read when it is delivered, so it must stay where it is.
        """
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        ...

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> int:
        """End the run (FINISHED, FAILED or KILLED); wait for delivery, in seconds at most; records left undelivered."""
        ...


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> int:
        return 0


class MLflowTracker:
    """One MLflow run for one run directory, however often it is resumed."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        """Start to track, or go on with the run that the directory belongs to. Returns at once, server or not."""
        self._run_dir = run_dir
        self._spool = Spool(run_dir)
        before = self._spool.destination
        # A step that is done again after a resume keeps its time: MLflow takes equal (name, step, time, value) once.
        self._times = {
            record["step"]: record["time"] for record in self._spool.records() if record["kind"] == "metrics"
        }
        self._spool.open_for_append()
        self._spool.destination = _destination(config, before)
        self._append("status", status="RUNNING", time=_now())
        if before is None:
            self._append("params", values=_flatten(config.model_dump(mode="json")))
            self.set_tags({"palf_dist.run_dir": str(run_dir)})
        self._process = _DeliveryProcess(self._spool, run_dir, GRACE)

    @property
    def run_id(self) -> str | None:
        run = self._spool.run
        return run["run_id"] if run else None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._append("metrics", step=step, time=self._times.setdefault(step, _now()), values=values)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._append("artifact", path=str(path.absolute()), folder=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", values=dict(tags))

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> int:
        self._append("status", status=status, time=_now())
        self._spool.close()
        return self._process.finish(timeout)

    def _append(self, kind: str, **values: Any) -> None:
        self._spool.append({"kind": kind, **values})


def open_tracker(run_dir: Path, config: RunConfig) -> Tracker:
    """The tracker that the configuration asks for."""
    return MLflowTracker(run_dir, config) if config.tracking.enabled else NullTracker()


def deliver_spool(run_dir: Path, timeout: float = 60.0) -> int:
    """Deliver what an ended run has left in its spool, for ``timeout`` seconds at most; the records still left.

    While a driver is at work on the run its own process delivers, and this returns at once.
    """
    spool = Spool(run_dir)
    left = sum(1 for _ in spool.pending())
    if not left:
        return 0
    try:
        with exclusive(spool.lock):
            pass
    except BlockingIOError:
        return left
    return _DeliveryProcess(spool, run_dir, timeout).finish(timeout)


class _DeliveryProcess:
    """The process that delivers one spool, and the thread that logs what it has to say."""

    def __init__(self, spool: Spool, run_dir: Path, grace: float) -> None:
        self._spool, self._run_dir = spool, run_dir
        root = str(Path(palf_dist.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "palf_dist.tracking_delivery", str(run_dir), str(grace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            start_new_session=True,  # Ctrl-C is for the driver, which then closes us in its own time
        )
        self._listener = threading.Thread(target=self._listen, name="palf-tracking", daemon=True)
        self._listener.start()

    def finish(self, timeout: float) -> int:
        """Let it deliver for ``timeout`` seconds at most and end it; the number of records left."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        self._process.stdout.close()
        left = sum(1 for _ in self._spool.pending())
        if left:
            logger.warning(
                "%d records for MLflow are not delivered; they wait in %s until the run is resumed or "
                "`palf-dist report %s` is called",
                left,
                self._spool.folder,
                self._run_dir,
            )
        return left

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            level, _, message = line.strip().partition(" ")
            logger.log(int(level), "%s", message)


def _destination(config: RunConfig, before: dict[str, Any] | None) -> dict[str, Any]:
    """Where the run is tracked. A resumed run stays where it was unless another address is named now."""
    tracking: TrackingConfig = config.tracking
    given = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if before is not None and given in (None, before["given"]):
        return before
    uri = given or DEFAULT_URI
    if uri.startswith("sqlite:///"):  # absolute, so that a resume from another folder finds the same database
        uri = "sqlite:///" + str(Path(uri.removeprefix("sqlite:///")).absolute())
    if before is not None:
        return {**before, "given": given, "uri": uri}
    return {
        "given": given,
        "uri": uri,
        "experiment": tracking.experiment,
        "name": config.name,
        "key": uuid.uuid4().hex,
        "started": _now(),
    }


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    """Configuration paths, as in --set, and their values as text; lists as JSON."""
    if isinstance(value, dict):
        return {
            name: text
            for key, item in value.items()
            for name, text in _flatten(item, f"{path}.{key}" if path else key).items()
        }
    return {path: value if isinstance(value, str) else json.dumps(value)}


def _now() -> int:
    return time.time_ns() // 1_000_000
