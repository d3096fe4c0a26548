"""Who ends trials early: the schedulers of Ray Tune, as a search configures them and as a resumed search needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from palf_dist.errors import ConfigError
from palf_dist.search.config import AshaConfig, PbtConfig, Scheduler
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange
from palf_dist.search.ledger import TrialRecord
from palf_dist.search.trainable import ERROR, STEP, result_of
from palf_dist.search.trial import Target


def make_scheduler(config: Scheduler, target: Target) -> TrialScheduler:
    """The scheduler that the configuration asks for. Raises ConfigError where the target leaves it nothing to do."""
    reports = target.reports()
    if isinstance(config, AshaConfig):
        if config.grace >= reports:
            raise ConfigError(
                f"scheduler.grace: a trial of this target gives {reports} report(s), so none can be stopped after "
                f"{config.grace}; name less, or leave scheduler asha out"
            )
        return AsyncHyperBandScheduler(STEP, ERROR, "min", reports, config.grace, config.reduction)
    if isinstance(config, PbtConfig):
        if config.every >= reports:
            raise ConfigError(
                f"scheduler.every: a trial of this target gives {reports} report(s), so none can be compared and go on "
                f"after {config.every}; name less, or leave scheduler pbt out"
            )
        return Population(config, target.space())
    return FIFOScheduler()


class Population(PopulationBasedTraining):
    """PBT whose trials keep their own number, and which says who took over whose state."""

    def __init__(self, config: PbtConfig, space: Mapping[str, Domain]) -> None:
        super().__init__(
            STEP,
            ERROR,
            "min",
            perturbation_interval=config.every,
            hyperparam_mutations={"parameters": {name: _mutation(domain) for name, domain in space.items()}},
            quantile_fraction=config.quantile,
            resample_probability=config.resample,
            log_config=False,
            require_attrs=False,
        )
        self._space = space
        self._exploited: dict[int, tuple[int, dict[str, Any]]] = {}

    def taken_over(self, number: int) -> tuple[int, dict[str, Any]] | None:
        """(source, parameters) where the trial took over another's state since this was last asked."""
        return self._exploited.pop(number, None)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        number, source = trial.config["number"], trial_to_clone.config["number"]
        # a factor may lead out of the range
        parameters = {name: _within(self._space[name], value) for name, value in config["parameters"].items()}
        self._exploited[number] = (source, parameters)
        return {**config, "number": number, "parameters": parameters}, operations


def _within(domain: Domain, value: Any) -> Any:
    return value if isinstance(domain, Choice) else min(max(value, domain.low), domain.high)


def _mutation(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return list(domain.values)
    if isinstance(domain, IntegerRange):
        return ray.tune.randint(domain.low, domain.high + 1)
    return (ray.tune.loguniform if isinstance(domain, LogRange) else ray.tune.uniform)(domain.low, domain.high)


def replay(scheduler: TrialScheduler, trials: Iterable[TrialRecord]) -> None:
    """Tell a fresh ASHA what an earlier process's trials have reported, so that its rungs are full again.

    PBT compares only trials that are under way, and those report again.
    """
    if not isinstance(scheduler, AsyncHyperBandScheduler):
        return
    for record in trials:
        stub = Trial("", trial_id=record.name, stub=True)
        scheduler.on_trial_add(None, stub)
        for report in record.reports:
            scheduler.on_trial_result(None, stub, result_of(report.step, report.error))
