from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.errors import ConfigError
from palf_dist.learnloss.records import Choose, Outcome, Proposal, Refine, Sensitivity, Waypoint
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import EXPLORE_EVERY, TuneLoss, tune_loss
from palf_dist.randomness import random_generator

SPACE = WeightSpace.of({"a": (1e-3, 1e2), "b": (1e-3, 1e2)}, "ce")
TARGET = np.array([0.5, 4.0])
SHAPES = [np.diag([2.0, 0.5, 0.3]), np.diag([0.5, 2.0, 0.3]), np.diag([0.2, 0.4, 1.0])]
CENTRES = [np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, -1.0]), np.array([-1.0, -1.0, 0.0])]


class Quadratic:
    """phi_k = (theta - c_k)' S_k (theta - c_k) / 2, theta* in closed form; e is the distance to theta*(TARGET)."""

    space = SPACE

    def __init__(self, derivatives: str = "none") -> None:
        self.derivatives = derivatives
        self.goal, _ = self.minimiser(TARGET)
        self.resolved = 0

    def minimiser(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole = np.r_[1.0, weights]
        hessian = sum(w * s for w, s in zip(whole, SHAPES, strict=True))
        side = sum(w * s @ c for w, s, c in zip(whole, SHAPES, CENTRES, strict=True))
        return np.linalg.solve(hessian, side), np.asarray(hessian)

    def features(self, theta: np.ndarray) -> np.ndarray:
        return np.array([0.5 * (theta - c) @ s @ (theta - c) for s, c in zip(SHAPES, CENTRES, strict=True)])

    def error(self, theta: np.ndarray) -> float:
        return 0.1 + float(((theta - self.goal) ** 2).sum())

    def train(self, weights: np.ndarray) -> Outcome:
        theta, hessian = self.minimiser(weights)
        path = [share * theta for share in np.linspace(0.2, 1.0, 8)]

        def sensitivity() -> Sensitivity:
            self.resolved += 1
            gradients = np.stack([s @ (theta - c) for s, c in zip(SHAPES[1:], CENTRES[1:], strict=True)])
            solved = np.linalg.solve(hessian, gradients.T)
            curvature = 2 * solved.T @ solved if self.derivatives == "curvature" else None
            return Sensitivity(-solved.T @ (2 * (theta - self.goal)), curvature, cost=3)

        return Outcome(
            np.array([self.features(t) for t in path]),
            np.array([self.error(t) for t in path]),
            None if self.derivatives == "none" else sensitivity,
            cost=8,
        )

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        first = self.train(SPACE.weights(SPACE.centre))
        weights, more = choose(first.features[:4], first.errors[:4]), refine is not None
        while more:
            assert refine is not None
            settled = self.train(weights)
            weights, more = refine(Outcome(settled.features[-1:], settled.errors[-1:], settled.sensitivity))
        last = self.train(weights)
        features, errors = np.vstack([first.features[:4], last.features]), np.r_[first.errors[:4], last.errors]
        return weights, Outcome(features, errors, last.sensitivity, cost=12)


@pytest.mark.parametrize(("derivatives", "trainings"), [("none", 16), ("adjoint", 9), ("curvature", 9)])
@pytest.mark.parametrize("on_the_fly", [False, True])
def test_every_tier_finds_the_optimum(derivatives: str, trainings: int, on_the_fly: bool) -> None:
    search = tune_loss(Quadratic(derivatives), trainings, on_the_fly=on_the_fly)
    assert search.best is not None and search.best.error < 0.1 * 1.05
    assert search.trainings[0].kind == ("on_the_fly" if on_the_fly else "start")
    random = random_generator("random search").uniform(SPACE.log_low, SPACE.log_high, (trainings, 2))
    problem = Quadratic()
    assert search.best.error < min(problem.train(SPACE.weights(u)).error for u in random)


def test_the_tier_follows_what_trainings_offer() -> None:
    offered = ("none", "adjoint", "curvature")
    kinds = {d: {t.kind for t in tune_loss(Quadratic(d), 8, on_the_fly=False).trainings} for d in offered}
    assert "learn_loss" in kinds["none"]
    assert all("model" in kinds[d] and "learn_loss" not in kinds[d] for d in ("adjoint", "curvature"))


@pytest.mark.parametrize("derivatives", ["none", "adjoint", "curvature"])
def test_one_proposal_in_four_explores(derivatives: str) -> None:
    search = tune_loss(Quadratic(derivatives), 12, on_the_fly=False)
    explorers = [t.kind in ("surrogate", "restart") for t in search.trainings]
    assert all(explorers[EXPLORE_EVERY - 1 :: EXPLORE_EVERY])


def after(search: TuneLoss, count: int, problem: Quadratic) -> list[np.ndarray]:
    """The weights of the next trainings."""
    asked = []
    for _ in range(count):
        proposal = search.ask()
        search.tell(proposal.identifier, problem.train(proposal.weights))
        asked.append(proposal.weights)
    return asked


@pytest.mark.parametrize("derivatives", ["none", "adjoint", "curvature"])
def test_state_goes_on_exactly(derivatives: str) -> None:
    problem = Quadratic(derivatives)
    search = tune_loss(problem, 7, on_the_fly=False)
    open_proposal = search.ask()
    restored = TuneLoss.from_state(SPACE, json.loads(json.dumps(search.state(), allow_nan=False)))
    assert repr(restored.report()) == repr(search.report())
    for one in (search, restored):
        one.tell(open_proposal.identifier, problem.train(open_proposal.weights))
    np.testing.assert_array_equal(after(search, 6, problem), after(restored, 6, problem))


def test_telling_twice_changes_nothing() -> None:
    problem = Quadratic()
    search = tune_loss(problem, 3, on_the_fly=False)
    proposal = search.ask()
    search.tell(proposal.identifier, problem.train(proposal.weights))
    state = search.state()
    search.tell(proposal.identifier, problem.train(TARGET))
    search.tell(99, problem.train(TARGET))
    assert search.state() == state


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(["ask", "tell", "fail", "stop", "abandon"]), min_size=5, max_size=25))
def test_any_order_of_events(events: list[str]) -> None:
    """Several in flight, failures, early ends: proposals stay in the box, distinct, and the best never gets worse."""
    problem, search = Quadratic(), TuneLoss(SPACE, seed=1)
    flying: list[Proposal] = []
    best = np.inf
    for event in events:
        if event == "ask" or not flying:
            flying.append(search.ask())
            assert (flying[-1].weights >= SPACE.low).all() and (flying[-1].weights <= SPACE.high).all()
            continue
        proposal = flying.pop(0)
        outcome = problem.train(proposal.weights)
        if event == "abandon":
            search.abandon(proposal.identifier)
        elif event == "fail":
            search.tell(proposal.identifier, Outcome(outcome.features, np.full(len(outcome.errors), np.nan)))
        else:
            search.tell(proposal.identifier, outcome, complete=event == "tell")
        assert (np.inf if search.best is None else search.best.error) <= best
        best = np.inf if search.best is None else search.best.error
    assert len({p.weights.tobytes() for p in flying}) == len(flying)
    finals = [t.error for t in search.trainings if t.usable]
    assert best == (min(finals) if finals else np.inf)


