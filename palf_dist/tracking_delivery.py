"""The delivery process: reads a run's spool and hands it to MLflow, so that no MLflow call ever runs in the driver.

``python -m palf_dist.tracking_delivery RUN_DIR GRACE`` follows the spool until its standard input ends (the driver
closed it, or died), then goes on for at most GRACE seconds while anything is left. It reports on its standard output.
"""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from palf_dist.atomic import exclusive
from palf_dist.containment import is_inside, link_out_of
from palf_dist.mlflow_client import CLIENT_SETTINGS, make_client
from palf_dist.redaction import HIDDEN, redact, without_credentials
from palf_dist.tracking_spool import Spool

POLL = 1.0  # seconds between two looks at the spool
LONGEST_WAIT = 30.0  # seconds between two attempts at a server that does not answer
METRICS_PER_BATCH = 1000  # MLflow's limits
PARAMS_PER_BATCH = 100
LONGEST_PARAM = 500  # of the older servers; the whole configuration is an artifact as well
KEY_TAG = "palf_dist.key"
PARENT_TAG = "mlflow.parentRunId"

PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}
"""Error codes that another attempt cannot mend: the records are reported and passed over."""

Report = Callable[[int, str], None]  # (logging level, message)


class Delivery:
    """One attempt after another at handing a spool to MLflow. Every record is safe to send twice."""

    def __init__(self, spool: Spool, report: Report) -> None:
        self._spool = spool
        self._report = report
        self._client: Any = None
        self._uri = ""
        self._run_ids: dict[str | None, str] = {}

    def deliver(self) -> None:
        """Send what is pending and move the mark along. Raises what MLflow raises when it cannot be reached."""
        if next(self._spool.pending(), None) is None:
            return
        self._connect()
        for kind, records, offset in batches(self._spool.pending()):
            for run, own in _by_run(records).items():
                try:
                    run_id = self._run_ids.get(run) or self._make_trial(run, own[0])
                    getattr(self, f"_send_{kind}")(run_id, own)
                except Exception as error:
                    code = getattr(error, "error_code", None)
                    if code == "RESOURCE_DOES_NOT_EXIST":
                        # Deleted, or another database: start over, with a new run for what is gone.
                        self._spool.run, self._spool.delivered = None, 0
                    if code not in PERMANENT:
                        raise
                    self._report(logging.WARNING, f"MLflow refused {len(own)} {kind} record(s): {first_line(error)}")
            self._spool.delivered = offset

    def _connect(self) -> None:
        """Find this run at its destination, or make it there; learn what earlier processes have made."""
        destination = self._spool.destination
        assert destination is not None
        uri = destination["uri"]
        if self._uri != uri:
            self._client, self._uri = make_client(_with_credentials(uri)), uri
        known = self._spool.run
        if known is None or known["uri"] != uri:
            # A lost answer to an earlier attempt, or the same server under a new address: look before making another.
            key = destination["key"]
            run_id = self._find(key)
            if run_id is None:
                self._spool.delivered = 0
                run_id = self._make(key, destination["name"], destination["started"], {})
            self._spool.run = {"uri": uri, "run_id": run_id, "trials": {}}
        self._run_ids = self._spool.run_ids

    def _make_trial(self, number: str | None, first: dict[str, Any]) -> str:
        """The run of a trial, below that of the search: found at the destination as that one is, or made there."""
        destination, known = self._spool.destination, self._spool.run
        assert number is not None and destination is not None and known is not None
        key = f"{destination['key']}/{number}"
        run_id = self._find(key)
        if run_id is None:
            run_id = self._make(key, f"trial-{number}", first.get("time"), {PARENT_TAG: known["run_id"]})
        self._spool.run = {**known, "trials": {**known.get("trials", {}), number: run_id}}
        self._run_ids[number] = run_id
        return run_id

    def _find(self, key: str) -> str | None:
        found = self._client.search_runs([self._experiment()], f"tags.`{KEY_TAG}` = '{key}'")
        return found[0].info.run_id if found else None

    def _make(self, key: str, name: str, started: int | None, tags: dict[str, str]) -> str:
        return self._client.create_run(self._experiment(), started, {KEY_TAG: key, **tags}, name).info.run_id

    def _experiment(self) -> str:
        assert self._spool.destination is not None
        name = self._spool.destination["experiment"]
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def _send_metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(re.sub(r"[^\w\-./ :]", "_", name), value, record["time"], record["step"])
            for record in records
            for name, value in record["values"].items()
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def _send_params(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:LONGEST_PARAM]) for name, value in records[0]["values"].items()]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=params[start : start + PARAMS_PER_BATCH])

    def _send_tags(self, run_id: str, records: list[dict[str, Any]]) -> None:
        for name, value in records[0]["values"].items():
            self._client.set_tag(run_id, name, value)

    def _send_artifact(self, run_id: str, records: list[dict[str, Any]]) -> None:
        run_dir = self._spool.folder.parent
        path = run_dir / records[0]["path"]
        if not path.exists():
            self._report(logging.WARNING, f"artifact {path} was gone before MLflow could take it")
        elif not is_inside(run_dir, path) or link_out_of(path):
            self._report(logging.WARNING, f"artifact {path} leads out of {run_dir}; MLflow is not given it")
        elif path.is_dir():
            self._client.log_artifacts(run_id, str(path), records[0]["folder"] or path.name)
        else:
            self._client.log_artifact(run_id, str(path), records[0]["folder"] or None)

    def _send_status(self, run_id: str, records: list[dict[str, Any]]) -> None:
        status, moment = records[0]["status"], records[0]["time"]
        if status == "RUNNING":
            self._client.update_run(run_id, status)
        else:
            self._client.set_terminated(run_id, status, moment)


