"""The target of a search, as it stands in the search's configuration: what is tuned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from palf_dist import units
from palf_dist.architecture_config import ConvConfig, MLPConfig, ModuleConfig, ResNetConfig, TransformerConfig
from palf_dist.config import DatasetSource, RunConfig
from palf_dist.config_loading import dump_config, leaves, load_config, parse_config
from palf_dist.errors import ConfigError
from palf_dist.learnloss.space import WeightSpace
from palf_dist.search.domains import Choice, Domain
from palf_dist.sections import Count, NonNegative, Positive, Section, Share
from palf_dist.tasks.cache import cache_folder
from palf_dist.types import AVERAGED_BASIS, BASIS_LOSSES

REFERENCE = "ce"
"""The feature whose weight is 1, of every model."""

SOFTMAX_WEIGHTS = {
    "l1": (1e-6, 1e-1),
    "l2": (1e-5, 10.0),
    "label_smoothing": (1e-4, 1.0),
    "logit_penalty": (1e-5, 1.0),
}
L2_PARTS = {"l2_numeric": (1e-5, 10.0), "l2_categorical": (1e-5, 10.0)}
NETWORK_LOSSES = tuple(name for name in BASIS_LOSSES if name not in (REFERENCE, *AVERAGED_BASIS))
"""Basis losses whose weights can be tuned. Those left out are ce without a run's averaged predictions."""
NETWORK_WEIGHTS = dict.fromkeys(("focal", "label_smoothing", "symmetric_ce", "robust_ce"), (0.01, 10.0))
DECAYS = {"sgd": (1e-3, 0.1), "momentum": (0.01, 1.0), "adam": (0.03, 10.0)}
"""Default ranges of the weights; that of a network's weight decay goes by its optimiser."""

FIXED = (
    *("name", "seed", "data", "tasks", "evaluation", "distributed", "checkpoint", "tracking"),
    "meta_learner.outer_steps",
)
"""Fields (or whole sections) of a RunConfig that no search may vary: they say what a trial is measured on, how long it
is, or where it runs."""

INFORMATION_WEIGHT, INFORMATION = "outer_loss.information", ("outer_loss.beta", "outer_loss.gamma")
"""The last two are of use only where the first is not 0."""

CHANGEABLE = ("meta_learner", "outer_loss", "policy.refresh")
"""Fields that may change while a policy is trained; the others make up what a checkpoint of it holds."""


class RowsConfig(Section):
    """How many rows each split has; the classes keep their frequencies. None: a share of what there is."""

    train: Count | None = Field(default=None, description="none: 40 %")
    validation: Count | None = Field(default=None, description="clean rows that e is read on; none: 30 %")
    test: Count | None = Field(default=None, description="clean rows read once, at the end; none: 30 %")


class LabelNoiseConfig(Section):
    """Label noise of the training rows; validation and test rows stay clean."""

    kind: Literal["uniform", "pair_flip"] = "uniform"
    rate: Share = 0.0


class SoftmaxConfig(Section):
    """Softmax regression, trained to convergence."""

    kind: Literal["softmax"] = "softmax"
    max_iterations: Count = 250
    intercept: Annotated[bool, Field(strict=True)] = Field(
        default=True, description="free of l1 and L2; false: none, so that a search of l2 alone ends with a certificate"
    )
    vocabulary: Annotated[int, Field(strict=True, ge=2)] = Field(default=512, description="hash buckets of a text")


Model = Annotated[
    SoftmaxConfig | MLPConfig | ConvConfig | ResNetConfig | TransformerConfig | ModuleConfig,
    Field(discriminator="kind"),
]


class TrainingConfig(Section):
    """How a network is trained."""

    steps: Count = 200
    batch_size: Annotated[int, Field(strict=True, ge=2)] = 32
    optimiser: Literal["sgd", "momentum", "adam"] = "adam"
    learning_rate: Positive = 0.005
    weight_decay: NonNegative = Field(default=0.0, description="where it is not searched; times the learning rate")
    ema: Share = Field(default=0.7, description="decay of each example's averaged prediction, for robust_ce")