def test_failed_and_early_ended_trainings_are_never_the_best() -> None:
    problem, search = Quadratic(), TuneLoss(SPACE)
    first, second, third = search.ask(), search.ask(), search.ask()
    good = problem.train(TARGET)
    search.tell(first.identifier, Outcome(good.features, np.r_[good.errors[:-1], np.nan]))
    search.tell(second.identifier, good, complete=False)
    assert search.best is None
    search.tell(third.identifier, problem.train(third.weights))
    assert search.best is not None and search.best.identifier == third.identifier
    assert search.best_snapshot is not None and search.best_snapshot.error == good.errors.min()
    report = search.report()
    assert (report.trainings, report.failed) == (2, 1)


def test_early_ended_and_failed_trainings_ask_for_no_derivatives() -> None:
    problem, search = Quadratic("adjoint"), TuneLoss(SPACE)
    first, second = search.ask(), search.ask()
    search.tell(first.identifier, problem.train(first.weights), complete=False)
    outcome = problem.train(second.weights)
    search.tell(second.identifier, Outcome(outcome.features, outcome.errors * np.nan, outcome.sensitivity))
    assert problem.resolved == 0


def with_noise(problem: Quadratic, size: float) -> Callable[[Proposal], Outcome]:
    def train(proposal: Proposal) -> Outcome:
        outcome = problem.train(proposal.weights)
        noise = random_generator("noise", proposal.identifier).normal(size=len(outcome.errors))
        return Outcome(outcome.features, outcome.errors + size * noise)

    return train


