"""The searcher driven by its methods, as Tune calls them; test_searcher_on_ray.py has Tune itself do it."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune.search import ConcurrencyLimiter

from palf_dist.errors import CheckpointError, ConfigError
from palf_dist.learnloss.records import Outcome
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import TuneLoss
from palf_dist.search import TuneLossSearcher

RANGES = {"l1": (1e-4, 1.0), "l2": (1e-3, 10.0)}
Told = list[tuple[int, Outcome, bool]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What TuneLoss is told, in order."""
    record: Told = []
    tell = TuneLoss.tell

    def telling(self: TuneLoss, identifier: int, outcome: Outcome, *, complete: bool = True, **more: Any) -> None:
        record.append((identifier, outcome, complete))
        tell(self, identifier, outcome, complete=complete, **more)

    monkeypatch.setattr(TuneLoss, "tell", telling)
    return record


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    record: list[int] = []
    abandon = TuneLoss.abandon
    monkeypatch.setattr(TuneLoss, "abandon", lambda self, number: (record.append(number), abandon(self, number))[1])
    return record


def searcher(**settings: Any) -> TuneLossSearcher:
    return TuneLossSearcher(**{"space": RANGES, "metric": "e", "mode": "min", **settings})


def report(step: int, e: float, phi: Any = (1.0, 2.0, 3.0), **more: Any) -> dict[str, Any]:
    """A result as Tune passes it on: flat."""
    return {"trial_id": "t", "training_iteration": step, "e": e, "phi": phi, "done": False, **more}


def train(search: TuneLossSearcher, trial: str, **more: Any) -> dict[str, float]:
    """One trial that returns by itself: a bowl with its lowest point inside the box."""
    config = search.suggest(trial)
    u = np.log([config["l1"], config["l2"]])
    distance = float(np.sum((u - np.log([1e-2, 1e-1])) ** 2))
    for step in (1, 2):
        last = report(step, distance + 1.0 / step, [distance, *np.exp(-u).tolist()], **more)
        search.on_trial_result(trial, last)
    search.on_trial_complete(trial, last | {"done": True})
    return config


def outcome_of(told: Told) -> tuple[list[float], list[list[float]], bool]:
    ((_, outcome, complete),) = told
    return outcome.errors.tolist(), outcome.features.tolist(), complete


def test_a_training_is_told_with_all_its_snapshots(told: Told) -> None:
    search = searcher()
    config = search.suggest("t")
    assert list(config) == ["l1", "l2"] and all(low <= config[n] <= high for n, (low, high) in RANGES.items())
    search.on_trial_result("t", report(1, 3.0, [1, 2, 3]))
    search.on_trial_result("t", report(2, 2.0, np.array([4, 5, 6])))
    assert not told
    search.on_trial_complete("t", report(2, 2.0, [4, 5, 6]) | {"done": True})
    assert outcome_of(told) == ([3.0, 2.0], [[1, 2, 3], [4, 5, 6]], True)
    assert search.tune_loss.best is not None and search.tune_loss.best.error == 2.0
    assert search.tune_loss.best.weights.tolist() == list(config.values())


def test_features_by_name_in_any_order(told: Told) -> None:
    search = searcher(reference="loss", features="terms")
    search.suggest("t")
    result = {"training_iteration": 1, "e": 1.0, "terms/l2": 3.0, "terms/loss": 1.0, "terms/l1": 2.0}
    result |= {"gradient/l2": 20.0, "gradient/l1": 10.0}
    search.on_trial_result("t", result)
    search.on_trial_complete("t", result)
    assert outcome_of(told)[1] == [[1.0, 2.0, 3.0]]
    assert told[0][1].sensitivity.gradient.tolist() == [10.0, 20.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1.0), ("max", -1.0)])
