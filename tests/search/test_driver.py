from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palf_dist.distributed.cluster import connected
from palf_dist.errors import ClusterError, ConfigError, RunDirectoryError, SearchError
from palf_dist.run_directory import BEST, CONFIG
from palf_dist.search import recorder
from palf_dist.search.anytime import ANYTIME, read_best
from palf_dist.search.capacity import trials_at_once
from palf_dist.search.driver import SearchResult, _wanted_at_once, tune
from palf_dist.search.fingerprints import FINGERPRINTS
from palf_dist.search.ledger import LEDGER, Ledger
from palf_dist.search.recorder import DIVERGED, Halt
from palf_dist.search.trainable import STOP_FILE
from tests.search.quadratic import STATE, WORK, Quadratic, search_config

NETWORK = {"kind": "loss_weights", "dataset": "unused", "model": {"kind": "mlp"}}
"""What may be stopped early and changed on its way."""


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One private Ray for all searches here, which stay on the one that they find."""
    with connected(None, 2):
        yield


def search(
    run_dir: Path, target: Quadratic, /, *, resume: bool = False, budget: Any = None, **fields: Any
) -> SearchResult:
    return tune(search_config(**fields), run_dir, resume=resume, time_budget=budget, make_target=lambda config: target)


def test_what_cannot_be_searched_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"searcher: tuneloss .* use optuna"):
        search(tmp_path / "run", Quadratic(), searcher="tuneloss")
    with pytest.raises(ConfigError, match=r"scheduler.grace: .* 1 report"):
        search(tmp_path / "run", Quadratic(steps=1), scheduler="asha")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        search(tmp_path / "run", Quadratic(), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_search_is_halted_by_the_user_and_by_the_clock(tmp_path: Path) -> None:
    stop = threading.Event()
    halt = Halt(tmp_path, stop, deadline=None)
    assert not halt.stop_all() and halt.seconds_left is None and not (tmp_path / STOP_FILE).exists()
    assert Halt(tmp_path, threading.Event(), deadline=0.0).stop_all() and (tmp_path / STOP_FILE).exists()
    stop.set()
    assert halt.stop_all() and not halt("00001", {})


def test_a_search_is_halted_when_its_trials_find_no_place_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [{"CPU": 1.0}]
    halt = Halt(tmp_path, threading.Event(), None, lambda: trials_at_once([{"CPU": 1.0}], places, wanted=1))
    monkeypatch.setattr(recorder, "CHECK_SECONDS", 0.0)
    assert not halt.stop_all() and halt.fatal is None
    places.clear()
    assert halt.stop_all() and halt.fatal is not None and "can never give that" in halt.fatal


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"searcher": "tuneloss"}, 1),
        ({"searcher": "optuna", "trials": 9}, 4),
        ({"searcher": "optuna", "trials": 3}, 3),
        ({"searcher": "random", "trials": 9}, 9),
        ({"searcher": "tuneloss", "concurrent": 7}, 7),
    ],
)
def test_a_searcher_that_learns_is_not_asked_for_many_trials_at_once(fields: dict[str, Any], wanted: int) -> None:
    assert _wanted_at_once(search_config(**fields)) == wanted


@pytest.mark.slow
def test_a_search_that_the_cluster_can_never_place_is_refused(ray: None, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"target: one trial takes 99 CPU .* can never give that"):
        search(tmp_path / "run", Quadratic(cpus=99.0))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_search_ends_resumes_and_grows(ray: None, tmp_path: Path) -> None:
    """Failed trials among the others; then more trials than were asked for at first, and none of them again."""
    run_dir = tmp_path / "run"
    target = Quadratic(steps=3, troubles={0.8: "raises", 0.65: "diverges"})
    first = search(run_dir, target, trials=3)
    assert first.trials == {"finished": 1, "stopped": 0, "failed": 2, "unfinished": 0}
    assert first.best is not None and first.best.trial == 3 and first.best.step == 3
    assert first.final == {"test_error": 0.5, "found_after": 3}
    assert {path.name for path in (run_dir / BEST).iterdir()} == {"best.json", "step.json"}
    trials = Ledger(run_dir).trials
    assert [trial.ending for trial in trials.values()] == ["failed", "failed", "finished"]
    assert "ValueError: raised on purpose" in trials[2].message and trials[1].message == DIVERGED
    assert len(trials[1].reports) == 1 and len(trials[2].reports) == 1  # diverged, raised at its second step
    work = {path: path.read_bytes() for path in run_dir.glob(f"trials/*/{WORK}")}
    again = search(run_dir, target, trials=4, resume=True)
    assert again.trials == {"finished": 2, "stopped": 0, "failed": 2, "unfinished": 0}
    assert again.gradient_evaluations == 80 and again.trainings == 4 and again.seconds > first.seconds
    assert {path: path.read_bytes() for path in work} == work and len(list(run_dir.glob(f"trials/*/{WORK}"))) == 4
    curve = pq.read_table(run_dir / ANYTIME)
    assert curve.num_rows == 8 and curve["trial"].to_pylist().count(4) == 3
    assert sorted(path.name for path in run_dir.iterdir()) == [
        ".lock",
        ANYTIME,
        BEST,
        CONFIG,
        FINGERPRINTS,
        "report",
        "trials",
        LEDGER,
    ]


@pytest.mark.slow
def test_a_target_that_is_unfit_ends_the_search(ray: None, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="the quadratic is unfit"):
        search(tmp_path / "run", Quadratic(troubles={0.0: "unfit"}), trials=4)
    assert Ledger(tmp_path / "run").ended == 0


@pytest.mark.slow
def test_the_time_budget_ends_a_search_with_the_best_so_far(ray: None, tmp_path: Path) -> None:
    """A trial that would never end is told to save, and goes on in the resumed search where it was."""
    run_dir, endless = tmp_path / "run", Quadratic(steps=10**6, delay=0.05)
    budget, result = 8.0, None
    while result is None:
        try:
            result = search(run_dir, endless, trials=1, budget=budget, resume=run_dir.exists())
        except SearchError:  # over before the first report, on a busy machine
            budget *= 2
    assert result.out_of_time and not result.interrupted
    assert result.trials == {"finished": 0, "stopped": 0, "failed": 0, "unfinished": 1}
    assert result.best == read_best(run_dir) and result.final["test_error"] == 0.5
    reached = json.loads((run_dir / "trials" / "00001" / STATE / "step.json").read_text())
    ended = search(run_dir, Quadratic(steps=reached + 1), trials=1, resume=True)
    assert ended.trials["finished"] == 1 and ended.best is not None and ended.best.step == reached + 1
    steps = [json.loads(line)["step"] for line in (run_dir / "trials" / "00001" / WORK).read_text().splitlines()]
    assert steps == list(range(1, reached + 2))


@pytest.mark.slow
def test_asha_stops_those_that_fall_behind(ray: None, tmp_path: Path) -> None:
    result = search(
        tmp_path / "run",
        Quadratic(steps=4),
        trials=6,
        scheduler={"kind": "asha", "reduction": 2},
        concurrent=1,
        target=NETWORK,
    )
    trials = Ledger(tmp_path / "run").trials.values()
    assert result.trials["stopped"] + result.trials["finished"] == 6 and result.trials["stopped"] >= 1
    for trial in trials:
        assert len(trial.reports) == 4 if trial.ending == "finished" else len(trial.reports) in (1, 2)
    stopped = [trial.reports[0].error for trial in trials if len(trial.reports) == 1]
    assert min(stopped) > min(trial.reports[0].error for trial in trials)


@pytest.mark.slow
def test_pbt_hands_on_the_state_of_the_best(ray: None, tmp_path: Path) -> None:
    """A population larger than the cluster takes turns; whoever takes over goes on from the other's state."""
    result = search(
        tmp_path / "run",
        Quadratic(steps=5),
        trials=3,
        scheduler={"kind": "pbt", "quantile": 0.4},
        target=NETWORK,
    )
    assert result.trials["finished"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / LEDGER).read_text().splitlines()]
    taken_over = [line for line in lines if line["event"] == "exploited"]
    assert taken_over and all(line["source"] != line["trial"] for line in taken_over)
    created = {line["trial"]: line["parameters"] for line in lines if line["event"] == "created"}
    last = taken_over[-1]
    assert last["parameters"] != created[last["trial"]]
    own_work = (tmp_path / "run" / "trials" / f"{last['trial']:05d}" / WORK).read_text()
    assert json.dumps(last["parameters"])[1:-1] in own_work


