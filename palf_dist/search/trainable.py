"""A trial as Ray Tune runs it: one process that asks the target for one report after the other."""

from __future__ import annotations

import json
import math
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from palf_dist.atomic import replacing_folder
from palf_dist.errors import CheckpointError, PalfError, PolicyFileError, RunInUseError
from palf_dist.redaction import redact
from palf_dist.run_directory import CONFIG
from palf_dist.search.ledger import trial_name
from palf_dist.search.trial import Parameters, Report, Target, TrialContext

STEP, ERROR, REPORT, FAILURE, FATAL = "step", "error", "report", "failure", "fatal"
"""Keys of a result: a report and what schedulers read of it, why the trial failed, why the search cannot go on."""
TRIALS = "trials"
"""Folder of the run directory that holds the trials' own."""
STOP_FILE = ".stop"
"""Its appearance in the run directory tells the trials to save and return."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
"""How long a trial's folder may be in use by its predecessor: after kill -9, one on another node may still be dying."""
_START = ".start"
_PARAMETERS, _CONTENT = "parameters.json", "content"


def result_of(step: int, error: float) -> dict[str, Any]:
    """What schedulers read. No number compares with NaN, so a failed trial is infinitely bad."""
    return {STEP: step, ERROR: error if math.isfinite(error) else math.inf}


def hand_over(checkpoint: Path, run_dir: Path, number: int, parameters: Parameters) -> None:
    """Have trial ``number`` go on from another one's saved state, under these parameters and no others.

    ``checkpoint``: a folder that ``save_checkpoint`` filled. It is copied, and on the disk on return.
    """
    with replacing_folder(run_dir / TRIALS / trial_name(number) / _START) as folder:
        shutil.copytree(checkpoint / _CONTENT, folder / _CONTENT)
        (folder / _PARAMETERS).write_text(_canonical(parameters))


def _canonical(parameters: Parameters) -> str:
    return json.dumps(dict(parameters), sort_keys=True)


class TrialProcess(Trainable):
    """``config``: {"number": of the trial, "parameters": of the target}. Used for several trials, one after another."""

    _reports: Iterator[Report] | None
    _last: Report | None

    def setup(self, config: dict[str, Any], target: Target | None = None, run_dir: Path | None = None) -> None:
        assert target is not None and run_dir is not None
        self._target, self._run_dir = target, run_dir
        self._stop, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="palf-stop", daemon=True).start()
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """The next report; ``done`` with the last one, or alone where there is none to come. A trial whose error is no
        number has failed."""
        if not self._folder.exists():
            return {"done": True, FATAL: self._elsewhere()}
        try:
            self._last = report = self._next_report()
        except StopIteration:
            return {"done": True}
        except (CheckpointError, PolicyFileError) as error:  # of what the trial's folder holds
            return {"done": True, FAILURE: str(error)}
        except PalfError as error:
            return {"done": True, FATAL: str(error)}
        except Exception:
            return {"done": True, FAILURE: redact(traceback.format_exc())}  # it is written down
        shutil.rmtree(self._start, ignore_errors=True)  # the trial has a state of its own now
        done = report.done or not math.isfinite(report.error)
        return {**result_of(report.step, report.error), REPORT: report, "done": done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._close()
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A copy of the trial's state, for another one to start from."""
        if self._last is not None and self._last.checkpoint is not None:
            shutil.copytree(self._last.checkpoint, Path(checkpoint_dir) / _CONTENT)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trial's folder holds its own state, and any that was handed over to it."""

    def restore(self, checkpoint_path: Any) -> None:
        """As ``load_checkpoint``. Ray's own would unpickle a file that was put into the checkpoint's folder."""

    def cleanup(self) -> None:
        self._ended.set()
        self._close()

    def _begin(self, config: dict[str, Any]) -> None:
        self._parameters = config["parameters"]
        self._folder = self._run_dir / TRIALS / trial_name(config["number"])
        if (self._run_dir / CONFIG).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
        self._start = self._folder / _START  # kept until the first report, so that a restart does not forget it
        self._reports = None
        self._last = None

    def _next_report(self) -> Report:
        """Raises what the target does, StopIteration at the end, and RunInUseError once patience is over."""
        patience_ends = time.monotonic() + PATIENCE_SECONDS
        while True:
            if self._reports is None:
                context = TrialContext(self._folder, self._handed_over(), self._stop)
                self._reports = self._target.run(self._parameters, context)
            try:
                return next(self._reports)
            except RunInUseError:
                self._reports = None
                if self._stop.wait(POLL_SECONDS):
                    raise StopIteration from None
                if time.monotonic() > patience_ends:
                    raise

    def _elsewhere(self) -> str:
        return (
            f"run directory: {self._run_dir} is not the driver's on node {socket.gethostname()} ({CONFIG} is missing), "
            "where a trial was to run; search in a folder that all nodes share"
        )

    def _handed_over(self) -> Path | None:
        """The state to start from instead of the own one. Under other parameters than the trial's it was handed over
        in the instant before a crash, and the ledger knows nothing of it."""
        path = self._start / _PARAMETERS
        return self._start / _CONTENT if path.exists() and path.read_text() == _canonical(self._parameters) else None

    def _close(self) -> None:
        """Let the target tidy up in the middle of a trial, if it wants to."""
        close = getattr(self._reports, "close", None)
        if close is not None:
            close()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            if (self._run_dir / STOP_FILE).exists():
                self._stop.set()
                return
