"""The validated configuration of a search: one YAML file <-> one object. Field names are the paths of ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, field_validator

from palf_dist.config import TrackingConfig
from palf_dist.config_loading import RESUMABLE as RUN_RESUMABLE
from palf_dist.config_loading import Path_, config_differences, parse_section, read_config
from palf_dist.search.targets.config import LossWeightsConfig, MetaTrainingConfig, TargetConfig
from palf_dist.sections import Count, Section

SearcherName = Literal["tuneloss", "optuna", "random"]

RESUMABLE = (
    *("trials", "concurrent", "distributed", "tracking", "target.cache"),
    *(f"target.base.{field}" for field in RUN_RESUMABLE if field not in ("checkpoint", "tracking")),
)
"""Fields (or whole sections) that a resumed search may change: none of them touches the result of a trial."""


NOT_LINEAR = (
    "tuneloss searches the weights of a loss that is linear in them, which this target's is not in what it searches; "
    "use optuna"
)


class NoScheduler(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class AshaConfig(Section):
    """Asynchronous successive halving: of the trials that have come equally far, only the best go on."""

    kind: Literal["asha"] = "asha"
    grace: Count = Field(default=1, description="reports that every trial gives before it can be stopped")
    reduction: Annotated[FiniteFloat, Field(strict=True, gt=1)] = Field(
        default=3.0, description="one in so many goes on, for so many times as long"
    )


class PbtConfig(Section):
    """Population based training: all trials are one population, whose worst take over the best's state and vary it."""

    kind: Literal["pbt"] = "pbt"
    every: Count = Field(default=1, description="reports between two comparisons")
    quantile: Annotated[FiniteFloat, Field(strict=True, gt=0, le=0.5)] = Field(
        default=0.25, description="share of the population that is replaced, and that it is replaced by"
    )
    resample: Annotated[FiniteFloat, Field(strict=True, ge=0, le=1)] = Field(
        default=0.25, description="probability that a value is drawn afresh instead of varied"
    )


Scheduler = Annotated[NoScheduler | AshaConfig | PbtConfig, Field(discriminator="kind")]


class SearchClusterConfig(Section):
    address: str | None = Field(default=None, description="none: a private Ray on this machine; auto; HOST:PORT")


class SearchConfig(Section):
    """One search."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "search"
    seed: Annotated[int, Field(strict=True, ge=0)] = 0
    target: TargetConfig
    searcher: SearcherName
    scheduler: Scheduler = NoScheduler()
    trials: Count = Field(default=50, description="trainings in all, those before a resume included")
    concurrent: Count | None = Field(
        default=None,
        description="trials at once; none: 1 with searcher tuneloss, up to 4 with optuna, as many as fit with random",
    )
    distributed: SearchClusterConfig = SearchClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("scheduler", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value


def load_search_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """The validated configuration of a YAML file with ``key=value`` overrides applied.

    Raises ConfigError with one line for every wrong field of the file and of the overrides.
    """
    return parse_section(read_config(path), str(path), overrides, SearchConfig, _cross_checks, [("target", "base")])


def search_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """Fields on which ``new`` differs from the ``old`` configuration so that it cannot resume the search."""
    return config_differences(old, new, RESUMABLE)


def too_few_reports(scheduler: Scheduler, reports: int) -> dict[Path_, str]:
    """What is wrong with a scheduler that acts after more reports than a trial gives before its last."""
    gives = f"a trial of this target gives {reports} report(s)"
    if isinstance(scheduler, AshaConfig) and scheduler.grace >= reports:
        return {
            ("scheduler", "grace"): f"{gives}, so none can be stopped after {scheduler.grace}; name less, or leave "
            "scheduler asha out"
        }
    if isinstance(scheduler, PbtConfig) and scheduler.every >= reports:
        return {
            ("scheduler", "every"): f"{gives}, so none can be compared and go on after {scheduler.every}; name less, "
            "or leave scheduler pbt out"
        }
    return {}


def _cross_checks(config: SearchConfig) -> dict[Path_, str]:
    """What is wrong although every field is right by itself."""
    problems = too_few_reports(config.scheduler, config.target.reports)
    if config.searcher == "tuneloss" and isinstance(config.target, MetaTrainingConfig):
        problems[("searcher",)] = NOT_LINEAR
    if isinstance(config.scheduler, AshaConfig) and config.target.trained_at_once:
        problems[("scheduler",)] = (
            "asha can save nothing with model softmax, which is trained before its first report; leave the scheduler "
            "out, or use a network"
        )
    if isinstance(config.target, LossWeightsConfig) and config.target.on_the_fly and config.searcher != "tuneloss":
        problems["target", "on_the_fly"] = f"is of use to searcher tuneloss only, not to {config.searcher!r}"
    if isinstance(config.scheduler, PbtConfig):
        if config.searcher != "random":
            problems[("searcher",)] = (
                f"must be random with scheduler pbt, which varies trials itself, not {config.searcher!r}"
            )
        if config.target.unchangeable:
            problems[("scheduler",)] = (
                f"pbt cannot change {', '.join(config.target.unchangeable)} in the middle of a training; search other "
                "fields, or use another scheduler"
            )
        if config.concurrent is not None:
            problems[("concurrent",)] = "must be left out with scheduler pbt, whose population takes turns"
        if config.trials < 2:
            problems[("trials",)] = (
                f"must be at least 2 with scheduler pbt, whose population they are, not {config.trials}"
            )
    return problems
