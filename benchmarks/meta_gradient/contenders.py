"""Who computes meta-gradients: palf_dist's adjoint, its batched autograd, and the libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from benchmarks.meta_gradient.workloads import Case, Problem
from palf_dist.compilation import HotPath, check_compiler
from palf_dist.config import EstimatorConfig
from palf_dist.errors import ConfigError
from palf_dist.estimators import make_estimator

Run = Callable[[], np.ndarray]
"""One meta-gradient, float64 [number of policy parameters]."""


@dataclass(frozen=True)
class Contender:
    kind: Literal["own", "library", "jax"]
    load: Callable[[], Callable[[Problem], Run]]
    """Imports what it needs; ImportError where that is not installed."""
    packages: tuple[str, ...] = ()
    products: Literal["adjoint", "unroll"] = "unroll"
    """Whose matrix products it makes, as far as their number goes: the adjoint goes forward twice, and along."""

    def takes(self, case: Case) -> bool:
        """D has a policy and an outer loss that would have to be written for one task alone, for no more to be seen."""
        return self.kind != "library" or not case.workload.real


def _own(kind: Literal["adjoint", "unroll"]) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        estimator, loop = make_estimator(EstimatorConfig(kind=kind), problem.outer), problem.loop
        return lambda: estimator.estimate(loop, problem.phi, loop.start(), loop.steps, (0,)).gradient

    return prepare


def _compiled() -> Callable[[Problem], Run]:
    try:
        check_compiler()
    except ConfigError as error:
        raise ImportError(str(error)) from error

    def prepare(problem: Problem) -> Run:
        estimator, loop = make_estimator(EstimatorConfig(), problem.outer), copy(problem.loop)
        loop.hot = HotPath(loop.parts)
        return lambda: estimator.estimate(loop, problem.phi, loop.start(), loop.steps, (0,)).gradient

    return prepare


def _library(name: Literal["torchopt", "higher", "learn2learn"]) -> Callable[[Problem], Run]:
    from benchmarks.meta_gradient import peers_torch

    unrolled = getattr(peers_torch, f"with_{name}")()
    return lambda problem: peers_torch.prepare(problem, unrolled)


def _jax(mode: Literal["reverse", "adjoint"]) -> Callable[[Problem], Run]:
    from benchmarks.meta_gradient import peers_jax

    return lambda problem: peers_jax.prepare(problem, mode)


OURS, COMPILED, UNROLL = "palf_dist", "palf_dist, compiled", "palf_dist, unroll"
CONTENDERS = {
    OURS: Contender("own", partial(_own, "adjoint"), products="adjoint"),
    COMPILED: Contender("own", _compiled, products="adjoint"),
    UNROLL: Contender("own", partial(_own, "unroll")),
    "TorchOpt": Contender("library", partial(_library, "torchopt"), ("torchopt",)),
    "higher": Contender("library", partial(_library, "higher"), ("higher",)),
    "learn2learn": Contender("library", partial(_library, "learn2learn"), ("learn2learn",)),
    "JAX reverse": Contender("jax", partial(_jax, "reverse"), ("jax", "jaxlib")),
    "JAX adjoint": Contender("jax", partial(_jax, "adjoint"), ("jax", "jaxlib"), products="adjoint"),
}


def missing() -> dict[str, str]:
    """Contenders that are not installed, and the reason."""
    found = {}
    for name, contender in CONTENDERS.items():
        try:
            contender.load()
        except ImportError as error:
            found[name] = str(error)
    return found