class LossWeightsConfig(Section):
    """The loss weights of one dataset and model. The weight of ``ce`` is 1, the others are tuned in log scale."""

    kind: Literal["loss_weights"] = "loss_weights"
    dataset: DatasetSource
    cache: str | None = Field(
        default=None, validate_default=True, description="cache folder; default $PALF_CACHE, else ./.palf_cache"
    )
    max_rows: Count = Field(default=20_000, description="rows kept of a larger dataset (a fixed random sample)")
    model: Model = SoftmaxConfig()
    rows: RowsConfig = RowsConfig()
    label_noise: LabelNoiseConfig = LabelNoiseConfig()
    weights: dict[str, tuple[Positive, Positive]] | None = Field(
        default=None, description="[low, high] of each tuned weight; none: the model's defaults"
    )
    training: TrainingConfig = Field(default=TrainingConfig(), description="of a network")
    snapshots: Count = Field(default=10, description="reports of one training, the last one being the trained model")
    on_the_fly: Annotated[bool, Field(strict=True)] = Field(
        default=False, description="TuneLoss's first trial re-learns its weights while it trains; softmax only"
    )
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @field_validator("dataset", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("dataset")
    @classmethod
    def _found_from_anywhere(cls, value: DatasetSource) -> DatasetSource:
        return absolute(value)

    @field_validator("cache")
    @classmethod
    def _cache_found_from_anywhere(cls, value: str | None) -> str:
        return str(cache_folder(value))

    @model_validator(mode="after")
    def _weights_fit(self) -> LossWeightsConfig:
        known = [*SOFTMAX_WEIGHTS, *L2_PARTS] if self.is_softmax else [*NETWORK_LOSSES, "weight_decay"]
        for name in self.weights or ():
            if name not in known:
                raise ValueError(f"weights.{name}: {self.model.kind} has no such weight; known: {', '.join(known)}")
        if "l2" in self.ranges and L2_PARTS.keys() & self.ranges.keys():
            raise ValueError("weights.l2: weighs all columns; leave it out, or l2_numeric and l2_categorical")
        if self.on_the_fly and not self.is_softmax:
            raise ValueError(f"on_the_fly: {self.model.kind} cannot; use model.kind softmax, or leave it out")
        if "weight_decay" in self.ranges and self.training.weight_decay:
            raise ValueError("training.weight_decay: is searched (weights.weight_decay); leave one of the two out")
        WeightSpace.of(self.ranges, REFERENCE)
        return self

    @property
    def is_softmax(self) -> bool:
        return isinstance(self.model, SoftmaxConfig)

    @property
    def reports(self) -> int:
        """The most that a trial gives: softmax regression may converge in fewer iterations."""
        return self.snapshots if self.is_softmax else min(self.snapshots, self.training.steps)

    @property
    def trained_at_once(self) -> bool:
        """Whether all the work of a trial is done before its first report, so that no scheduler can save any."""
        return self.is_softmax

    @property
    def unchangeable(self) -> list[str]:
        """Weights that cannot change during a training, as pbt would have it: softmax regression has converged before
        its first report."""
        return list(self.ranges) if self.is_softmax else []

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tuned weight -> (low, high)."""
        if self.weights is not None:
            return dict(self.weights)
        if self.is_softmax:
            return SOFTMAX_WEIGHTS
        decay = {} if self.training.weight_decay else {"weight_decay": DECAYS[self.training.optimiser]}
        return NETWORK_WEIGHTS | decay


class MetaTrainingConfig(Section):
    """The outer search: every trial is a meta-training."""

    kind: Literal["meta_training"] = "meta_training"
    base: RunConfig = Field(
        description="configuration of every trial; or the path of its YAML file; or {file: PATH} and what differs"
    )
    space: dict[str, Domain] = Field(min_length=1, description="field path of base -> where its value is looked for")

    @field_validator("base", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        """A path is relative to the folder named in the validation's context: that of the search's own file."""
        changes = {"file": value} if isinstance(value, str) else value
        if not (isinstance(changes, dict) and isinstance(changes.get("file"), str)):
            return value
        path = Path((info.context or {}).get("folder", "."), changes["file"])
        fields = leaves({name: field for name, field in changes.items() if name != "file"})
        try:
            return load_config(path, [f"{name}={json.dumps(field)}" for name, field in fields.items()]).model_dump(
                mode="json"
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("--set: ", "target.base.").replace("--set ", "target.base.")) from None

    @model_validator(mode="after")
    def _space_fits(self) -> MetaTrainingConfig:
        if self.base.distributed.workers == "auto":
            raise ValueError(
                "base.distributed.workers: may not be auto, as every trial sets resources aside for its workers; give "
                "a number, for instance 1: trials run side by side"
            )
        for path, domain in self.space.items():
            if _within(path, FIXED):
                raise ValueError(
                    f"space.{path}: may not be searched, nor may any of {', '.join(FIXED)}: they decide what a trial "
                    "is measured on, how long it is, or where it runs"
                )
            if path in INFORMATION and not self.base.outer_loss.information and INFORMATION_WEIGHT not in self.space:
                raise ValueError(
                    f"space.{path}: has no effect while {INFORMATION_WEIGHT} is 0; set that in base, or search it too"
                )
            try:
                for value in domain.values if isinstance(domain, Choice) else (domain.low, domain.high):
                    self.trial({path: value})
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def reports(self) -> int:
        """One for each selection."""
        return -(-self.base.meta_learner.outer_steps // units.select_every(self.base))

    @property
    def trained_at_once(self) -> bool:
        return False

    @property
    def unchangeable(self) -> list[str]:
        """What is searched here but cannot change while a policy is trained, as pbt would have it."""
        return [path for path in self.space if not _within(path, CHANGEABLE)]

    def trial(self, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of one trial. Raises ConfigError for values that no run may have."""
        overrides = [f"{path}={json.dumps(value)}" for path, value in values.items()]
        untracked = "tracking.enabled=false"  # what there is to track, the search tracks
        try:
            return parse_config(dump_config(self.base), "base", [*overrides, untracked])
        except ConfigError as error:
            raise ConfigError(str(error).replace("--set: ", "space.").replace("--set ", "space.")) from None


def absolute(source: DatasetSource) -> DatasetSource:
    """The source as processes with another working folder find it."""
    if source.path is None or "://" in source.path:
        return source
    return source.model_copy(update={"path": str(cache_folder(source.path))})


def _within(path: str, fields: Sequence[str]) -> bool:
    return any(path == field or path.startswith(field + ".") for field in fields)


TargetConfig = Annotated[LossWeightsConfig | MetaTrainingConfig, Field(discriminator="kind")]
