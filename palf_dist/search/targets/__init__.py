"""What a search can tune: loss weights, meta-trainings."""

from __future__ import annotations

from palf_dist.search.targets.config import LossWeightsConfig, MetaTrainingConfig, TargetConfig
from palf_dist.search.targets.loss_weights import LossWeightsTarget
from palf_dist.search.targets.meta_training import MetaTrainingTarget
from palf_dist.search.trial import Target

__all__ = ["LossWeightsConfig", "MetaTrainingConfig", "TargetConfig", "make_target"]


def make_target(config: LossWeightsConfig | MetaTrainingConfig) -> Target:
    """The target of a search, its datasets loaded once and found fit. Raises ConfigError and DataError."""
    target = LossWeightsTarget(config) if isinstance(config, LossWeightsConfig) else MetaTrainingTarget(config)
    target.check()
    return target
