"""Estimators by their name in the configuration."""

from __future__ import annotations

from palf_dist.config import EstimatorConfig, OuterLossConfig
from palf_dist.estimators.adjoint import Adjoint, OneStep
from palf_dist.estimators.base import Estimator
from palf_dist.estimators.evolution import ES, PES
from palf_dist.estimators.unroll import Unroll

ESTIMATORS: dict[str, type[Estimator]] = {
    "adjoint": Adjoint,
    "unroll": Unroll,
    "one_step": OneStep,
    "es": ES,
    "pes": PES,
}


def make_estimator(config: EstimatorConfig, outer: OuterLossConfig) -> Estimator:
    return ESTIMATORS[config.kind](config, outer)
