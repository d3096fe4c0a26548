"""TuneLoss as a searcher of our own searches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from palf_dist.learnloss.records import Outcome, Waypoint
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import TuneLoss
from palf_dist.search.anytime import parameters_used
from palf_dist.search.ledger import TrialRecord
from palf_dist.search.trial import ON_THE_FLY, Parameters
from palf_dist.search.tune_result import TrialReport, outcome_of


class TuneLossSearch:
    """TuneLoss, for a loss that is linear in what is searched."""

    def __init__(self, space: WeightSpace, seed: int, on_the_fly: bool) -> None:
        self._space = space
        self.tune_loss = TuneLoss(space, seed=seed, on_the_fly=on_the_fly)
        self._open: dict[int, int] = {}  # identifiers of proposals

    def suggest(self, number: int) -> Parameters:
        proposal = self.tune_loss.ask()
        self._open[number] = proposal.identifier
        parameters: dict[str, Any] = self._space.named(proposal.weights)
        return {**parameters, ON_THE_FLY: True} if proposal.kind == ON_THE_FLY else parameters

    def adopt(self, record: TrialRecord) -> None:
        self.suggest(record.number)  # whatever it proposes now: it is told the weights that were really used

    def tell(self, record: TrialRecord) -> None:
        identifier = self._open.pop(record.number)
        diverged = record.last is not None and not np.isfinite(record.last.error)
        if record.last is None or (record.ending == "failed" and not diverged):
            self.tune_loss.abandon(identifier)
            return
        outcome = _outcome(record, self._space)
        used = list(parameters_used(record.parameters, record.reports[-1]).values())
        complete = record.ending == "finished" or diverged
        waypoints = [Waypoint.from_state(state) for state in record.reports[-1].waypoints or []]
        self.tune_loss.tell(identifier, outcome, weights=np.array(used), complete=complete, waypoints=waypoints)

    def conclusion(self) -> dict[str, Any]:
        report = self.tune_loss.report()
        return {
            "predicted_gain": report.predicted_gain,
            "realised_gain": report.realised_gain,
            "certificate": None,
            "why_no_certificate": "a bound needs every model that training can give: it is known for finite sets of "
            "models, and for few weights of a strongly convex loss (palf_dist.learnloss.certificates)",
        }


def _outcome(record: TrialRecord, space: WeightSpace) -> Outcome:
    unknown = [float("nan")] * (space.size + 1)  # of a training that diverged
    seen = [
        TrialReport(report.error, report.phi or unknown, report.gradient, report.curvature) for report in record.reports
    ]
    return replace(outcome_of(seen, record.ending == "finished"), cost=int(record.cost))