@pytest.mark.slow
def test_a_take_over_survives_a_kill(ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search ends with the first take-over on the disk, and the trial that took over has not run since."""
    run_dir, handed, stop = tmp_path / "run", [], threading.Event()
    noted = Ledger.exploit

    def exploit(ledger: Ledger, number: int, source: int, parameters: Any) -> None:
        handed.append(run_dir / "trials" / f"{number:05d}" / ".start" / "content" / "step.json")
        assert handed[-1].exists(), "the state comes before the line of the ledger"
        noted(ledger, number, source, parameters)
        stop.set()

    fields: dict[str, Any] = {
        "trials": 3,
        "scheduler": {"kind": "pbt", "quantile": 0.4},
        "target": NETWORK,
    }
    target = Quadratic(steps=6)
    monkeypatch.setattr(Ledger, "exploit", exploit)
    assert tune(search_config(**fields), run_dir, stop=stop, make_target=lambda config: target).interrupted
    assert handed and handed[0].exists()
    handed[0].write_text("5")  # so that the state is known again: its source was not so far
    number, before = int(handed[0].parts[-4]), len((run_dir / LEDGER).read_text().splitlines())
    search(run_dir, target, resume=True, **fields)
    lines = [json.loads(line) for line in (run_dir / LEDGER).read_text().splitlines()][before:]
    assert next(line["step"] for line in lines if line["trial"] == number and line["event"] == "report") == 5
    assert not handed[0].exists()


@pytest.mark.slow
def test_a_trial_whose_end_was_not_noted_is_not_begun_again(ray: None, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    search(run_dir, Quadratic(troubles={0.65: "diverges"}), trials=3, concurrent=1)
    endings = [trial.ending for trial in Ledger(run_dir).trials.values()]
    assert set(endings) == {"failed", "finished"}
    lines = (run_dir / LEDGER).read_bytes().splitlines(keepends=True)
    (run_dir / LEDGER).write_bytes(b"".join(line for line in lines if b'"message"' not in line))
    result = search(run_dir, Quadratic(troubles={0.0: "unfit"}), trials=3, resume=True)  # would not run
    assert result.trials["unfinished"] == 0
    assert [trial.ending for trial in Ledger(run_dir).trials.values()] == endings


@pytest.mark.slow
def test_a_budget_that_is_over_between_two_trials_is_said_to_be(ray: None, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    search(run_dir, Quadratic(steps=1), trials=1)
    result = search(run_dir, Quadratic(steps=1), trials=5, resume=True, budget=1e-9)
    assert result.out_of_time and result.trials["finished"] == 1 and result.trials["unfinished"] == 0


@dataclass(frozen=True)
class Interrupted(Quadratic):
    """The user presses Ctrl-C while the best is judged."""

    def finish(self, best: Path) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return {}


@pytest.mark.slow
def test_judging_the_best_is_interrupted_at_once_and_done_again(ray: None, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", Interrupted(steps=1), trials=1)
    again = search(tmp_path / "run", Quadratic(steps=1), trials=1, resume=True)
    assert again.final == {"test_error": 0.5, "found_after": 1} and again.trials["finished"] == 1
