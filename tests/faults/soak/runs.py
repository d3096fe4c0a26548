"""The drivers of a soak: one meta-training after the other, resumed whenever its driver dies, and compared at its end.

One thread keeps them going while it waits in ``Runs.until``; each fault has a thread of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from palf_dist import faults
from palf_dist.atomic import json_lines
from palf_dist.checkpoint import latest_checkpoint
from palf_dist.config import RunConfig
from palf_dist.meta_learner import REFUSAL_CAUSES
from palf_dist.run_directory import CONFIG, METRICS
from palf_dist.tracking import deliver_spool
from palf_dist.tracking_spool import Spool
from tests.distributed.fingerprint import fingerprint
from tests.faults.soak.mischief import KINDS, POINTS
from tests.faults.soak.schedule import Planned
from tests.faults.soak.stage import NODES, Stage
from tests.processes import ROOT
from tests.test_tracking import history

LIMIT = 300.0
"""Seconds without recovery after which the run is taken to hang."""

NOTICED_SECONDS = 10.0
"""After which nobody will say any more that he has noticed a fault: it met no worker, as a driver was just starting."""

MOST_FAILURES = 20
"""Times in a row that a driver may end by itself before it is given up."""

RESTART_SECONDS = 0.5
"""Until somebody has seen that a driver is gone."""

Line = tuple[float, dict[str, Any]]


class SoakError(Exception):
    """The run did not survive; the message says why."""


@dataclass(eq=False)
class Fault:
    """One that was begun, or is armed."""

    planned: Planned
    began: float | None = None
    ended: float | None = None  # at once, where it is of no kind that passes
    noticed: bool = False
    recovered: float | None = None  # a step or a unit was done with all workers there

    @property
    def seconds(self) -> float:
        """From its end to the recovery."""
        assert self.ended is not None and self.recovered is not None
        return self.recovered - self.ended


class Driver:
    """One process that works on a run directory, and what it says."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.started = time.monotonic()
        self._log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[Line] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def line(self) -> Line | None:
        """The next line and when it came; None where there is none for a moment."""
        with contextlib.suppress(queue.Empty):
            return self._lines.get(timeout=0.05)
        return None

    @property
    def ended(self) -> bool:
        """Gone, and everything that it said was read."""
        return self.process.poll() is not None and not self._reader.is_alive() and self._lines.empty()

    @property
    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            for facts in json_lines(line.encode()):  # Ray prints warnings of its own there
                self._lines.put((time.monotonic(), facts))


def command(config: RunConfig, file: Path, run_dir: Path, how: str) -> list[str]:
    """The command of a driver; writes the configuration to ``file``."""
    file.write_text(config.model_dump_json())
    return [sys.executable, "-m", "tests.faults.drive", str(file), str(run_dir), how]


