"""Meta-gradient estimators, one file each, behind one protocol."""

from palf_dist.estimators.adjoint import Adjoint, OneStep
from palf_dist.estimators.base import Estimate, Estimator
from palf_dist.estimators.evolution import ES, PES
from palf_dist.estimators.registry import make_estimator
from palf_dist.estimators.unroll import Unroll

__all__ = ["ES", "PES", "Adjoint", "Estimate", "Estimator", "OneStep", "Unroll", "make_estimator"]