def test_noisy_best_is_trained_again_before_it_is_believed() -> None:
    search, problem = TuneLoss(SPACE, noisy=True), Quadratic()
    train = with_noise(problem, 0.05)
    for _ in range(30):
        proposal = search.ask()
        search.tell(proposal.identifier, train(proposal))
    best = search.best
    assert best is not None and best.trainings > 1
    retested = {t.weights.tobytes() for t in search.trainings if t.kind == "retest"}
    assert len(retested) > 1, "the first one that was retested does not stay the best for ever"
    truth = [problem.train(training.weights).error for training in search.trainings]
    assert problem.train(best.weights).error < np.quantile(truth, 0.25)


def test_retests_are_of_what_looks_better_than_the_best() -> None:
    search = TuneLoss(SPACE, noisy=True)
    outcome = Quadratic().train(TARGET)
    for error in (1.0, 0.5):
        search.tell(search.ask().identifier, Outcome(outcome.features, np.r_[outcome.errors[:-1], error]))
    again = search.ask()
    assert again.kind == "retest" and again.weights.tobytes() == search.trainings[1].weights.tobytes()
    search.tell(again.identifier, Outcome(outcome.features, np.r_[outcome.errors[:-1], 0.9]))
    assert search.best is not None and search.best.error == pytest.approx(0.7) and search.best.trainings == 2


def test_errors_of_any_sign_scale_and_offset() -> None:
    """Max mode negates: nothing may divide by the error."""

    class Shifted(Quadratic):
        def train(self, weights: np.ndarray) -> Outcome:
            outcome = super().train(weights)
            return Outcome(outcome.features, 1e3 * outcome.errors - 5e3)

    search = tune_loss(Shifted(), 16, on_the_fly=False)
    assert search.best is not None and search.best.error < 1e3 * 0.1 * 1.05 - 5e3


def test_report_compares_promise_and_gain() -> None:
    report = tune_loss(Quadratic("curvature"), 8, on_the_fly=False).report()
    assert report.predicted_gain is not None and report.realised_gain is not None and report.predicted_gain >= 0
    assert report.cost >= 8 * 8
    empty = TuneLoss(SPACE).report()
    assert empty.best is None and empty.best_snapshot is None and empty.predicted_gain is None


@pytest.mark.parametrize("derivatives", ["none", "adjoint", "curvature"])
def test_a_search_that_began_on_the_fly_goes_on_exactly_and_from_there(derivatives: str) -> None:
    problem = Quadratic(derivatives)
    search = tune_loss(problem, 3, on_the_fly=True)
    assert len(search.trainings[0].waypoints) > 5 and search.best is not None and search.best.error < 0.1 * 1.05
    restored = TuneLoss.from_state(SPACE, json.loads(json.dumps(search.state(), allow_nan=False)))
    assert restored.state() == search.state()
    np.testing.assert_array_equal(after(search, 4, problem), after(restored, 4, problem))


def test_waypoints_teach_the_surrogate_but_are_never_the_best() -> None:
    problem, grid = Quadratic(), SPACE.sample(random_generator("waypoints"), 30)
    waypoints = [Waypoint(SPACE.weights(u), problem.train(SPACE.weights(u)).error - 0.05) for u in grid]
    search = TuneLoss(SPACE, on_the_fly=True)
    start = search.ask()
    search.tell(start.identifier, problem.train(start.weights), waypoints=waypoints)
    assert search.best is not None and search.best.error == problem.train(start.weights).error
    proposal = search.ask()
    assert proposal.kind == "model"
    assert problem.train(proposal.weights).error < 0.1 + 0.5 * (search.best.error - 0.1)


def test_derivatives_that_are_not_finite_are_left_out() -> None:
    search = TuneLoss(SPACE)
    outcome = Quadratic().train(TARGET)
    broken = [
        Sensitivity(np.array([np.nan, 1.0])),
        Sensitivity(np.array([0.1, 1.0]), np.full((2, 2), np.inf)),
    ]
    for sensitivity in broken:
        search.tell(search.ask().identifier, Outcome(outcome.features, outcome.errors, sensitivity))
    assert search.trainings[0].slope is None
    assert search.trainings[1].slope is not None and search.trainings[1].curvature is None
    assert np.isfinite(search.ask().weights).all()