class Runs:
    """Keeps a driver at work on ``stage`` and knows what became of the faults and of the runs."""

    def __init__(self, stage: Stage, config: RunConfig, undisturbed: dict[str, bytes | str]) -> None:
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()
        self.identical = self.different = 0  # meta-trainings that ended
        self.began = time.monotonic()
        self.working = False  # all workers have been at work
        self._stage, self._config, self._undisturbed = stage, config, undisturbed
        self._driver: Driver | None = None
        self._groups: list[int] = []  # process groups of all drivers so far
        self._failures = 0
        self._ending = False
        self._threads = ThreadPoolExecutor(32)
        self._acts: dict[Future[None], Fault] = {}

    def commit(self, planned: Planned) -> None:
        """Begin a fault; it goes on by itself."""
        fault = Fault(planned)
        self.faults.append(fault)
        self._acts[self._threads.submit(self._act, fault)] = fault

    def settled(self, kind: str | None = None) -> bool:
        """Whether the run has recovered from all faults (of one kind) so far."""
        return all(fault.recovered for fault in self.faults if kind in (None, fault.planned.kind))

    def until(self, condition: Callable[[], bool], limit: float = LIMIT) -> None:
        """Keep the runs going until ``condition`` holds. Raises SoakError after ``limit`` seconds."""
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                waiting = [fault.planned.kind for fault in self.faults if fault.recovered is None]
                raise SoakError(f"no recovery within {limit:g} s from: {', '.join(waiting) or 'nothing'}")
            for act in [act for act in self._acts if act.done()]:
                self._acts.pop(act)
                act.result()
            self._keep_going()

    def finish(self) -> None:
        """Let the run that is at work come to its end."""
        self._ending = True
        self.until(lambda: self._driver is None, 4 * LIMIT)

    def close(self) -> None:
        """End everything that was started here."""
        self._stage.over.set()
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._threads.shutdown()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def _act(self, fault: Fault) -> None:
        kind = KINDS[fault.planned.kind]
        with kind.act(self._stage, fault.planned):
            fault.noticed = kind.evidence == ""
            fault.began = time.monotonic()
            if kind.passes:
                self.say(f"#{fault.planned.number} {fault.planned.kind}: {fault.planned.seconds:.1f} s")
                self._stage.over.wait(fault.planned.seconds)
            else:
                self.say(f"#{fault.planned.number} {fault.planned.kind}")
        fault.ended = time.monotonic()

    def _keep_going(self) -> None:
        driver = self._driver
        if driver is None:
            if not self._ending:
                self._start(new=True)
        elif (line := driver.line()) is not None:
            self._hear(*line)
        elif driver.ended:
            self._end(driver)

    @property
    def _run_dir(self) -> Path:
        return self._stage.disk / f"run-{self.identical + self.different + 1}"

    def _start(self, *, new: bool) -> None:
        how = "resume" if (self._run_dir / CONFIG).exists() else "new"
        if how == "new":  # a driver that was killed very early has left a lock file at most
            shutil.rmtree(self._run_dir, ignore_errors=True)
        if not new:
            time.sleep(RESTART_SECONDS)
        injected = [
            {"point": point, "action": action, "once_file": str(self._stage.mark(point))}
            for point, action in POINTS.items()
        ]
        folder = self._stage.folder
        environment = {faults.VARIABLE: json.dumps(injected), "PALF_CACHE": str(folder / "cache")}
        line = command(self._config, folder / "config.json", self._run_dir, how)
        self._driver = Driver(line, environment, folder / "drivers.log")
        self._stage.driver = self._driver.process
        self._groups.append(self._driver.process.pid)
        for fault in self._open():
            fault.noticed = True

    def _open(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.began is not None and fault.recovered is None]

    def _hear(self, when: float, said: dict[str, Any]) -> None:
        event = said.get("event", "")
        self.counts["issued again"] += "is issued again" in event
        self.counts["issued a second time"] += "is issued a second time" in event
        for fault in self._open():
            evidence = KINDS[fault.planned.kind].evidence
            assert fault.began is not None
            fault.noticed |= bool(evidence) and str(evidence) in event
            fault.noticed |= bool(evidence) and when > fault.began + NOTICED_SECONDS
            if fault.noticed and fault.ended is not None and when > fault.ended and said.get("workers") == NODES:
                fault.recovered = when
                self.say(f"#{fault.planned.number} {fault.planned.kind}: recovered after {fault.seconds:.1f} s")
        if "done" in said:
            self._failures = 0
            self.working |= said["workers"] == NODES

    def _end(self, driver: Driver) -> None:
        """What to do once a driver is gone."""
        self._stage.driver = self._driver = None
        code = driver.process.returncode
        if code == 0:
            self._compare()
            return
        if code == -signal.SIGKILL:
            self.counts["drivers killed"] += 1
        else:
            self._failures += 1
            self.counts["drivers that ended by themselves"] += 1
            self.say(f"the driver ended with exit code {code}: {driver.last_words}")
            if self._failures > MOST_FAILURES:
                raise SoakError("a driver ends by itself again and again")
        self._start(new=False)

    def _compare(self) -> None:
        run_dir = self._run_dir
        found = fingerprint(run_dir)
        differing = sorted(
            name for name in found.keys() | self._undisturbed if found.get(name) != self._undisturbed.get(name)
        )
        differing += self._untracked(run_dir)
        checkpoint = latest_checkpoint(run_dir)
        assert checkpoint is not None
        _, _, applied, *refused = checkpoint.learner["counters"].tolist()
        self.counts["applied"] += applied
        for cause, count in zip(REFUSAL_CAUSES, refused, strict=True):
            self.counts[f"refused {cause}"] += count
        if differing:
            kept = Path(f"{self._stage.folder}-{run_dir.name}")
            shutil.copytree(run_dir, kept)
            self.different += 1
            self.say(f"{run_dir.name} is DIFFERENT from the undisturbed one in {', '.join(differing)}; see {kept}")
        else:
            self.identical += 1
            self.say(f"{run_dir.name} has ended, identical to the undisturbed one, all of it in MLflow")
        shutil.rmtree(run_dir)

    def _untracked(self, run_dir: Path) -> list[str]:
        """What MLflow lacks of a run's metrics, or has twice."""
        left = deliver_spool(run_dir)
        if left:
            return [f"MLflow ({left} records undelivered)"]
        rows = pq.read_table(run_dir / METRICS, columns=["outer_step", "outer_loss"]).to_pylist()
        expected = {row["outer_step"]: [row["outer_loss"]] for row in rows}
        run_id = Spool(run_dir).run_ids[None]
        return [] if history(self._stage.server.uri, run_id, "outer_loss") == expected else ["MLflow (outer_loss)"]
