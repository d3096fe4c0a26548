from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palf_dist.learnloss.k_fold import KFoldProblem, deal_folds, hold_out
from palf_dist.learnloss.records import Choose, Outcome, Refine, Sensitivity
from palf_dist.learnloss.softmax import LabelledRows, SoftmaxRegression
from palf_dist.learnloss.space import WeightSpace
from palf_dist.randomness import random_generator

SPACE = WeightSpace.of({"a": (0.1, 10.0), "b": (0.1, 10.0)}, "reference")
WEIGHTS = np.array([2.0, 0.5])


class Fold:
    """A training of ``length`` snapshots, all of whose numbers are multiples of ``value``."""

    def __init__(self, value: float, length: int, *, curvature: bool = True, asks: int = 3) -> None:
        self.space, self.value, self.length, self.curvature, self.asks = SPACE, value, length, curvature, asks
        self.trained: list[np.ndarray] = []
        self.sensitivities = 0

    def train(self, weights: np.ndarray) -> Outcome:
        self.trained.append(weights)
        steps = self.value * np.arange(1, self.length + 1)
        return Outcome(np.outer(steps, [1.0, 2.0, 3.0]), steps, self._sensitivity, cost=self.length)

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        for count in range(1, self.asks + 1):
            steps = self.value * np.arange(1, count * self.length + 1)
            weights = choose(np.outer(steps, [1.0, 2.0, 3.0]), steps)
        more = refine is not None
        while more:
            assert refine is not None
            weights, more = refine(self.train(weights))
        return weights, self.train(weights)

    def _sensitivity(self) -> Sensitivity:
        self.sensitivities += 1
        return Sensitivity(np.full(2, self.value), self.value * np.eye(2) if self.curvature else None, cost=7)


def test_an_outcome_is_the_mean_over_the_folds() -> None:
    folds = [Fold(1.0, 2), Fold(4.0, 3)]
    outcome = KFoldProblem(folds).train(WEIGHTS)
    np.testing.assert_allclose(outcome.errors, [2.5, 5.0, 7.0])  # means of 1 2 (2) and 4 8 12
    np.testing.assert_allclose(outcome.features, np.outer([2.5, 5.0, 7.0], [1, 2, 3]))
    assert outcome.cost == 5
    assert [fold.sensitivities for fold in folds] == [0, 0], "asked before it was of use"
    assert callable(outcome.sensitivity)
    sensitivity = outcome.sensitivity()
    np.testing.assert_allclose(sensitivity.gradient, [2.5, 2.5])
    np.testing.assert_allclose(sensitivity.curvature, 2.5 * np.eye(2))
    assert sensitivity.cost == 14
    for fold in folds:
        np.testing.assert_array_equal(fold.trained, [WEIGHTS])


def test_a_fold_without_curvature_leaves_the_gradient() -> None:
    outcome = KFoldProblem([Fold(1.0, 2), Fold(3.0, 2, curvature=False)]).train(WEIGHTS)
    assert callable(outcome.sensitivity)
    sensitivity = outcome.sensitivity()
    np.testing.assert_allclose(sensitivity.gradient, [2.0, 2.0])
    assert sensitivity.curvature is None


def test_a_fold_that_fails_fails_the_training() -> None:
    assert np.isnan(KFoldProblem([Fold(1.0, 2), Fold(np.nan, 2)]).train(WEIGHTS).error)


def test_on_the_fly_there_is_one_choice_for_all_folds() -> None:
    folds = [Fold(1.0, 2), Fold(4.0, 3), Fold(1.0, 1)]
    asked: list[np.ndarray] = []

    def choose(features: np.ndarray, errors: np.ndarray) -> np.ndarray:
        np.testing.assert_allclose(features, np.outer(errors, [1, 2, 3]))
        asked.append(errors)
        return np.array([1.0, len(asked)])

    weights, outcome = KFoldProblem(folds).train_on_the_fly(choose)
    assert len(asked) == 3
    np.testing.assert_allclose(asked[0], [2.0, 11 / 3, 5.0])  # 1 2 (2), 4 8 12 and 1 (1 1)
    np.testing.assert_array_equal(weights, [1.0, 3.0])
    for fold in folds:
        np.testing.assert_array_equal(fold.trained, [weights])
    np.testing.assert_allclose(outcome.errors, asked[0])


