from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from palf_dist.errors import ConfigError
from palf_dist.search.config import AshaConfig, NoScheduler, PbtConfig
from palf_dist.search.domains import Choice, IntegerRange, LogRange, UniformRange
from palf_dist.search.ledger import TrialRecord
from palf_dist.search.schedulers import Population, make_scheduler, replay
from palf_dist.search.trainable import result_of
from palf_dist.search.trial import Report
from tests.search.quadratic import Quadratic


def decisions(scheduler: TrialScheduler, errors: dict[int, list[float]]) -> dict[int, list[str]]:
    """What a scheduler says to the reports of new trials, trial after trial."""
    said = {}
    for number, values in errors.items():
        trial = Trial("", trial_id=f"{number:05d}", stub=True)
        scheduler.on_trial_add(None, trial)
        said[number] = [
            scheduler.on_trial_result(None, trial, result_of(step, error)) for step, error in enumerate(values, 1)
        ]
    return said


def test_asha_remembers_what_an_earlier_process_has_seen() -> None:
    asha = AshaConfig(grace=1, reduction=2.0)
    known = {1: [1.0, 0.5], 2: [2.0], 3: [3.0]}
    new = {4: [2.5], 5: [0.5, 0.6], 6: [math.nan]}
    before = make_scheduler(asha, Quadratic(steps=8))
    decisions(before, known)
    expected = decisions(before, new)
    assert expected == {4: ["STOP"], 5: ["CONTINUE", "STOP"], 6: ["STOP"]}
    resumed = make_scheduler(asha, Quadratic(steps=8))
    replay(
        resumed,
        [
            TrialRecord(number, {}, [Report(step, error) for step, error in enumerate(errors, 1)])
            for number, errors in known.items()
        ],
    )
    assert decisions(resumed, new) == expected
    assert decisions(make_scheduler(asha, Quadratic(steps=8)), new)[4] == ["CONTINUE"]


def test_none_lets_every_trial_run() -> None:
    scheduler = make_scheduler(NoScheduler(), Quadratic(steps=1))
    assert isinstance(scheduler, FIFOScheduler)
    replay(scheduler, [TrialRecord(1, {}, [Report(1, 1.0)])])


@pytest.mark.parametrize(
    ("config", "field"), [(AshaConfig(grace=3), "scheduler.grace"), (PbtConfig(every=3), "scheduler.every")]
)
def test_a_scheduler_that_has_nothing_to_decide_is_refused(config: AshaConfig | PbtConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: a trial of this target gives 3 report.*name less"):
        make_scheduler(config, Quadratic(steps=3))
    make_scheduler(config, Quadratic(steps=4))


def test_a_trial_that_takes_over_keeps_its_number_and_stays_in_the_space() -> None:
    space = {
        "rate": LogRange(low=0.1, high=1.0),
        "share": UniformRange(low=0.0, high=1.0),
        "steps": IntegerRange(low=1, high=9),
        "kind": Choice(values=("a", "b")),
    }
    population = Population(PbtConfig(resample=0.0), space)
    parameters = {"rate": 1.0, "share": 1.0, "steps": 9, "kind": "a"}
    seen = set()
    for _ in range(50):
        loser = SimpleNamespace(config={"number": 7, "parameters": {}})
        winner = SimpleNamespace(config={"number": 2, "parameters": parameters})
        config, _ = population._get_new_config(loser, winner)
        assert config["number"] == 7
        new = config["parameters"]
        assert new["rate"] in (0.8, 1.0) and new["share"] in (0.8, 1.0) and new["steps"] in (7, 9)
        seen.add(str(new))
    assert len(seen) > 1
