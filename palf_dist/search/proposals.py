"""Who proposes the parameters of the next trial, and how an earlier process's trials are told to a fresh searcher.

No searcher saves anything: its state after a restart is what the ledger makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import optuna

from palf_dist.randomness import random_generator
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange
from palf_dist.search.ledger import TrialRecord
from palf_dist.search.trial import Parameters


class Searcher(Protocol):
    """Proposes parameters. Any number of trials may be in flight."""

    def suggest(self, number: int) -> Parameters:
        """Parameters of the new trial ``number``."""
        ...

    def adopt(self, record: TrialRecord) -> None:
        """Take over a trial of an earlier process, as if it had been suggested here; called in the order of numbers,
        before anything else."""
        ...

    def tell(self, record: TrialRecord) -> None:
        """A trial has ended."""
        ...

    def conclusion(self) -> dict[str, Any]:
        """What there is to say at the end of the search, as plain data."""
        ...


class RandomSearcher:
    """Draws that depend on the seed and the trial's number alone, so there is nothing to take over or to be told."""

    def __init__(self, space: Mapping[str, Domain], seed: int) -> None:
        self._space, self._seed = space, seed

    def suggest(self, number: int) -> Parameters:
        return {
            name: domain.sample(random_generator(self._seed, "search", number, name))
            for name, domain in self._space.items()
        }

    def adopt(self, record: TrialRecord) -> None:
        pass

    def tell(self, record: TrialRecord) -> None:
        pass

    def conclusion(self) -> dict[str, Any]:
        return {"certificate": None, "why_no_certificate": "random search proves nothing"}


class OptunaSearcher:
    """Optuna's TPE. A trial that a scheduler stopped counts as pruned, one that failed is left out."""

    def __init__(self, space: Mapping[str, Domain], seed: int, known: int) -> None:
        """``known``: trials of earlier processes; the sampler must not draw again what it drew for them."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        drawn = random_generator(seed, "optuna", known).integers(2**32)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=int(drawn)))
        self._distributions = {name: _distribution(domain) for name, domain in space.items()}
        self._open: dict[int, optuna.Trial] = {}

    def suggest(self, number: int) -> Parameters:
        self._open[number] = trial = self._study.ask(self._distributions)
        return dict(trial.params)

    def adopt(self, record: TrialRecord) -> None:
        self._study.enqueue_trial(dict(record.parameters))
        self.suggest(record.number)

    def tell(self, record: TrialRecord) -> None:
        trial = self._open.pop(record.number)
        finite = record.last is not None and np.isfinite(record.last.error)
        if record.ending == "failed" or not finite:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif record.ending == "stopped":
            for report in record.reports:
                trial.report(report.error, report.step)
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            assert record.last is not None
            self._study.tell(trial, record.last.error)

    def conclusion(self) -> dict[str, Any]:
        return {"certificate": None, "why_no_certificate": "TPE proves nothing"}


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(domain.values)
    if isinstance(domain, IntegerRange):
        return optuna.distributions.IntDistribution(domain.low, domain.high)
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogRange))
