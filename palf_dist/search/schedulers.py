"""Who ends trials early: the schedulers of Ray Tune, as a search configures them and as a resumed search needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from palf_dist.errors import ConfigError
from palf_dist.search.config import AshaConfig, PbtConfig, Scheduler, too_few_reports
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange
from palf_dist.search.ledger import TrialRecord
from palf_dist.search.trainable import ERROR, STEP, result_of
from palf_dist.search.trial import Target


def make_scheduler(config: Scheduler, target: Target) -> TrialScheduler:
    """The scheduler that the configuration asks for. Raises ConfigError where the target leaves it nothing to do."""
    reports = target.reports()
    for where, problem in too_few_reports(config, reports).items():
        raise ConfigError(f"{'.'.join(map(str, where))}: {problem}")
    if isinstance(config, AshaConfig):
        return AsyncHyperBandScheduler(STEP, ERROR, "min", reports, config.grace, config.reduction)
    if isinstance(config, PbtConfig):
        return Population(config, target.space())
    return FIFOScheduler()


class TakeOver(NamedTuple):
    """What a trial of a population took over from another one."""

    source: int
    parameters: dict[str, Any]  # varied
    checkpoint: Path  # of the source's state


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
        self._exploited: dict[int, TakeOver] = {}

    def taken_over(self, number: int) -> TakeOver | None:
        """What the trial took over since this was last asked; it does not run before it was asked."""
        return self._exploited.pop(number, None)

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)
        checkpoint = Path(self._trial_state[trial_to_clone].last_checkpoint.path)
        source, number = trial_to_clone.config["number"], trial.config["number"]
        self._exploited[number] = TakeOver(source, trial.config["parameters"], checkpoint)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        # a factor may lead out of the range
        parameters = {name: _within(self._space[name], value) for name, value in config["parameters"].items()}
        return {**config, "number": trial.config["number"], "parameters": parameters}, operations


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