def test_on_the_fly_all_folds_settle_down_together() -> None:
    folds = [Fold(1.0, 2), Fold(4.0, 3)]
    asked: list[Outcome] = []

    def refine(settled: Outcome) -> tuple[np.ndarray, bool]:
        asked.append(settled)
        return np.array([2.0, len(asked)]), len(asked) < 3

    weights, _ = KFoldProblem(folds).train_on_the_fly(lambda features, errors: WEIGHTS, refine)
    assert len(asked) == 3 and all(settled.error == 7.0 for settled in asked)
    sensitivity = asked[-1].derivatives()
    assert sensitivity is not None and sensitivity.cost == 14
    for fold in folds:
        np.testing.assert_array_equal(fold.trained, [WEIGHTS, [2.0, 1.0], [2.0, 2.0], weights])


def test_what_goes_wrong_in_a_fold_or_a_choice_is_raised_as_it_is() -> None:
    class Broken(Fold):
        def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
            raise RuntimeError("broken fold")

    def refuse(features: np.ndarray, errors: np.ndarray) -> np.ndarray:
        raise RuntimeError("no choice")

    with pytest.raises(RuntimeError, match="broken fold"):
        KFoldProblem([Fold(1.0, 2), Broken(1.0, 2)]).train_on_the_fly(lambda features, errors: WEIGHTS)
    with pytest.raises(RuntimeError, match="no choice"):
        KFoldProblem([Fold(1.0, 2), Fold(1.0, 2)]).train_on_the_fly(refuse)


def regressions() -> list[SoftmaxRegression]:
    generator = random_generator("k fold test")
    labels = np.arange(60) % 2
    inputs = np.column_stack([generator.normal(size=(60, 4)) + labels[:, None], np.ones(60)])
    ranges = {"l2": (1e-3, 10.0), "logit_penalty": (1e-3, 10.0)}
    folds = []
    for fold in range(3):
        held = np.arange(60) % 3 == fold
        train, validation = (LabelledRows(inputs[which], labels[which]) for which in (~held, held))
        folds.append(SoftmaxRegression(train, validation, 2, {"l2": np.arange(5) < 4}, ranges))
    return folds


def test_its_sensitivity_is_that_of_its_error() -> None:
    problem, weights = KFoldProblem(regressions()), np.array([0.1, 0.1])
    outcome = problem.train(weights)
    assert callable(outcome.sensitivity)
    gradient = outcome.sensitivity().gradient
    for name in range(2):
        by = 0.02 * np.eye(2)[name]
        expected = (problem.train(weights + by).error - problem.train(weights - by).error) / 0.04
        assert gradient[name] == pytest.approx(expected, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=40), folds=st.integers(2, 6), seed=st.integers(0, 9))
def test_folds_are_dealt_evenly(labels: list[int], folds: int, seed: int) -> None:
    y = np.array(labels)
    dealt = deal_folds(y, folds, random_generator(seed))
    sizes = np.bincount(dealt, minlength=folds)
    assert len(sizes) == folds
    assert np.ptp(sizes) <= 1
    for label, count in Counter(labels).items():
        of_class = np.bincount(dealt[y == label], minlength=folds)
        assert np.ptp(of_class) <= 1
        assert count == 1 or of_class.max() < count


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    share=st.floats(0.02, 0.5),
    seed=st.integers(0, 9),
)
def test_a_share_of_each_class_is_held_out(labels: list[int], share: float, seed: int) -> None:
    y = np.array(labels)
    held = hold_out(y, share, random_generator(seed))
    assert held.sum() == np.ceil(share * len(y))
    for label, count in Counter(labels).items():
        of_class = held[y == label].sum()
        assert abs(of_class - share * count) <= 1 + 1e-9
        assert count == 1 or of_class < count


def test_dealing_depends_on_the_generator_alone() -> None:
    y = np.arange(40) % 3
    first, again, other = (deal_folds(y, 4, random_generator(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
