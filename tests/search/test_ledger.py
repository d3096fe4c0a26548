from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palf_dist.errors import RunDirectoryError
from palf_dist.search.ledger import LEDGER, Ledger
from palf_dist.search.trial import Report

ERRORS = st.one_of(st.floats(-5, 5), st.just(math.nan), st.just(math.inf))
MOVES = st.lists(
    st.tuples(st.sampled_from(["create", "report", "report", "exploit", "end"]), st.integers(0, 4), ERRORS), max_size=25
)


def act(ledger: Ledger, move: tuple[str, int, float]) -> None:
    """One change of the ledger that is possible in its state; nothing where none of that kind is."""
    what, choice, error = move
    live = list(ledger.unfinished())
    if what == "create":
        ledger.create({"x": error if math.isfinite(error) else 0.0, "name": f"é{choice}"})
    elif live:
        record = live[choice % len(live)]
        if what == "report":
            step = record.reports[-1].step + 1 if record.reports else 1
            metrics = {"cost": 2.0 * step, "bad": math.nan}
            ledger.report(record.number, Report(step, error, phi=[1.0, error], metrics=metrics))
        elif what == "exploit":
            ledger.exploit(record.number, 1, {"x": 0.5})
        else:
            ledger.end(record.number, ("finished", "stopped", "failed")[choice % 3], "why")


def state(ledger: Ledger) -> str:
    """All that a search reads from it; NaN prints equal."""
    return repr((ledger.trials, ledger.history, ledger.ended, ledger.trainings, [event for event, _ in ledger.moves]))


@given(MOVES, st.integers(0, 60))
def test_reading_again_gives_the_same_state_whatever_was_torn(moves: list[Any], torn: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger, states = Ledger(folder), []
        for move in moves:
            states.append((state(ledger), ledger.seconds))
            act(ledger, move)
        ledger.close()
        again = Ledger(folder)
        assert state(again) == state(ledger)
        if not (folder / LEDGER).exists():  # nothing was done
            return
        lines = (folder / LEDGER).read_bytes().splitlines(keepends=True)
        kept = min(torn, len(lines[-1]) - 1)
        (folder / LEDGER).write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
        before = Ledger(folder)
        whole = kept == len(lines[-1]) - 1  # only the end of the line is missing
        assert state(before) == state(ledger) if whole else len(before.history) <= len(ledger.history)
        before.create({"x": 1.0})
        before.close()
        assert state(Ledger(folder)) == state(before)


def test_numbers_are_never_used_twice(tmp_path: Path) -> None:
    with_torn_line = Ledger(tmp_path)
    assert [with_torn_line.create({}).number for _ in range(3)] == [1, 2, 3]
    with_torn_line.close()
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:2]) + lines[2][:10])
    ledger = Ledger(tmp_path)
    assert ledger.create({"again": 1}).number == 3
    ledger.close()
    assert Ledger(tmp_path).trials[3].parameters == {"again": 1}


def test_reading_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(b'{"event": "crea')
    Ledger(tmp_path).close()
    assert (tmp_path / LEDGER).read_bytes() == b'{"event": "crea'


def test_what_json_cannot_hold_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.create({})
    report = Report(1, math.inf, phi=[1.0, math.nan], gradient=[1.0], metrics={"a": 1.0, "b": math.nan})
    ledger.report(1, report)
    ledger.close()
    for line in (tmp_path / LEDGER).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    (read,) = Ledger(tmp_path).trials[1].reports
    assert math.isnan(read.error) and read == replace(report, error=read.error, phi=None, metrics={"a": 1.0})


def test_trainings_and_costs_are_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number, step, cost in ((1, 1, 3.0), (1, 2, 7.0), (2, 1, 4.0)):
        if number not in ledger.trials:
            ledger.create({})
        assert ledger.trainings_with(number) == max(number, ledger.trainings)
        ledger.report(number, Report(step, 1.0, metrics={"cost": cost}))
    ledger.create({})
    assert ledger.trainings == 2 and [heard.trainings for heard in ledger.history] == [1, 1, 2]
    assert ledger.trials[1].knows(2) and not ledger.trials[1].knows(3)
    ledger.exploit(1, 2, {})
    assert ledger.trials[1].cost == 7.0 and not ledger.trials[1].knows(2)
    ledger.report(1, Report(2, 1.0, metrics={"cost": 5.0}))
    assert ledger.trials[1].cost == 12.0
    ledger.close()


def test_seconds_add_up_over_processes(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text('{"event": "created", "trial": 1, "seconds": 1000.5, "parameters": {}}\n')
    assert Ledger(tmp_path).seconds >= 1000.5


def test_the_last_known_cost_counts_for_trials_that_end_early(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.create({})
    assert ledger.trials[1].cost == 0.0
    ledger.report(1, Report(1, 1.0, metrics={"cost": 3.0}))
    ledger.report(1, Report(2, math.nan))
    assert ledger.trials[1].cost == 3.0
    ledger.close()


def test_there_is_no_ledger_before_the_first_change(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert not (tmp_path / LEDGER).exists()
    ledger.create({})
    ledger.close()
    assert len(Ledger(tmp_path).trials) == 1


CREATED = '{"event": "created", "trial": 1, "seconds": 0.5, "parameters": {}}'
ENDED = '{"event": "finished", "trial": 1, "seconds": 0.5, "message": ""}'


@pytest.mark.parametrize(
    "damaged",
    [
        '{"event": "created", "trial": 3, "seconds": 1.0, "parameters": {}}',
        '{"event": "created", "trial": 2, "seconds": "?", "parameters": {}}',
        '{"event": "created", "trial": 2.0, "seconds": 1.0, "parameters": {}}',
        '{"event": "report", "trial": 2, "seconds": 1.0}',
        '{"event": "finished", "trial": 1, "seconds": 1.0, "message": ""}',
        '{"seconds": 1.0}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / LEDGER).write_text("\n".join([CREATED, ENDED, damaged, ""]))
    with pytest.raises(RunDirectoryError, match=rf"line 3 of .*{LEDGER} is damaged"):
        Ledger(tmp_path)


@pytest.mark.parametrize(
    "damaged",
    [
        '{"event": "report", "trial": 1, "seconds": 1.0, "step": 1}',
        '{"event": "begun", "trial": 1, "seconds": 1.0}',
        '{"event": "finished", "trial": 1, "seconds": 1.0}',
    ],
)
def test_a_damaged_line_of_a_trial_under_way_is_named(tmp_path: Path, damaged: str) -> None:
    (tmp_path / LEDGER).write_text("\n".join([CREATED, damaged, ""]))
    with pytest.raises(RunDirectoryError, match=rf"line 2 of .*{LEDGER} is damaged"):
        Ledger(tmp_path)
