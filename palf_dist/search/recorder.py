"""What a search does about everything that Ray Tune tells it: best answer, ledger, searcher, tracking, progress."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from palf_dist.errors import ClusterError
from palf_dist.progress import Progress
from palf_dist.search.anytime import Anytime
from palf_dist.search.ledger import Ledger, TrialRecord
from palf_dist.search.proposals import Searcher
from palf_dist.search.schedulers import Population
from palf_dist.search.trainable import FAILURE, FATAL, REPORT, STOP_FILE, hand_over
from palf_dist.search.trial import Report
from palf_dist.tracking import SearchTracker, TrialTracker

DIVERGED = "its error is no longer a number"
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
CHECK_SECONDS = 30.0
"""How often it is asked whether the search can still go on."""


def ending_of(record: TrialRecord) -> tuple[str, str] | None:
    """How a trial has ended and why, by its last report; None where that is not the last one to come."""
    if record.last is not None and not math.isfinite(record.last.error):
        return "failed", DIVERGED
    return ("finished", "") if record.last is not None and record.last.done else None


class Halt(Stopper):
    """Ends the whole search when the user wants so, when its time is over, or when it cannot go on."""

    def __init__(
        self, run_dir: Path, stop: threading.Event, deadline: float | None, check: Callable[[], object] | None = None
    ) -> None:
        """``deadline``: in time.monotonic() seconds; ``check``: raises ClusterError when no trial can be placed any
        more, as nodes have died."""
        self.run_dir, self.stop, self._deadline, self._check = run_dir, stop, deadline, check
        self._checked = time.monotonic()
        self.fatal: str | None = None

    @property
    def seconds_left(self) -> float | None:
        """Of the time budget; None where there is none."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether the search is to end before all its trials have."""
        return self.stop.is_set() or self.seconds_left == 0.0 or self.fatal is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for the copy in Tune's own snapshots, which nobody reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._check is not None and time.monotonic() - self._checked >= CHECK_SECONDS:
            try:
                self._check()
            except ClusterError as error:
                self.fatal = str(error)
            self._checked = time.monotonic()
        if self.over:
            (self.run_dir / STOP_FILE).touch()
        return self.over


class Recorder(Callback):
    """Hears everything in the driver's own thread. What it notes is on the disk before the trial goes on."""

    def __init__(
        self,
        ledger: Ledger,
        anytime: Anytime,
        proposer: Searcher,
        population: Population | None,
        halt: Halt,
        tracker: SearchTracker,
        progress: Progress,
    ) -> None:
        self._ledger, self._anytime, self._proposer, self._population = ledger, anytime, proposer, population
        self._halt, self._tracker, self._progress = halt, tracker, progress
        self._children: dict[int, TrialTracker] = {}
        self._failures: dict[int, str] = {}
        self._returned: set[int] = set()  # trials whose target had no more to report
        self._running: set[int] = set()

    def on_trial_start(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        record = self._record(trial)
        if record.number not in self._children:
            self._children[record.number] = self._tracker.child(record.name, record.parameters)
        self._running.add(record.number)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: Sequence[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._record(trial)
        if FATAL in result:
            self._halt.fatal = result[FATAL]
        elif FAILURE in result:
            self._failures[record.number] = result[FAILURE]
        elif REPORT not in result:
            self._returned.add(record.number)
        else:
            self._note(record, result[REPORT])
        taken = None if self._population is None else self._population.taken_over(record.number)
        if taken is not None and self._halt.fatal is None:
            hand_over(taken.checkpoint, self._halt.run_dir, record.number, taken.parameters)
            self._ledger.exploit(record.number, taken.source, taken.parameters)
        self._show()

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        record = self._record(trial)
        self._running.discard(record.number)
        if record.number in self._failures:
            self._end(record, "failed", self._failures.pop(record.number))
        elif (ending := ending_of(record)) is not None:
            self._end(record, *ending)
        elif not self._halt.over:
            if record.number not in self._returned:
                self._end(record, "stopped")
            elif record.last is None:
                self._end(record, "failed", "the target gave no report")
            else:
                self._end(record, "finished")
        self._show()

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **info: Any) -> None:
        self._running.discard(self._record(trial).number)
        self._end(self._record(trial), "failed", f"its process was lost, for the last time so: {trial.get_error()}")
        self._show()

    def _record(self, trial: Trial) -> TrialRecord:
        return self._ledger.trials[trial.config["number"]]

    def _note(self, record: TrialRecord, report: Report) -> None:
        if self._population is not None and report.checkpoint is None:
            self._halt.fatal = "scheduler: pbt hands checkpoints on, and this target gives none; choose asha or none"
            return
        if record.knows(report.step):
            return  # a trial that was resumed gives its last report again
        ledger, number = self._ledger, record.number
        trainings = ledger.trainings_with(number)
        self._anytime.offer(report, number, record.parameters, trainings, ledger.seconds)
        self._log(record, report, trainings)
        ledger.report(number, report)
        self._anytime.write_curve(ledger.history)

    def _log(self, record: TrialRecord, report: Report, trainings: int) -> None:
        """To MLflow. Before the ledger, as what is in that is never told again; here a repetition does no harm."""
        metrics = {"error": report.error, **report.metrics}
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._children[record.number].log_metrics(finite, report.step)
        best = self._anytime.best
        if best is not None:
            step = len(self._ledger.history) + 1
            self._tracker.log_metrics({"best_error": best.error, "trainings": trainings}, step)

    def _end(self, record: TrialRecord, ending: str, message: str = "") -> None:
        self._children[record.number].close(MLFLOW_STATUS[ending])
        self._ledger.end(record.number, ending, message)
        self._proposer.tell(record)
        if message:
            self._progress.event(f"trial {record.name} failed: {message.strip().splitlines()[-1]}")

    def _show(self) -> None:
        best = self._anytime.best
        facts = [f"{len(self._running)} running"]
        if best is not None:
            facts.append(f"best error {best.error:.5g} of trial {best.trial}")
        if self._halt.seconds_left is not None:
            facts.append(f"{self._halt.seconds_left:.0f} s of the time budget left")
        self._progress.status.facts = facts
        self._progress.advance(self._ledger.ended)