def test_the_mode_decides_the_signs(mode: str, sign: float, told: Told) -> None:
    search = searcher(mode=mode)
    search.suggest("t")
    last = report(1, 0.8, gradient=[1.0, -2.0], curvature=[[1.0, 0.5], [0.5, 2.0]])
    search.on_trial_result("t", last)
    search.on_trial_complete("t", last)
    outcome = told[0][1]
    assert outcome.error == sign * 0.8
    assert outcome.sensitivity.gradient.tolist() == [sign, -2 * sign]  # type: ignore[union-attr]
    assert np.allclose(outcome.sensitivity.curvature, sign * np.array([[1, 0.5], [0.5, 2]]))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("seen_before", "final", "complete"),
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
    ids=["returned", "stopped", "stopped-but-final", "returned-but-not-final"],
)
def test_whether_a_trial_was_trained_to_its_end(
    seen_before: bool, final: bool | None, complete: bool, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """Tune shows a scheduler's stopping report at the completion only."""
    search = searcher()
    last = report(2, 2.0, gradient=[1.0, 1.0]) | ({} if final is None else {"final": final})
    for trial in ("t", "another"):
        search.suggest(trial)
        search.on_trial_result(trial, report(1, 3.0))
        if seen_before:
            search.on_trial_result(trial, last)
        search.on_trial_complete(trial, last | {"done": True})
    assert [c for _, _, c in told] == [complete] * 2 and len(told[0][1].errors) == 2
    assert (told[0][1].sensitivity is not None) == complete
    assert (search.tune_loss.best is not None) == complete
    assert ["'final': True" in record.message for record in caplog.records] == [True] * (not complete and final is None)


def test_a_paused_trial_that_is_stopped_was_not_trained_to_its_end(told: Told) -> None:
    search = searcher()
    search.suggest("t")
    search.on_trial_result("t", report(1, 3.0))
    search.on_trial_complete("t")
    assert outcome_of(told) == ([3.0], [[1, 2, 3]], False)


@pytest.mark.parametrize(
    "bad",
    [
        {"e": math.nan},
        {"e": math.inf},
        {"e": 1.0, "phi": [1.0, math.nan, 2.0]},
        {"e": math.nan, "phi": None},
    ],
    ids=["nan", "infinite", "features", "no-features"],
)
@pytest.mark.parametrize("seen_before", [True, False], ids=["returned", "stopped"])
def test_a_diverged_training_has_failed(bad: dict[str, Any], seen_before: bool, told: Told) -> None:
    search = searcher()
    search.suggest("t")
    search.on_trial_result("t", report(1, math.nan))
    search.on_trial_result("t", report(2, 3.0))
    last = {key: value for key, value in (report(3, 0.0) | bad).items() if value is not None}
    if seen_before:
        search.on_trial_result("t", last)
    search.on_trial_complete("t", last)
    errors, _, complete = outcome_of(told)
    assert [math.isfinite(e) for e in errors] == [False, True, False] and complete
    assert search.tune_loss.best is None
    train(search, "next")
    assert search.tune_loss.best is not None


def test_trials_with_nothing_to_tell_are_abandoned(told: Told, abandoned: list[int]) -> None:
    search = searcher()
    for trial in ("crashed", "silent", "removed"):
        search.suggest(trial)
    search.on_trial_result("crashed", report(1, 3.0))
    search.on_trial_complete("crashed", error=True)
    search.on_trial_complete("silent", {"trial_id": "silent", "done": True, "training_iteration": 1})
    search.on_trial_complete("removed")
    assert len(set(abandoned)) == 3 and not told
    train(search, "next")
    assert len(told) == 1


@pytest.mark.parametrize("sensitivity", [0, 1, 2])
def test_weights_that_crash_again_and_again_are_given_up(sensitivity: int, told: Told) -> None:
    """The lowest point lies where trainings crash: the models propose it for ever if nobody tells them."""
    search = searcher()
    crashed = []
    for number in range(16):
        weights = np.array(list(search.suggest(f"t{number}").values()))
        u = np.log(weights)
        if u.sum() > -4:
            crashed.append(u)
            search.on_trial_complete(f"t{number}", error=True)
            continue
        extra = [{}, {"gradient": 2 * u / weights}, {"gradient": 2 * u / weights, "curvature": np.diag(2 / weights**2)}]
        last = report(1, float(u @ u), [float(u @ u), *np.exp(-u)], **extra[sensitivity])
        search.on_trial_result(f"t{number}", last)
        search.on_trial_complete(f"t{number}", last)
    failed = [outcome for _, outcome, complete in told if complete and not math.isfinite(outcome.error)]
    assert 1 <= len(failed) < len(crashed), "a first crash is forgiven, a second one is not"
    assert max((np.abs(np.array(crashed) - u).max(1) < 0.1).sum() for u in crashed) <= 3


def test_repeated_reports_change_nothing(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    """A trial restored from its checkpoint of step 1 repeats step 2; and results come twice."""
    search = searcher()
    search.suggest("t")
    for step, e in ((1, 3.0), (2, 2.5), (3, 9.0), (2, 2.5), (2, 2.5), (3, 2.0)):
        search.on_trial_result("t", report(step, e))
    last = report(3, 2.0)
    search.on_trial_complete("t", last)
    state = json.dumps(search.tune_loss.state())
    search.on_trial_result("t", last)
    search.on_trial_complete("t", last)
    search.on_trial_complete("t", error=True)
    assert outcome_of(told)[0] == [3.0, 2.5, 2.0] and json.dumps(search.tune_loss.state()) == state
    assert not caplog.records


def test_unknown_trials_are_ignored_with_a_warning(told: Told, caplog: pytest.LogCaptureFixture) -> None:
    search = searcher()
    with caplog.at_level(logging.WARNING):
        search.on_trial_result("stranger", report(1, 3.0))
        search.on_trial_complete("stranger", report(1, 3.0))
    assert not told and all("stranger" in record.message for record in caplog.records) and len(caplog.records) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"phi": [1.0, 2.0]}, "phi: trial t reported [1.0, 2.0]; report 3 numbers in the order reference, l1, l2"),
        ({"phi": ["a", 1, 2]}, "phi: trial t reported"),
        ({"phi": None}, "phi: not in the report of trial t"),
        ({"phi": None, "phi/l1": 1.0, "phi/l3": 1.0}, "phi: reported by the names l1, l3; it must have reference, l1"),
        ({"e": "low"}, "e: trial t reported 'low'; report a number"),
        ({"gradient": [1.0]}, "gradient: trial t reported [1.0]; report 2 numbers in the order l1, l2"),
        ({"gradient": [1.0, 1.0], "curvature": [1.0]}, "curvature: trial t reported [1.0]; report 2 x 2 numbers"),
        ({"curvature": [[1.0, 0.0], [0.0, 1.0]]}, "curvature: reported without gradient"),
    ],
)
def test_reports_that_cannot_be_read_are_refused(wrong: dict[str, Any], message: str) -> None:
    search = searcher()
    search.suggest("t")
    bad = {key: value for key, value in (report(1, 1.0) | wrong).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        search.on_trial_result("t", bad)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_the_saved_state_continues_exactly(done: int, tmp_path: Path) -> None:
    def begun() -> TuneLossSearcher:
        search = searcher(seed=3)
        for number in range(done):
            train(search, f"t{number}", gradient=[1.0, 2.0])
        search.suggest("in flight")
        search.on_trial_result("in flight", report(1, 3.0))
        search.suggest("diverging")
        search.on_trial_result("diverging", report(1, math.nan))
        return search

    def ended(search: TuneLossSearcher) -> list[dict[str, float]]:
        for trial in ("in flight", "diverging"):
            search.on_trial_complete(trial, report(1, 3.0))
        return [train(search, f"later{number}") for number in range(4)]

    begun().save_to_dir(str(tmp_path), "session")
    (saved,) = tmp_path.iterdir()
    assert json.loads(saved.read_text()) and saved.suffix == ".json", "neither pickle nor a leftover"
    restored = searcher(seed=99)
    restored.restore_from_dir(str(tmp_path))
    bare = TuneLossSearcher()
    bare.restore(str(saved))
    expected = ended(begun())
    assert ended(restored) == expected == ended(bare)
    assert ended(pickle.loads(pickle.dumps(begun()))) == expected == ended(copy.deepcopy(begun())), "as Tune copies it"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"space": {"l1": (1e-4, 1.0)}}, "space: "),
        ({"mode": "max"}, "mode: "),
        ({"metric": "accuracy"}, "metric: "),
        ({"features": "terms"}, "features: "),
    ],
)
def test_a_state_of_another_search_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    searcher().save(str(tmp_path / "state.json"))
    with pytest.raises(ConfigError, match=f"^{message}.*state.json has "):
        searcher(**other).restore(str(tmp_path / "state.json"))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\x80\x04"])
