"""A trial as Ray Tune runs it: one process that asks the target for one report after the other."""

from __future__ import annotations

import json
import math
import shutil
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from palf_dist.atomic import replacing_folder
from palf_dist.errors import PalfError
from palf_dist.search.ledger import trial_name
from palf_dist.search.trial import Report, Target, TrialContext

STEP, ERROR, REPORT, FAILURE, FATAL = "step", "error", "report", "failure", "fatal"
"""Keys of a result: a report and what schedulers read of it, why the trial failed, why the search cannot go on."""
TRIALS = "trials"
"""Folder of the run directory that holds the trials' own."""
STOP_FILE = ".stop"
"""Its appearance in the run directory tells the trials to save and return."""
POLL_SECONDS = 0.2
_START = ".start"
_SOURCE, _CONTENT = "source.json", "content"


def result_of(step: int, error: float) -> dict[str, Any]:
    """What schedulers read. No number compares with NaN, so a failed trial is infinitely bad."""
    return {STEP: step, ERROR: error if math.isfinite(error) else math.inf}


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
        try:
            if self._reports is None:
                start = self._start / _CONTENT
                context = TrialContext(self._folder, start if start.exists() else None, self._stop)
                self._reports = self._target.run(self._parameters, context)
            self._last = report = next(self._reports)
        except StopIteration:
            return {"done": True}
        except PalfError as error:
            return {"done": True, FATAL: str(error)}
        except Exception:
            return {"done": True, FAILURE: traceback.format_exc()}
        shutil.rmtree(self._start, ignore_errors=True)  # the trial has a state of its own now
        done = report.done or not math.isfinite(report.error)
        return {**result_of(report.step, report.error), REPORT: report, "done": done}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._close()
        self._begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A copy of the trial's state, for another one to start from."""
        folder = Path(checkpoint_dir)
        (folder / _SOURCE).write_text(json.dumps(self._number))
        if self._last is not None and self._last.checkpoint is not None:
            shutil.copytree(self._last.checkpoint, folder / _CONTENT)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Start from another trial's state; where it is its own, the trial's folder knows better."""
        if json.loads((Path(checkpoint) / _SOURCE).read_text()) != self._number:
            with replacing_folder(self._start) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True)

    def cleanup(self) -> None:
        self._ended.set()
        self._close()

    def _begin(self, config: dict[str, Any]) -> None:
        self._number, self._parameters = config["number"], config["parameters"]
        self._folder = self._run_dir / TRIALS / trial_name(self._number)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start = self._folder / _START  # kept until the first report, so that a restart does not forget it
        self._reports = None
        self._last = None

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
