"""The domains of what is searched: as they stand in a configuration, and how a value is drawn from them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from palf_dist.sections import Positive, Section


class _Interval(Section):
    """Bounds that both belong to it."""

    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="after")
    def _order(self) -> _Interval:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class LogRange(_Interval):
    """Real numbers, uniform in log scale."""

    kind: Literal["log"] = "log"
    low: Positive
    high: Positive

    def sample(self, generator: np.random.Generator) -> float:
        drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)


class UniformRange(_Interval):
    """Real numbers, uniform."""

    kind: Literal["uniform"] = "uniform"

    def sample(self, generator: np.random.Generator) -> float:
        return float(generator.uniform(self.low, self.high))


class IntegerRange(_Interval):
    """Whole numbers, uniform."""

    kind: Literal["integer"] = "integer"
    low: Annotated[int, Field(strict=True)]
    high: Annotated[int, Field(strict=True)]

    def sample(self, generator: np.random.Generator) -> int:
        return int(generator.integers(self.low, self.high, endpoint=True))


class Choice(Section):
    """One of a few values, which have no order."""

    kind: Literal["choice"] = "choice"
    values: tuple[bool | int | float | str, ...] = Field(min_length=2)

    def sample(self, generator: np.random.Generator) -> Any:
        return self.values[generator.integers(len(self.values))]


Domain = Annotated[LogRange | UniformRange | IntegerRange | Choice, Field(discriminator="kind")]
"""What one searched value may be."""