def test_what_is_no_state_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="no saved state of a TuneLossSearcher"):
        searcher().restore(str(tmp_path / "state.json"))


def test_the_param_space_defines_the_search_where_nothing_else_does() -> None:
    search = TuneLossSearcher()
    with pytest.raises(ConfigError, match=r"^space: no loss weights to tune"):
        search.suggest("t")
    domains = {name: tune.loguniform(*bounds) for name, bounds in RANGES.items()}
    for _ in range(2):  # Tuner.restore says it again
        assert search.set_search_properties("accuracy", "max", domains | {"epochs": 5, "net": {"width": 3}})
    assert (search.metric, search.mode) == ("accuracy", "max")
    alike = searcher()
    assert alike.set_search_properties(None, None, {"epochs": 5})
    assert search.suggest("t") == alike.suggest("t") == TuneLossSearcher(domains).suggest("t")


@pytest.mark.parametrize(
    ("param_space", "message"),
    [
        ({"l2": 0.1}, "param_space.l2: fixed there, but tuned"),
        ({"lr": tune.loguniform(1e-4, 1.0)}, "param_space: searches lr, but TuneLossSearcher has a space of its own"),
        ({"l1": tune.uniform(0.1, 1.0)}, "param_space.l1: TuneLossSearcher searches loss weights only"),
        ({"lr": tune.choice([1, 2])}, "param_space.lr: TuneLossSearcher searches loss weights only"),
        ({"lr": tune.grid_search([1, 2])}, "param_space.lr: TuneLossSearcher searches loss weights only"),
        (
            {"net": {"l1": tune.loguniform(1e-4, 1.0)}},
            "param_space.net.l1: TuneLossSearcher searches loss weights only",
        ),
    ],
)
def test_param_spaces_that_cannot_be_taken_over(param_space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        searcher().set_search_properties("e", "min", param_space)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "least"}, "mode: 'least' is neither"),
        ({"space": {"l2": 0.1}}, "weights.l2: 0.1 is neither"),
        ({"space": {"l2": tune.choice([1, 2])}}, "weights.l2: .* is neither"),
        ({"space": {"l2": (0.1, 1.0, 2.0)}}, "weights.l2: .* is neither"),
        ({"space": {"l2": (0.0, 1.0)}}, "weights.l2: .* is no interval"),
        ({"space": WeightSpace.of(RANGES, "loss"), "reference": "ce"}, "reference: 'ce' is not 'loss'"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        searcher(**settings)


def test_metric_and_mode_are_said_once_and_in_full() -> None:
    for metric, mode, name in (("loss", "min", "metric"), ("e", "max", "mode")):
        with pytest.raises(ConfigError, match=f"^{name}: TuneConfig says"):
            searcher().set_search_properties(metric, mode, {"epochs": 5})
    with pytest.raises(ConfigError, match=r"^mode: tell TuneLossSearcher whether 'accuracy' is to be 'min' or 'max'"):
        TuneLossSearcher(RANGES, metric="accuracy").suggest("t")
    plain = TuneLossSearcher(RANGES)
    plain.suggest("t")
    assert (plain.metric, plain.mode) == ("e", "min")


def test_many_trials_in_flight_are_told_in_any_order(told: Told) -> None:
    search = searcher()
    limited = ConcurrencyLimiter(search, max_concurrent=3)
    configs = [limited.suggest(trial) for trial in "abc"]
    assert limited.suggest("d") is None and len({tuple(config.values()) for config in configs}) == 3
    for e, trial in enumerate("cab"):
        limited.on_trial_result(trial, report(1, float(e)))
        limited.on_trial_complete(trial, report(1, float(e)))
    assert [identifier for identifier, _, _ in told] == sorted(
        [identifier for identifier, _, _ in told], key=lambda identifier: (identifier + 1) % 3
    )
    best = search.tune_loss.best
    assert best is not None and best.weights.tolist() == list(configs[2].values())
    assert limited.suggest("d")
