from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from palf_dist.learnloss.space import WeightSpace
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange, UniformRange
from palf_dist.search.ledger import Ledger
from palf_dist.search.proposals import OptunaSearcher, RandomSearcher, Searcher
from palf_dist.search.trial import ON_THE_FLY, Report
from palf_dist.search.tuneloss_proposals import TuneLossSearch

SPACE: dict[str, Domain] = {
    "rate": LogRange(low=1e-3, high=1.0),
    "share": UniformRange(low=-1.0, high=1.0),
    "steps": IntegerRange(low=1, high=9),
    "kind": Choice(values=("a", "b")),
}
WEIGHTS = WeightSpace.of({"l1": (1e-4, 1.0), "l2": (1e-3, 10.0)}, "ce")


def trained(parameters: dict[str, float]) -> list[Report]:
    """Two snapshots of a made-up training whose best weights are (0.01, 1)."""
    u = np.log([parameters["l1"], parameters["l2"]]) - np.log([0.01, 1.0])
    error = 1.0 + float(u @ u) / 20
    phi = [error, 1.0 / (1.0 + parameters["l1"]), 1.0 / (1.0 + parameters["l2"])]
    gradient = (u / 10 / [parameters["l1"], parameters["l2"]]).tolist()
    return [Report(1, error + 0.5, phi), Report(2, error, phi, gradient, metrics={"cost": 5.0}, done=True)]


def play(searcher: Searcher, ledger: Ledger, trials: int) -> None:
    """Trials one after another, two in flight; the third fails, the fourth is stopped."""
    while ledger.ended < trials:
        live = list(ledger.unfinished())
        if len(live) < 2:
            number = len(ledger.trials) + 1
            ledger.create(searcher.suggest(number))
            continue
        record = live[0]
        for report in trained(record.parameters)[: 1 if record.number == 4 else 2]:
            ledger.report(record.number, report)
        ledger.end(record.number, {3: "failed", 4: "stopped"}.get(record.number, "finished"))
        searcher.tell(record)


@pytest.mark.parametrize(
    "make",
    [
        lambda known: RandomSearcher({"l1": LogRange(low=1e-4, high=1.0), "l2": LogRange(low=1e-3, high=10.0)}, 3),
        lambda known: TuneLossSearch(WEIGHTS, 3, on_the_fly=False),
    ],
    ids=["random", "tuneloss"],
)
def test_a_fresh_searcher_that_reads_the_ledger_goes_on_exactly(
    make: Callable[[int], Searcher], tmp_path: Path
) -> None:
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        searcher = make(0)
        play(searcher, ledger, 7)
        fresh = make(len(ledger.trials))
        for event, record in Ledger(tmp_path).moves:
            fresh.adopt(record) if event == "created" else fresh.tell(record)
        assert fresh.suggest(9) == searcher.suggest(9)


def test_tuneloss_is_told_the_weights_that_were_used(tmp_path: Path) -> None:
    search = TuneLossSearch(WEIGHTS, 0, on_the_fly=True)
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        first = ledger.create(search.suggest(1))
        assert first.parameters.pop(ON_THE_FLY) is True
        first.parameters[ON_THE_FLY] = True
        ledger.report(1, Report(1, 1.0, [1.0, 2.0, 3.0], weights=[0.5, 2.0], done=True))
        ledger.end(1, "finished")
        search.tell(first)
        assert ON_THE_FLY not in search.suggest(2)
    (training,) = search.tune_loss.trainings
    assert training.weights.tolist() == [0.5, 2.0] and training.complete


def test_tuneloss_takes_a_training_that_diverged_for_a_failure_and_a_crash_for_nothing(tmp_path: Path) -> None:
    search = TuneLossSearch(WEIGHTS, 0, on_the_fly=False)
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        for number, reports, ending in (
            (1, [Report(1, 2.0, [1.0, 1.0, 1.0]), Report(2, math.nan)], "failed"),
            (2, [Report(1, 2.0, [1.0, 1.0, 1.0])], "failed"),
            (3, [], "failed"),
            (4, [Report(1, 3.0, [1.0, 1.0, 1.0])], "stopped"),
        ):
            record = ledger.create(search.suggest(number))
            for report in reports:
                ledger.report(number, report)
            ledger.end(number, ending)
            search.tell(record)
    assert [(item.identifier, item.complete, item.usable) for item in search.tune_loss.trainings] == [
        (0, True, False),
        (3, False, False),
    ]
    assert search.tune_loss.best is None


def test_random_draws_stay_in_the_space_and_differ() -> None:
    searcher = RandomSearcher(SPACE, 0)
    drawn = [searcher.suggest(number) for number in range(1, 200)]
    assert len({str(item) for item in drawn}) == len(drawn)
    assert drawn[4] == RandomSearcher(SPACE, 0).suggest(5) != RandomSearcher(SPACE, 1).suggest(5)
    for item in drawn:
        assert 1e-3 <= item["rate"] <= 1.0 and -1.0 <= item["share"] <= 1.0
    assert {item["steps"] for item in drawn} == set(range(1, 10)) and {item["kind"] for item in drawn} == {"a", "b"}
    assert sum(item["rate"] < 0.0316 for item in drawn) == pytest.approx(100, abs=30)


def test_optuna_learns_from_an_earlier_process(tmp_path: Path) -> None:
    """After a restart it knows all trials, draws new ones, and goes where the good ones are."""
    space: dict[str, Domain] = {"x": UniformRange(low=0.0, high=1.0), "kind": Choice(values=("a", "b"))}
    with contextlib.closing(Ledger(tmp_path)) as ledger:
        searcher = OptunaSearcher(space, 0, known=0)
        for number in range(1, 31):
            record = ledger.create(searcher.suggest(number))
            error = math.nan if number == 5 else (record.parameters["x"] - 0.2) ** 2
            ledger.report(number, Report(1, error, done=True))
            ledger.end(number, "failed" if number == 7 else "stopped" if number == 8 else "finished")
            searcher.tell(record)
        ledger.create(searcher.suggest(31))
        fresh = OptunaSearcher(space, 0, known=31)
        for event, record in ledger.moves:
            fresh.adopt(record) if event == "created" else fresh.tell(record)
        drawn = [fresh.suggest(number) for number in range(32, 52)]
        assert not {item["x"] for item in drawn} & {record.parameters["x"] for record in ledger.trials.values()}
        assert np.median([abs(item["x"] - 0.2) for item in drawn]) < 0.22  # 0.3 without a memory
        unfinished = ledger.trials[31]
        ledger.report(31, Report(1, 0.5, done=True))
        ledger.end(31, "finished")
        fresh.tell(unfinished)