def test_wrong_shapes_are_one_clear_error_and_lose_nothing() -> None:
    search = TuneLoss(SPACE)
    proposal, outcome = search.ask(), Quadratic().train(TARGET)
    for wrong in (Outcome(outcome.features[:, :2], outcome.errors), Outcome(np.zeros((0, 3)), np.zeros(0))):
        with pytest.raises(ConfigError, match=r"outcome\.features"):
            search.tell(proposal.identifier, wrong)
    search.tell(proposal.identifier, outcome)
    assert search.best is not None
    with pytest.raises(ConfigError, match="space"):
        TuneLoss.from_state(WeightSpace.of({"other": (1.0, 2.0)}, "ce"), search.state())


def test_snapshots_of_early_ended_trainings_are_learned_from() -> None:
    problem, search = Quadratic(), TuneLoss(SPACE)
    first = search.ask()
    search.tell(first.identifier, problem.train(first.weights), complete=False)
    assert search.ask().kind == "learn_loss"


def test_best_snapshot_is_counted_among_all_snapshots() -> None:
    search = TuneLoss(SPACE)
    outcome = Quadratic().train(TARGET)
    errors = outcome.errors.copy()
    errors[:2], errors[4] = np.nan, -1.0
    search.tell(search.ask().identifier, Outcome(outcome.features, errors))
    assert search.best_snapshot is not None and search.best_snapshot.row == 4


@pytest.mark.parametrize("factor", [1e10, 1e16, 1e25, 1e37])
@pytest.mark.parametrize("diverging", [(0,), (2,), (0, 3), (1, 2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("what", ["features", "errors", "both"])
def test_trainings_that_diverge_with_finite_numbers_do_not_stop_the_search(
    factor: float, diverging: tuple[int, ...], what: str
) -> None:
    space = WeightSpace.of(dict.fromkeys("abc", (0.01, 100.0)), "ce")
    for seed in range(2):
        draw, search = np.random.default_rng(seed), TuneLoss(space, seed=seed)
        for training in range(9):
            features, errors = draw.uniform(0.2, 2, (5, 4)), draw.uniform(0.5, 2, 5)
            if training in diverging:
                features[2:] *= factor if what != "errors" else 1
                errors[2:] *= factor if what != "features" else 1
            search.tell(search.ask().identifier, Outcome(features, errors))
        assert search.best is not None and (search.best.error <= 2 or what == "features")


def test_an_abandoned_proposal_can_still_be_told() -> None:
    problem, search = Quadratic(), TuneLoss(SPACE)
    proposal = search.ask()
    search.abandon(proposal.identifier)
    restored = TuneLoss.from_state(SPACE, search.state())
    restored.tell(proposal.identifier, problem.train(proposal.weights))
    assert restored.best is not None and restored.best.identifier == proposal.identifier


def test_equal_weights_trained_twice_hide_nothing_where_there_is_no_noise() -> None:
    """Two trainings at one corner, the better one of the two no match for a third elsewhere."""
    told = [(SPACE.high, 0.8), (SPACE.high, 0.8), (SPACE.low, 0.1)]
    for noisy, expected in ((False, 0.1), (True, 0.8)):
        search = TuneLoss(SPACE, noisy=noisy)
        for weights, error in told:
            outcome = Outcome(np.ones((1, 3)), np.array([error]), None, cost=1)
            search.tell(search.ask().identifier, outcome, weights=weights)
        assert search.best is not None and search.best.error == pytest.approx(expected)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_no_training_is_repeated_where_there_is_no_noise(seed: int) -> None:
    search = TuneLoss(WeightSpace.of({"a": (1e-3, 1e2)}, "ce"), seed=seed)
    for _ in range(10):  # the error falls towards the upper bound, where the search ends
        proposal = search.ask()
        error = float(-np.log(proposal.weights[0]))
        search.tell(proposal.identifier, Outcome(np.array([[1.0, error]]), np.array([error]), None, cost=1))
    trained = np.log([training.weights[0] for training in search.trainings])
    assert np.diff(np.sort(trained)).min() > 0
