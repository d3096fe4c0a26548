"""What the benchmark found: docs/performance.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import FiniteFloat

from benchmarks.meta_gradient.contenders import CONTENDERS, OURS
from palf_dist.sections import Count, Section


class Spread(Section):
    """Of the rounds."""

    median: FiniteFloat
    least: FiniteFloat
    most: FiniteFloat

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        found = (np.median(values), np.min(values), np.max(values))
        median, least, most = (float(f"{value:.4g}") for value in found)
        return cls(median=median, least=least, most=most)


class Figures(Section):
    """Of one contender in one case."""

    wall: Spread  # milliseconds of a meta-gradient
    cpu: Spread  # those of all its threads together
    ratio: Spread  # of its CPU time to palf_dist's in the same round
    error32: FiniteFloat  # of the gradient, relative to that of float64 autograd
    error64: FiniteFloat  # as computed in float64
    peak_share: FiniteFloat  # of the measured peak of matrix products
    memory: FiniteFloat | None  # MB at the peak, of the largest case of a workload


class CaseRecord(Section):
    letter: str
    title: str
    tasks: Count
    optimiser: str
    gigaflops: Mapping[str, FiniteFloat]  # of matrix products in a meta-gradient, by adjoint and unroll
    contenders: Mapping[str, Figures]

    @property
    def fastest_library(self) -> str | None:
        of_libraries = {n: f.cpu.median for n, f in self.contenders.items() if CONTENDERS[n].kind == "library"}
        return min(of_libraries, key=of_libraries.__getitem__) if of_libraries else None


class Performance(Section):
    """The file docs/performance.json."""

    cpu: str
    cores: Count
    threads: Count
    python: str
    versions: Mapping[str, str]
    rounds: Count
    matmul_gigaflops: FiniteFloat  # a second: the peak
    missing: Mapping[str, str]  # contenders that are not installed, and the reason
    cases: tuple[CaseRecord, ...]


def ratios(cpu: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Of each contender's times to palf_dist's, round by round."""
    return {
        name: Spread.of([time / ours for time, ours in zip(times, cpu[OURS], strict=True)])
        for name, times in cpu.items()
    }
