"""The validated configuration of a search: one YAML file <-> one object. Field names are the paths of ``--set``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, field_validator

from palf_dist.config import Count, Section, TrackingConfig
from palf_dist.config_loading import Path_, config_differences, parse_section, read_config
from palf_dist.search.targets.config import LossWeightsConfig, TargetConfig

SearcherName = Literal["tuneloss", "optuna", "random"]

RESUMABLE = ("trials", "concurrent", "distributed", "tracking", "target.cache")
"""Fields (or whole sections) that a resumed search may change: none of them touches the result of a trial."""


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
    concurrent: Count | None = Field(default=None, description="trials at once; none: as many as fit")
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
    return parse_section(read_config(path), str(path), overrides, SearchConfig, _cross_checks)


def search_differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """Fields on which ``new`` differs from the ``old`` configuration so that it cannot resume the search."""
    return config_differences(old, new, RESUMABLE)


def _cross_checks(config: SearchConfig) -> dict[Path_, str]:
    """What is wrong although every field is right by itself."""
    problems: dict[Path_, str] = {}
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