def _by_run(records: list[dict[str, Any]]) -> dict[str | None, list[dict[str, Any]]]:
    """The records of each run: None, or the number of a trial."""
    runs: dict[str | None, list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault(record.get("run"), []).append(record)
    return runs


def batches(pending: Iterator[tuple[dict[str, Any], int]]) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    """Group consecutive metrics records, of whatever run, up to MLflow's limit; every other record stands alone."""
    group: list[dict[str, Any]] = []
    size = end = 0
    for record, offset in pending:
        if record["kind"] == "metrics" and size + len(record["values"]) <= METRICS_PER_BATCH:
            group.append(record)
            size, end = size + len(record["values"]), offset
            continue
        if group:
            yield "metrics", group, end
        group, size, end = ([record], len(record["values"]), offset) if record["kind"] == "metrics" else ([], 0, 0)
        if not group:
            yield record["kind"], [record], offset
    if group:
        yield "metrics", group, end


def first_line(error: Exception) -> str:
    """The gist of an exception: MLflow's are many lines long."""
    text = redact(str(error).strip()) or type(error).__name__
    return text.splitlines()[0][:200]


def follow(spool: Spool, grace: float, report: Report, ended: Callable[[float], bool]) -> int:
    """Deliver until ``ended(seconds to wait)`` and nothing is left (0), or ``grace`` seconds after that (1).

    A server that does not answer is reported once, and once more when it is back.
    """
    delivery = Delivery(spool, report)
    failures = 0
    deadline = float("inf")
    over = False
    while True:
        try:
            with exclusive(spool.lock):
                delivery.deliver()
            if failures:
                report(logging.INFO, "MLflow answers again; all metrics are delivered")
            failures = 0
            if over:
                return 0
        except BlockingIOError:
            pass  # the process of an earlier, killed driver is still at it
        except ImportError as error:
            report(logging.WARNING, f"MLflow cannot be imported ({first_line(error)}); metrics stay in {spool.folder}")
            return 1
        except Exception as error:
            if not failures:
                report(
                    logging.WARNING,
                    f"MLflow takes no metrics ({first_line(error)}); the run goes on, they wait in {spool.folder}",
                )
            failures += 1
        if time.monotonic() > deadline:
            return 1
        if over:
            time.sleep(POLL)
        elif over := ended(min(POLL * 2**failures, LONGEST_WAIT)):
            deadline = time.monotonic() + grace


def _with_credentials(uri: str) -> str:
    """The address as MLflow needs it: what is in the spool holds no credentials, MLFLOW_TRACKING_URI may hold them.

    Those of a server go into MLflow's own variables, as it repeats its address when it complains.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if without_credentials(given) == uri:
        uri = given
    elif HIDDEN in uri:
        raise OSError(f"the credentials for {uri} are not in MLFLOW_TRACKING_URI any more: set it as it was")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return uri


def _redact_into(log: int) -> threading.Thread:
    """Have all that this process prints written to the file ``log``, secrets hidden; ends when stdout and stderr do."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)

    def copy() -> None:
        with os.fdopen(reader, errors="replace") as lines:
            for line in lines:
                os.write(log, redact(line).encode())

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    return thread


def _stdin_ended(seconds: float) -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and not sys.stdin.read(1)


def main(run_dir: str, grace: str) -> int:
    """Set the process up: MLflow's output goes to tracking/delivery.log, ours to the driver; training goes first."""
    spool = Spool(Path(run_dir))
    messages = os.fdopen(os.dup(1), "w")
    log = os.open(spool.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    copier = _redact_into(log)
    os.nice(5)
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)

    def report(level: int, message: str) -> None:
        try:
            print(level, message, file=messages, flush=True)
        except BrokenPipeError:
            print(message, file=sys.stderr)  # the driver is gone

    try:
        return follow(spool, float(grace), report, _stdin_ended)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        copier.join(1.0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
