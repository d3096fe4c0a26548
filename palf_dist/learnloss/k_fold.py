"""K folds of one training problem as a single problem: one set of loss weights, judged by the mean over the folds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from palf_dist.learnloss.records import Choose, Outcome, Problem, Refine, Sensitivity


class KFoldProblem:
    """All folds are trained with the same weights; theta = (theta_1 .. theta_F) is one model of F independent parts.

    phi(theta) = mean_f phi_f(theta_f) and e(theta) = mean_f e_f(theta_f), so lambda . phi is minimised fold by fold.
    Its Hessian and grad phi are block diagonal, 1/F times those of the folds. The 1/F cancels in V = H^{-1} grad phi,
    whose blocks are hence V_f, and d e / d lambda = -V^T grad e and V^T (d2e / dtheta2) V are the means of the folds'.
    """

    def __init__(self, folds: Sequence[Problem]) -> None:
        """``folds``: problems over the same space that ask equally often when trained on the fly."""
        assert folds, "no fold"
        self.folds, self.space = folds, folds[0].space

    def train(self, weights: np.ndarray) -> Outcome:
        return _mean_outcome([fold.train(weights) for fold in self.folds])

    def train_on_the_fly(self, choose: Choose, refine: Refine | None = None) -> tuple[np.ndarray, Outcome]:
        """Each fold runs in a thread of its own; where they ask, all wait for one answer to the mean of what they
        show."""
        shown: list[Any] = [None] * len(self.folds)
        answer: Any = None
        meeting = threading.Barrier(len(self.folds))

        def ask(index: int, what: Any, respond: Callable[[], Any]) -> Any:
            nonlocal answer
            shown[index] = what
            if meeting.wait() == 0:  # in one of the threads
                answer = respond()
            meeting.wait()
            return answer

        def train(index: int) -> tuple[np.ndarray, Outcome]:
            def ask_to_choose(features: np.ndarray, errors: np.ndarray) -> np.ndarray:
                weights: np.ndarray = ask(index, (features, errors), lambda: choose(*_mean_course(shown)))
                return weights

            def ask_to_refine(settled: Outcome) -> tuple[np.ndarray, bool]:
                assert refine is not None
                following: tuple[np.ndarray, bool] = ask(index, settled, lambda: refine(_mean_outcome(shown)))
                return following

            try:
                return self.folds[index].train_on_the_fly(ask_to_choose, None if refine is None else ask_to_refine)
            except BaseException:
                meeting.abort()  # or the others would wait for ever
                raise

        with ThreadPoolExecutor(len(self.folds)) as threads:
            runs = [threads.submit(train, index) for index in range(len(self.folds))]
        causes = [error for run in runs if (error := run.exception()) is not None]
        if causes:
            raise next(error for error in causes if not isinstance(error, threading.BrokenBarrierError))
        weights, outcomes = zip(*(run.result() for run in runs), strict=True)
        return weights[0], _mean_outcome(outcomes)


def deal_folds(labels: np.ndarray, folds: int, generator: np.random.Generator) -> np.ndarray:
    """A fold in 0 .. folds - 1 for each row [n]: in random order, class sizes and fold sizes as equal as can be.

    No class of two rows or more lies in one fold alone.
    """
    dealt = np.empty(len(labels), int)
    dealt[_by_class(labels, generator)] = np.arange(len(labels)) % folds
    return dealt


def hold_out(labels: np.ndarray, share: float, generator: np.random.Generator) -> np.ndarray:
    """Which rows [n] to hold out, at random: ``share`` <= 0.5 of each class, but never a whole class of two or more."""
    picked = np.diff(np.ceil(np.arange(len(labels) + 1) * share)) > 0
    held_out = np.empty(len(labels), bool)
    held_out[_by_class(labels, generator)] = picked
    return held_out


def _by_class(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Row numbers, class by class, in random order within each."""
    return np.lexsort((generator.random(len(labels)), labels))


def _mean_course(courses: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean features [n, K] and errors [n] of snapshots aligned by index; who has fewer repeats the last."""
    length = max(len(errors) for _, errors in courses)
    places = [np.minimum(np.arange(length), len(errors) - 1) for _, errors in courses]
    return (
        np.mean([features[place] for (features, _), place in zip(courses, places, strict=True)], axis=0),
        np.mean([errors[place] for (_, errors), place in zip(courses, places, strict=True)], axis=0),
    )


def _mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    features, errors = _mean_course([(outcome.features, outcome.errors) for outcome in outcomes])
    offered = all(outcome.sensitivity is not None for outcome in outcomes)
    return Outcome(
        features=features,
        errors=errors,
        sensitivity=(lambda: _mean_sensitivity(outcomes)) if offered else None,
        cost=sum(outcome.cost for outcome in outcomes),
    )


def _mean_sensitivity(outcomes: Sequence[Outcome]) -> Sensitivity | None:
    parts = [part for outcome in outcomes if (part := outcome.derivatives()) is not None]
    if len(parts) < len(outcomes):
        return None
    curvatures = [part.curvature for part in parts if part.curvature is not None]
    return Sensitivity(
        gradient=np.mean([part.gradient for part in parts], axis=0),
        curvature=np.mean(curvatures, axis=0) if len(curvatures) == len(parts) else None,
        cost=sum(part.cost for part in parts),
    )
