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
from palf_dist.mlflow_client import DEFAULT_URI, absolute
from palf_dist.redaction import without_credentials
from palf_dist.tracking_spool import Spool

logger = logging.getLogger("palf_dist.tracking")

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


class TrialTracker(Protocol):
    """Where the trial of a search reports to: a run of its own below that of the search. Nothing here ever waits."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run, or None as long as it has not been made there."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values of one step of the trial."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the trial's run."""
        ...

    def close(self, status: str = "FINISHED") -> None:
        """End the trial's run (FINISHED, FAILED or KILLED)."""
        ...


class SearchTracker(Tracker, Protocol):
    """Where the driver of a search reports to: the run of the search, and one below it for every trial."""

    def child(self, number: str, parameters: Mapping[str, Any]) -> TrialTracker:
        """The run of trial ``number``, which becomes RUNNING: a new one with these parameters, or after a resume the
        one it had, with the parameters that it began with.
        """
        ...


class _NullRun:
    run_id: str | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass


class _NullTrial(_NullRun):
    def close(self, status: str = "FINISHED") -> None:
        pass


class NullTracker(_NullRun):
    """Tracks nothing."""

    def child(self, number: str, parameters: Mapping[str, Any]) -> TrialTracker:
        return _NullTrial()

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> int:
        return 0


class _Log:
    """The spool as the driver writes it, and what was already in it about each run: None, or a trial's number."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.status: dict[str | None, str] = {}
        # A step that is done again after a resume keeps its time: MLflow takes equal (name, step, time, value) once.
        self.times: dict[tuple[str | None, int], int] = {}
        for record in spool.records():
            run = record.get("run")
            if record["kind"] == "metrics":
                self.times[run, record["step"]] = record["time"]
            elif record["kind"] == "status":
                self.status[run] = record["status"]
        spool.open_for_append()

    def append(self, run: str | None, kind: str, **values: Any) -> None:
        self.spool.append({"kind": kind, **({} if run is None else {"run": run}), **values})

    def set_status(self, run: str | None, status: str) -> None:
        self.status[run] = status
        self.append(run, "status", status=status, time=_now())


class _Run:
    """One MLflow run: everything is appended to the spool under the run's name there."""

    def __init__(self, log: _Log, run: str | None, params: Mapping[str, Any]) -> None:
        """Start the run, with its parameters, or go on with it."""
        self._log, self._run = log, run
        new = run not in log.status
        log.set_status(run, "RUNNING")
        if new:  # a parameter never changes in MLflow
            self._append("params", values=_flatten(params))

    @property
    def run_id(self) -> str | None:
        return self._log.spool.run_ids.get(self._run)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        time_of_step = self._log.times.setdefault((self._run, step), _now())
        self._append("metrics", step=step, time=time_of_step, values=values)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        path, run_dir = path.absolute(), self._log.spool.folder.parent.absolute()
        if path.is_relative_to(run_dir):  # a resumed run may lie elsewhere
            path = path.relative_to(run_dir)
        self._append("artifact", path=str(path), folder=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", values=dict(tags))

    def _append(self, kind: str, **values: Any) -> None:
        self._log.append(self._run, kind, **values)


class _MLflowTrial(_Run):
    def close(self, status: str = "FINISHED") -> None:
        self._log.set_status(self._run, status)


class MLflowTracker(_Run):
    """One MLflow run for one run directory, however often it is resumed, and one below it for each trial of a search.

    All go through one spool and one delivery process.
    """

    def __init__(
        self,
        run_dir: Path,
        tracking: TrackingConfig,
        name: str,
        params: Mapping[str, Any],
        *,
        undelivered: str | None = None,
    ) -> None:
        """Start to track, or go on with the run that the directory belongs to. Returns at once, server or not.

        ``name`` and ``params`` (which may be nested) are those of a new run; ``undelivered`` is said of records that
        are left at the end, where it is not that they wait in the directory.
        """
        spool = Spool(run_dir)
        before = spool.destination
        log = _Log(spool)
        spool.destination = _destination(tracking, name, before)
        super().__init__(log, None, params)
        if before is None:
            self.set_tags({"palf_dist.run_dir": str(run_dir)})
        self._process = _DeliveryProcess(spool, run_dir, GRACE, undelivered)

    def child(self, number: str, parameters: Mapping[str, Any]) -> TrialTracker:
        return _MLflowTrial(self._log, number, parameters)

    def close(self, status: str = "FINISHED", timeout: float = 30.0) -> int:
        """End the run; the trials that are still running have been cut short."""
        for run in [run for run, last in self._log.status.items() if last == "RUNNING" and run is not None]:
            self._log.set_status(run, "KILLED")
        self._log.set_status(None, status)
        self._log.spool.close()
        return self._process.finish(timeout)


def open_tracker(run_dir: Path, config: RunConfig) -> Tracker:
    """The tracker that the configuration of a meta-training asks for."""
    return open_search_tracker(
        run_dir, name=config.name, tracking=config.tracking, params=config.model_dump(mode="json")
    )


def open_search_tracker(
    run_dir: Path, *, name: str, tracking: TrackingConfig, params: Mapping[str, Any]
) -> SearchTracker:
    """The tracker of a search. A resumed search goes on with its own run and with those of its trials."""
    return MLflowTracker(run_dir, tracking, name, params) if tracking.enabled else NullTracker()


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

    def __init__(self, spool: Spool, run_dir: Path, grace: float, undelivered: str | None = None) -> None:
        self._spool = spool
        self._undelivered = undelivered or (
            f"they wait in {spool.folder} until the run is resumed or `palf-dist report {run_dir}` is called"
        )
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
            logger.warning("%d records for MLflow are not delivered; %s", left, self._undelivered)
        return left

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            level, _, message = line.strip().partition(" ")
            logger.log(int(level), "%s", message)


def _destination(tracking: TrackingConfig, name: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Where the run is tracked. A resumed run stays where it was unless another address is named now."""
    given = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if given is not None:  # the delivery process finds the credentials in the environment again
        given = without_credentials(given)
    if before is not None and given in (None, before["given"]):
        return before
    uri = absolute(given or DEFAULT_URI)  # so that a resume from another folder finds the same database
    if before is not None:
        return {**before, "given": given, "uri": uri}
    return {
        "given": given,
        "uri": uri,
        "experiment": tracking.experiment,
        "name": name,
        "key": uuid.uuid4().hex,
        "started": _now(),
    }


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    """Configuration paths, as in --set, and their values as text; lists as JSON."""
    if isinstance(value, Mapping):
        return {
            name: text
            for key, item in value.items()
            for name, text in _flatten(item, f"{path}.{key}" if path else key).items()
        }
    return {path: value if isinstance(value, str) else json.dumps(value, default=str)}


def _now() -> int:
    return time.time_ns() // 1_000_000
