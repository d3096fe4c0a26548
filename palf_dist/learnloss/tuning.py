"""TuneLoss: an anytime search for loss weights, by asking for trainings and being told what they showed.

What a training offers decides how it is used: snapshots' features and errors alone (LearnLoss and a surrogate), also
the hypergradient (a surrogate that takes slopes), also its curvature (implicit Gauss-Newton steps in a trust region).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from palf_dist.errors import ConfigError
from palf_dist.learnloss.history import Best, BestSnapshot, Training, TuneReport, best_of, promising
from palf_dist.learnloss.learn_loss import LearnLoss, choose_weights
from palf_dist.learnloss.observations import Observations
from palf_dist.learnloss.on_the_fly import OnTheFly
from palf_dist.learnloss.records import Outcome, Problem, Proposal, Sensitivity, Waypoint
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.surrogate import Points, Surrogate
from palf_dist.learnloss.trust_region import LARGEST_RADIUS, SMALLEST_STEP, LocalModel
from palf_dist.randomness import random_generator

EXPLORE_EVERY = 4  # of the proposals one explores, whatever the models say
CHOICES: tuple[Literal["slack", "margin", "nnls"], ...] = ("margin", "slack", "nnls")
PATIENCE = 3  # proposals of LearnLoss in a row without gain, until the surrogate takes over
TOO_CLOSE = 0.05  # log units: a training there would say nothing new
SMALLEST_GAIN, SMALLEST_STEP_GAIN = 1e-2, 1e-3  # of the range of errors seen: what gains less has come to its end
ENOUGH = 4  # finals before the surrogate is asked
FIRST_RADIUS, RADIUS_ON_THE_FLY = 2.0, 1.0

Found = tuple[np.ndarray, str, float | None]
"""u [k], the kind of the proposal and the error that its model predicts."""
Strategy = Callable[[Points, np.random.Generator], Found | None]


class TuneLoss:
    """Ask for weights, train, tell; any number of trainings may be in flight. The best so far is always known."""

    def __init__(self, space: WeightSpace, *, seed: int = 0, on_the_fly: bool = False, noisy: bool = False) -> None:
        """
        Args:
            on_the_fly: the first proposal is of kind ``on_the_fly``: to be trained by Problem.train_on_the_fly.
            noisy: two trainings with equal weights differ; the best is trained again before it is believed.
        """
        self.space, self.seed, self.on_the_fly, self.noisy = space, seed, on_the_fly, noisy
        self.trainings: list[Training] = []  # in the order in which they were told
        self.observations = Observations()
        self._pending: dict[int, Proposal] = {}  # asked, not told
        self._abandoned: set[int] = set()  # those of them that are not in flight
        self._asked = 0
        self._radius = RADIUS_ON_THE_FLY if on_the_fly else FIRST_RADIUS
        self._choice = self._fruitless = 0
        self._hyperparameters: np.ndarray | None = None
        self._learn_loss = LearnLoss(space)

    def ask(self) -> Proposal:
        """Weights to train with next. Never raises and never ends: the caller decides how many trainings there are."""
        identifier, self._asked = self._asked, self._asked + 1
        again = self._to_retest(identifier)
        if again is not None:
            proposal = Proposal(identifier, again.weights, "retest")
        else:
            u, kind, predicted = self._propose(identifier, random_generator("tune loss", self.seed, identifier))
            proposal = Proposal(identifier, self.space.weights(u), kind, predicted)
        self._pending[identifier] = proposal
        return proposal

    def tell(
        self,
        identifier: int,
        outcome: Outcome,
        *,
        weights: np.ndarray | None = None,
        complete: bool = True,
        waypoints: Sequence[Waypoint] = (),
    ) -> None:
        """Take in what the training of a proposal showed; a second telling of the same one changes nothing.

        Args:
            weights: [k] those really used, where they are not the proposal's (on the fly).
            waypoints: what the training had settled down to on its way (on the fly); the surrogate learns from it too.
            complete: False when the training was ended early: its snapshots count, but its last one is no final.

        Raises:
            ConfigError: the outcome does not have the shapes of this space.
        """
        if identifier not in self._pending:
            return
        self._check(outcome)
        proposal, before = self._pending.pop(identifier), self.best
        self._abandoned.discard(identifier)
        finite = bool(np.isfinite(outcome.error))
        self.observations.add(outcome.features, outcome.errors, identifier, complete and finite)
        sensitivity = outcome.derivatives() if complete and finite else None
        self.trainings.append(
            Training(
                identifier,
                proposal.kind,
                proposal.weights if weights is None else np.array(weights, float),
                outcome.error,
                complete,
                proposal.predicted,
                outcome.cost + (sensitivity.cost if sensitivity else 0),
                sensitivity.gradient if sensitivity else None,
                sensitivity.curvature if sensitivity else None,
                tuple(waypoints),
            )
        )
        self._learn_from(proposal, outcome.error, before)

    def abandon(self, identifier: int) -> None:
        """This proposal is not in flight any more: do not count on its being told."""
        self._abandoned.add(identifier)

    @property
    def best(self) -> Best | None:
        """The best final so far."""
        return best_of(self.trainings, self.noisy)

    @property
    def best_snapshot(self) -> BestSnapshot | None:
        """The best model seen at any moment; it may beat every final where early stopping helps."""
        errors = self.observations.errors
        if not len(errors):
            return None
        index = int(errors.argmin())
        training, row = int(self.observations.trainings[index]), int(self.observations.rows[index])
        return BestSnapshot(training, row, float(errors[index]))

    def report(self) -> TuneReport:
        complete = [training for training in self.trainings if training.complete]
        steps = self._steps()
        return TuneReport(
            best=self.best,
            best_snapshot=self.best_snapshot,
            trainings=len(complete),
            failed=sum(not training.usable for training in complete),
            cost=sum(training.cost for training in self.trainings),
            predicted_gain=float(np.median([promised for promised, _ in steps])) if steps else None,
            realised_gain=float(np.median([realised for _, realised in steps])) if steps else None,
        )

    def state(self) -> dict[str, Any]:
        """All of it as JSON values; ``from_state`` goes on exactly."""
        return {
            "names": list(self.space.names),
            "seed": self.seed,
            "on_the_fly": self.on_the_fly,
            "noisy": self.noisy,
            "asked": self._asked,
            "pending": [
                {"identifier": p.identifier, "weights": p.weights.tolist(), "kind": p.kind, "predicted": p.predicted}
                for p in self._pending.values()
            ],
            "abandoned": sorted(self._abandoned),
            "trainings": [training.state() for training in self.trainings],
            "observations": self.observations.state(),
            "radius": self._radius,
            "choice": self._choice,
            "fruitless": self._fruitless,
            "hyperparameters": None if self._hyperparameters is None else self._hyperparameters.tolist(),
        }

    @classmethod
    def from_state(cls, space: WeightSpace, state: Mapping[str, Any]) -> TuneLoss:
        """What ``state`` returned, for the same space. Raises ConfigError for another one."""
        if list(space.names) != state["names"]:
            raise ConfigError(
                f"space: names {', '.join(space.names)}; the saved search has {', '.join(state['names'])}"
            )
        search = cls(space, seed=state["seed"], on_the_fly=state["on_the_fly"], noisy=state["noisy"])
        search._asked = state["asked"]
        for item in state["pending"]:
            proposal = Proposal(**{**item, "weights": np.array(item["weights"], float)})
            search._pending[proposal.identifier] = proposal
        search._abandoned = set(state["abandoned"])
        search.trainings = [Training.from_state(item) for item in state["trainings"]]
        search.observations = Observations.from_state(state["observations"])
        search._radius, search._choice = state["radius"], state["choice"]
        search._fruitless = state["fruitless"]
        if state["hyperparameters"] is not None:
            search._hyperparameters = np.array(state["hyperparameters"], float)
        return search

    def _propose(self, identifier: int, generator: np.random.Generator) -> tuple[np.ndarray, str, float | None]:
        """u [k], the kind of the proposal and the error that its model predicts."""
        if identifier == 0:
            return self.space.centre, "on_the_fly" if self.on_the_fly else "start", None
        points = self._points()
        for propose in self._strategies(identifier):
            found = propose(points, generator)
            if found is not None and self._distance(found[0], points) > TOO_CLOSE:
                return found
        return self._restart(points, generator)

    def _to_retest(self, identifier: int) -> Training | None:
        """Whose weights to train once more, where trainings are noisy and it is time for that."""
        if not self.noisy or identifier % EXPLORE_EVERY != 2:
            return None
        found = promising(self.trainings)
        flying = {proposal.weights.tobytes() for proposal in self._in_flight()}
        return None if found is None or found.weights.tobytes() in flying else found

    def _in_flight(self) -> list[Proposal]:
        return [proposal for proposal in self._pending.values() if proposal.identifier not in self._abandoned]

    def _strategies(self, identifier: int) -> list[Strategy]:
        """What to try in turn; the first that leads away from the trainings so far wins. One proposal in EXPLORE_EVERY
        is the surrogate's, which weighs the unknown: LearnLoss can trap itself among its observations, and the local
        model sees only its own valley."""
        if self.best is None:
            return [self._by_learn_loss]
        explores = identifier % EXPLORE_EVERY == EXPLORE_EVERY - 1
        if explores:
            return [self._by_surrogate]
        steps: list[Strategy] = [self._by_local_model, self._by_local_surrogate, self._by_surrogate]
        if any(training.slope is not None or training.waypoints for training in self.trainings):
            return steps
        learns = self._fruitless < PATIENCE or identifier % EXPLORE_EVERY == 0
        return [self._by_learn_loss, *steps] if learns else steps

    def _by_local_model(self, points: Points, generator: np.random.Generator) -> Found | None:
        """An implicit Gauss-Newton step from the best, where its curvature is known."""
        best = self.best
        assert best is not None
        training = next(training for training in self.trainings if training.identifier == best.identifier)
        if training.slope is None or training.curvature is None:
            return None
        model = LocalModel.of(np.log(training.weights), training.error, Sensitivity(training.slope, training.curvature))
        step = model.step(self.space, self._radius)
        worthwhile = SMALLEST_STEP_GAIN * float(np.ptp(points.errors))
        if np.abs(step.u - model.u).max() < SMALLEST_STEP or step.gain < worthwhile:
            return None
        return step.u, "model", training.error - step.gain

    def _by_local_surrogate(self, points: Points, generator: np.random.Generator) -> Found | None:
        """The least mean of the surrogate within the same radius of the best."""
        surrogate, best = self._surrogate(points), self.best
        assert best is not None
        if surrogate is None:
            return None
        centre = np.log(best.weights)
        region = self.space.clip(centre - self._radius), self.space.clip(centre + self._radius)
        u = surrogate.minimise(*region, generator)
        predicted = surrogate.error(u)
        worthwhile = SMALLEST_STEP_GAIN * float(np.ptp(points.errors))
        return None if best.error - predicted < worthwhile else (u, "model", predicted)

    def _by_surrogate(self, points: Points, generator: np.random.Generator) -> Found | None:
        surrogate = self._surrogate(points)
        if surrogate is None:
            return None
        u = surrogate.propose(self.space, generator)
        return u, "surrogate", surrogate.error(u)

    def _surrogate(self, points: Points) -> Surrogate | None:
        """Fitted to the points, where they are enough for that."""
        if not np.isfinite(points.slopes).any() and len(points.errors) < ENOUGH:
            return None
        surrogate = Surrogate(points, self._hyperparameters)
        self._hyperparameters = surrogate.hyperparameters
        return surrogate

    def _by_learn_loss(self, points: Points, generator: np.random.Generator) -> Found | None:
        if not len(self.observations):
            return None
        solution = self._learn_loss.solve(self.observations)
        for _ in CHOICES:
            kind = CHOICES[self._choice % len(CHOICES)]
            self._choice += 1
            u = self.space.clip(np.log(choose_weights(self.space, self.observations, solution, kind)))
            if self._distance(u, points) > TOO_CLOSE:
                return u, "learn_loss", None
        return None

    def _restart(self, points: Points, generator: np.random.Generator) -> Found:
        """All have converged: anywhere in the box, or at a distance from the best."""
        if generator.random() < 0.5 and self.best is not None:
            near = self.space.clip(points.u[points.errors.argmin()] + generator.normal(size=self.space.size))
            if self._distance(near, points) > TOO_CLOSE:  # not the corner of the box again
                return near, "restart", None
        return self.space.sample(generator, 1)[0], "restart", None

    def _points(self) -> Points:
        """The finals, then those in flight, which count like the median, then waypoints; failed trainings count like
        the worst."""
        usable = [training for training in self.trainings if training.usable]
        failed = [training for training in self.trainings if training.complete and not training.usable]
        errors = [training.error for training in usable]
        worst, median = (max(errors), float(np.median(errors))) if usable else (0.0, 0.0)
        waypoints = [waypoint for training in self.trainings for waypoint in training.waypoints]
        return Points.of(
            [
                *[(training.weights, training.error, training.slope) for training in usable],
                *[(training.weights, worst, None) for training in failed],
                *[(proposal.weights, median, None) for proposal in self._in_flight()],
                *[(waypoint.weights, waypoint.error, waypoint.gradient) for waypoint in waypoints],
            ],
            self.space.size,
            len(waypoints),
        )

    def _distance(self, u: np.ndarray, points: Points) -> float:
        """To the nearest training, in log units of the coordinate that differs most."""
        return float(np.abs(points.u - u).max(1).min(initial=np.inf))

    def _check(self, outcome: Outcome) -> None:
        rows, size = len(outcome.errors), self.space.size + 1
        if not rows or np.shape(outcome.features) != (rows, size):
            raise ConfigError(
                f"outcome.features: shape {np.shape(outcome.features)} with {rows} errors; needs [n, {size}] for the "
                f"features ({', '.join((self.space.reference, *self.space.names))}) and at least one snapshot"
            )

    def _learn_from(self, proposal: Proposal, error: float, before: Best | None) -> None:
        """Adapt the radius and the patience to what the proposal brought."""
        if before is None:
            return
        gain = before.error - error if np.isfinite(error) else -np.inf
        if proposal.kind == "learn_loss":
            errors = [training.error for training in self.trainings if training.usable]
            self._fruitless = 0 if gain > SMALLEST_GAIN * np.ptp(errors) else self._fruitless + 1
        if proposal.kind == "model" and proposal.predicted is not None:
            ratio = gain / max(before.error - proposal.predicted, 1e-12)
            if ratio > 0.5:
                self._radius = min(2 * self._radius, LARGEST_RADIUS)
            elif ratio < 0.25:
                self._radius = max(0.4 * self._radius, 0.02)

    def _steps(self) -> list[tuple[float, float]]:
        """Promised and realised decrease of the steps that a model proposed."""
        steps = []
        for index, training in enumerate(self.trainings):
            before = best_of(self.trainings[:index], self.noisy)
            if training.predicted is not None and training.usable and before is not None:
                steps.append((before.error - training.predicted, before.error - training.error))
        return steps


def tune_loss(
    problem: Problem,
    trainings: int,
    *,
    seed: int = 0,
    on_the_fly: bool = True,
    callback: Callable[[TuneLoss], None] | None = None,
) -> TuneLoss:
    """Search with ``trainings`` trainings of ``problem`` in this process; ``callback`` sees the search after each."""
    search = TuneLoss(problem.space, seed=seed, on_the_fly=on_the_fly)
    for _ in range(trainings):
        proposal = search.ask()
        if proposal.kind == "on_the_fly":
            guide = OnTheFly(problem.space, seed)
            weights, outcome = problem.train_on_the_fly(guide.choose, guide.refine)
            search.tell(proposal.identifier, outcome, weights=weights, waypoints=guide.waypoints)
        else:
            search.tell(proposal.identifier, problem.train(proposal.weights))
        if callback is not None:
            callback(search)
    return search
