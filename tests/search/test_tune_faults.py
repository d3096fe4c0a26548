"""A search that is killed for real, again and again, and what is left of it each time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.randomness import random_generator
from palf_dist.search.anytime import ANYTIME, read_best
from palf_dist.search.ledger import LEDGER, Ledger
from tests.processes import Process, Spawn, wait_until
from tests.search.quadratic import WORK

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

TRIALS, STEPS, DELAY = 6, 4, 0.1

Drive = Callable[[str], Process]


@pytest.fixture
def drive(spawn: Spawn, tmp_path: Path) -> Drive:
    return lambda how: spawn("tests.search.drive", str(tmp_path / "run"), how, *map(str, (TRIALS, STEPS, DELAY)))


class Watch:
    """Looks at a run directory again and again, and finds it valid and no worse than before."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._best, self._finished = run_dir, math.inf, dict[int, bytes]()

    @property
    def lines(self) -> int:
        path = self._run_dir / LEDGER
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def waits_for(self, process: Process, lines: int) -> bool:
        """Look until the ledger has so many lines; False where the search ended before."""

        def found() -> bool:
            self.look()
            return self.lines >= lines

        return wait_until(found, process)

    def look(self) -> None:
        if not (self._run_dir / ANYTIME).exists():
            return
        best = read_best(self._run_dir)
        assert best is not None or self._best == math.inf
        if best is not None:
            assert best.error <= self._best
            self._best = best.error
        at_once = pa.BufferReader((self._run_dir / ANYTIME).read_bytes())  # it may be replaced while it is read
        curve = [value for value in pq.read_table(at_once)["best"].to_pylist() if value is not None]
        assert curve == sorted(curve, reverse=True) and (not curve or curve[-1] >= self._best)

    def look_at_trials(self) -> Ledger:
        """Also: no finished trial is lost or was done again. To be called while nobody writes."""
        self.look()
        ledger = Ledger(self._run_dir)
        for number, trial in ledger.trials.items():
            work = self._run_dir / "trials" / trial.name / WORK
            if number in self._finished:
                assert trial.ending == "finished" and work.read_bytes() == self._finished[number]
            elif trial.ending == "finished":
                self._finished[number] = work.read_bytes()
        return ledger


def test_a_search_that_is_killed_until_it_is_done(drive: Drive, tmp_path: Path) -> None:
    watch, generator = Watch(tmp_path / "run"), random_generator("kill")
    process, kills = drive("new"), 0
    while watch.waits_for(process, watch.lines + int(generator.integers(6, 18))):
        time.sleep(generator.uniform(0.0, 2 * DELAY))
        process.kill()
        process.communicate()
        kills += 1
        watch.look_at_trials()
        process = drive("resume")
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert kills >= 2
    ledger = watch.look_at_trials()
    assert list(ledger.trials) == list(range(1, TRIALS + 1))
    for trial in ledger.trials.values():
        assert trial.ending == "finished" and [report.step for report in trial.reports] == list(range(1, STEPS + 1))
        work = (tmp_path / "run" / "trials" / trial.name / WORK).read_text().splitlines()
        assert len({json.loads(line)["step"] for line in work}) == len(work), "a step was done twice"
    result = json.loads(output)
    best = read_best(tmp_path / "run")
    assert best is not None and result["error"] == best.error == min(
        report.error for trial in ledger.trials.values() for report in trial.reports
    )
    assert result["trials"] == {"finished": TRIALS, "stopped": 0, "failed": 0, "unfinished": 0}
    heard = [(item.trial, item.step) for item in ledger.history]
    assert len(heard) == len(set(heard)) == TRIALS * STEPS == pq.read_table(tmp_path / "run" / ANYTIME).num_rows
