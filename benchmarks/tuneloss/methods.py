"""The methods that are compared. Each is a function (problem, trainings, seed) -> what every training gave."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import optuna

from benchmarks.tuneloss.problems import Derivatives
from palf_dist.learnloss.records import Outcome, Problem, Sensitivity
from palf_dist.learnloss.tuning import tune_loss
from palf_dist.randomness import random_generator


@dataclass(frozen=True)
class Trial:
    """One training of a method."""

    weights: np.ndarray  # [k]
    error: float  # of the trained model
    cost: int  # gradient evaluations, of the training and of its sensitivity where that was asked for
    kind: str  # why these weights
    snapshots: int = 1  # models whose validation error was looked at


@dataclass(frozen=True)
class Method:
    """A method and what it is allowed to ask of a problem."""

    label: str
    run: Callable[[Problem, int, int], list[Trial]]
    derivatives: Derivatives = "none"
    most_trainings: int | None = None  # fewer than asked for, where the method itself is slow


def run_random(problem: Problem, trainings: int, seed: int) -> list[Trial]:
    """The centre of the box, then uniform draws in log scale."""
    space = problem.space
    draws = space.sample(random_generator("benchmark random", seed), trainings - 1)
    points = np.vstack([space.centre, draws])
    return [_train(problem, space.weights(u), "explore") for u in points]


def run_optuna(
    sampler: Callable[[int], optuna.samplers.BaseSampler], problem: Problem, trainings: int, seed: int
) -> list[Trial]:
    """An Optuna sampler over log-uniform weights; its first trial is the centre of the box."""
    space = problem.space
    study = optuna.create_study(sampler=sampler(seed))
    study.enqueue_trial(space.named(space.weights(space.centre)))
    done = []
    for _ in range(trainings):
        trial = study.ask()
        bounds = zip(space.names, space.low, space.high, strict=True)
        weights = np.array([trial.suggest_float(name, low, high, log=True) for name, low, high in bounds])
        done.append(_train(problem, weights, "searcher"))
        if np.isfinite(done[-1].error):
            study.tell(trial, done[-1].error)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return done


def run_hoag(problem: Problem, trainings: int, seed: int) -> list[Trial]:
    """Projected hypergradient descent in log lambda, after the step-size rule of Pedregosa (2016): the first
    step has length 1 / k; 1 / L grows by 5 % while e falls as the model says and halves when e rises.

    Other than there each training is solved to the same accuracy from the same start, as with all methods here: warm
    starts would save HOAG gradient evaluations, not steps. A converged run starts again at a random point.
    """
    space = problem.space
    generator = random_generator("benchmark hoag", seed)
    done: list[Trial] = []
    u, before, moved, lipschitz = space.centre, np.inf, 0.0, np.nan
    while len(done) < trainings:
        outcome = problem.train(space.weights(u))
        sensitivity = outcome.derivatives()
        assert isinstance(sensitivity, Sensitivity), "HOAG needs a problem with hypergradients"
        done.append(Trial(space.weights(u), outcome.error, outcome.cost + sensitivity.cost, "model"))
        slope = sensitivity.gradient * space.weights(u)
        size = float(np.linalg.norm(slope))
        if np.isnan(lipschitz):
            lipschitz = space.size * size if size > 1e-3 else 1.0
        elif outcome.error <= before - 0.5 * lipschitz * moved**2:
            lipschitz *= 0.95
        elif outcome.error > before:
            lipschitz *= 2
        new = space.clip(u - slope / lipschitz)
        u, before, moved = new, outcome.error, float(np.linalg.norm(new - u))
        if not moved > 1e-3:
            u, before, moved, lipschitz = space.sample(generator, 1)[0], np.inf, 0.0, np.nan
    return done


def run_tune_loss(on_the_fly: bool, problem: Problem, trainings: int, seed: int) -> list[Trial]:
    """TuneLoss with what the problem offers."""
    tuned = tune_loss(problem, trainings, seed=seed, on_the_fly=on_the_fly)
    looks = Counter(tuned.observations.trainings.tolist())
    return [Trial(t.weights, t.error, t.cost, t.kind, max(looks[t.identifier], 1)) for t in tuned.trainings]


def _train(problem: Problem, weights: np.ndarray, kind: str) -> Trial:
    outcome: Outcome = problem.train(weights)
    return Trial(weights, outcome.error, outcome.cost, kind)


def _gp(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed)


def _cma_es(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed)


GRADIENT_BUDGET = 40
"""Trainings of the tiers that need few: fewer than the others get, so that the benchmark ends today."""

METHODS = {
    "tuneloss_curvature_fly": Method(
        "TuneLoss, curvature, on the fly", partial(run_tune_loss, True), "curvature", GRADIENT_BUDGET
    ),
    "tuneloss_curvature": Method("TuneLoss, curvature", partial(run_tune_loss, False), "curvature", GRADIENT_BUDGET),
    "tuneloss_adjoint_fly": Method(
        "TuneLoss, adjoint, on the fly", partial(run_tune_loss, True), "adjoint", GRADIENT_BUDGET
    ),
    "tuneloss_adjoint": Method("TuneLoss, adjoint", partial(run_tune_loss, False), "adjoint", GRADIENT_BUDGET),
    "tuneloss_fly": Method("TuneLoss, no gradients, on the fly", partial(run_tune_loss, True)),
    "tuneloss": Method("TuneLoss, no gradients", partial(run_tune_loss, False)),
    "hoag": Method("HOAG", run_hoag, "adjoint"),
    "tpe": Method("Optuna TPE", partial(run_optuna, _tpe)),
    "gp": Method("Optuna GP", partial(run_optuna, _gp), most_trainings=50),
    "cma_es": Method("CMA-ES", partial(run_optuna, _cma_es)),
    "random": Method("random", run_random),
}
REFERENCE = "tpe"
"""Everything is compared with this one."""
