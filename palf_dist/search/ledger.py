"""trials.jsonl: everything that happened in a search, one line each, and the only truth that a resumed search reads.

A line is on the disk before anything else is done about it; one that a crash has torn is as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from palf_dist.atomic import json_lines, sync
from palf_dist.errors import RunDirectoryError
from palf_dist.search.trial import Parameters, Report

LEDGER = "trials.jsonl"
ENDINGS = ("finished", "stopped", "failed")
"""How a trial ends: by itself, by a scheduler, or with an error."""
REPORTED = ("phi", "gradient", "curvature", "weights", "waypoints", "metrics", "done")
"""Fields of a report beside its step and error."""


@dataclass
class TrialRecord:
    """What is known of one trial."""

    number: int
    parameters: Parameters
    reports: list[Report] = field(default_factory=list)  # since it began, or since PBT gave it another trial's state
    ending: str | None = None  # one of ENDINGS; None while it is unfinished
    message: str = ""  # why it failed
    work: float = 0.0  # sum of "cost" of reports that PBT has discarded

    @property
    def name(self) -> str:
        return trial_name(self.number)

    @property
    def last(self) -> Report | None:
        return self.reports[-1] if self.reports else None

    def knows(self, step: int) -> bool:
        """Whether that step has been noted: a trial that is resumed gives its last report again."""
        return any(report.step == step for report in self.reports)

    @property
    def cost(self) -> float:
        """Gradient evaluations so far, as the last of its reports that counts them says."""
        counted = (report.metrics["cost"] for report in reversed(self.reports) if "cost" in report.metrics)
        return self.work + next(counted, 0.0)


@dataclass(frozen=True)
class Heard:
    """One report of the search, in the order in which they came."""

    seconds: float  # of work on the search, all its processes together
    trainings: int  # trials that had reported by then
    trial: int
    step: int
    error: float


class Ledger:
    """The state of a search. Every change is appended to the file, and reading the file again gives the same state."""

    def __init__(self, run_dir: Path) -> None:
        """Read the ledger of a run directory, if it has one. Nothing is written until the first change.

        Raises RunDirectoryError naming the line that is damaged."""
        self.trials: dict[int, TrialRecord] = {}
        self.moves: list[tuple[str, TrialRecord]] = []  # "created" and endings, in the order in which they came
        self.history: list[Heard] = []
        self._reporting: set[int] = set()  # trials that have reported
        self._path = run_dir / LEDGER
        self._file: BinaryIO | None = None
        data = self._path.read_bytes() if self._path.exists() else b""
        self.seconds_noted = 0.0  # of work up to the last event: a search that is resumed counts on from here
        for number, text in enumerate(data.splitlines(), 1):
            try:
                for line in json_lines(text):
                    self._apply(line)
                    self.seconds_noted = max(self.seconds_noted, line["seconds"])
            except (KeyError, TypeError, ValueError) as error:
                raise RunDirectoryError(
                    f"run directory: line {number} of {self._path} is damaged or does not follow from those before it "
                    f"({type(error).__name__}: {error}); restore the file, or search again in another folder"
                ) from error
        self._torn = bool(data) and not data.endswith(b"\n")
        self._began = time.monotonic() - self.seconds_noted

    @property
    def seconds(self) -> float:
        """Of work on the search so far, all its processes together."""
        return time.monotonic() - self._began

    @property
    def trainings(self) -> int:
        """Trials that have reported."""
        return len(self._reporting)

    def trainings_with(self, number: int) -> int:
        """Trials that will have reported when trial ``number`` has."""
        return len(self._reporting | {number})

    @property
    def ended(self) -> int:
        """Trials that are over."""
        return len(self.moves) - len(self.trials)

    def unfinished(self) -> Iterator[TrialRecord]:
        return (record for record in self.trials.values() if record.ending is None)

    def create(self, parameters: Parameters) -> TrialRecord:
        """A new trial, under the next free number."""
        number = len(self.trials) + 1
        self._append("created", number, parameters=dict(parameters))
        return self.trials[number]

    def report(self, number: int, report: Report) -> None:
        """Note a report of a step that is not known yet."""
        assert not self.trials[number].knows(report.step), f"step {report.step} of trial {number} is noted twice"
        self._append(
            "report",
            number,
            step=report.step,
            error=_finite(report.error),
            phi=_finite(report.phi),
            gradient=_finite(report.gradient),
            curvature=_finite(report.curvature),
            weights=report.weights,
            waypoints=report.waypoints,
            metrics={name: float(value) for name, value in report.metrics.items() if math.isfinite(value)},
            done=bool(report.done),
        )

    def exploit(self, number: int, source: int, parameters: Parameters) -> None:
        """PBT gave the trial the state of trial ``source`` and new parameters: its steps begin anew."""
        self._append("exploited", number, source=source, parameters=dict(parameters))

    def end(self, number: int, ending: str, message: str = "") -> None:
        """The trial is over."""
        assert ending in ENDINGS, ending
        self._append(ending, number, message=message)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _append(self, event: str, number: int, **values: Any) -> None:
        if self._file is None:
            self._file = self._path.open("ab")
            self._file.write(b"\n" if self._torn else b"")  # ends the line that a crash has torn
            sync(self._path.parent)
        line = {"event": event, "trial": number, "seconds": round(self.seconds, 3), **values}
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.seconds_noted = line["seconds"]
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        event, number = line["event"], line["trial"]
        if event == "created":
            if type(number) is not int or number != len(self.trials) + 1:  # it names a folder
                raise ValueError(f"trial {number} comes after {len(self.trials)}")
            self.trials[number] = TrialRecord(number, line["parameters"])
            self.moves.append((event, self.trials[number]))
            return
        record = self.trials[number]
        if record.ending is not None:
            raise ValueError(f"trial {number} has {record.ending} and goes on with {event}")
        if event == "report":
            error = math.nan if line["error"] is None else float(line["error"])
            fields = {name: line[name] for name in REPORTED}
            record.reports.append(Report(line["step"], error, **fields))
            self._reporting.add(number)
            self.history.append(Heard(line["seconds"], len(self._reporting), number, line["step"], error))
        elif event == "exploited":
            record.work = record.cost
            record.reports, record.parameters = [], line["parameters"]
        elif event not in ENDINGS:
            raise ValueError(f"there is no event {event}")
        else:
            record.ending, record.message = event, line["message"]
            self.moves.append((event, record))


def _finite(values: Any) -> Any:
    """The number or the nested lists of numbers as they are; None where one is not finite, which JSON cannot hold."""
    return values if values is not None and np.all(np.isfinite(values)) else None


def trial_name(number: int) -> str:
    """The name of a trial, of its folder and of its MLflow run."""
    return f"{number:05d}"
