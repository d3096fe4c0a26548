"""The loss weights that are tuned, and where they are looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from palf_dist.errors import ConfigError


@dataclass(frozen=True)
class WeightSpace:
    """The set F of a loss l_lambda(theta) = lambda . phi(theta), lambda = (1, lambda_1 .. lambda_k).

    The first feature is the reference: its weight is fixed at 1. The others lie in [low, high] and are searched in log
    scale: u = log(lambda_1 .. lambda_k) [k]. K = k + 1 features in all.
    """

    reference: str  # name of the feature whose weight is 1
    names: tuple[str, ...]  # [k] of the tuned features
    low: np.ndarray  # [k] > 0
    high: np.ndarray  # [k] > low

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", np.array(self.low, float))
        object.__setattr__(self, "high", np.array(self.high, float))
        if not self.names:
            raise ConfigError("weights: none is named; name at least one loss weight to tune")
        if len({self.reference, *self.names}) != len(self.names) + 1:
            raise ConfigError(f"weights: {', '.join((self.reference, *self.names))}: a feature is named twice")
        for name, low, high in zip(self.names, self.low, self.high, strict=True):
            if not (np.isfinite(high) and 0 < low < high):
                raise ConfigError(f"weights.{name}: [{low:g}, {high:g}] is no interval with 0 < low < high < infinity")

    @classmethod
    def of(cls, ranges: Mapping[str, Sequence[float]], reference: str) -> WeightSpace:
        """From ``{name: (low, high)}``. Raises ConfigError for what is no such pair of numbers."""
        for name, pair in ranges.items():
            numbers = isinstance(pair, Sequence | np.ndarray) and len(pair) == 2
            if not numbers or not all(isinstance(bound, float | int | np.number) for bound in pair):
                raise ConfigError(f"weights.{name}: {pair!r} given; needs a pair of numbers (low, high)")
        low, high = zip(*ranges.values(), strict=True) if ranges else ((), ())
        return cls(reference, tuple(ranges), np.array(low), np.array(high))

    @property
    def size(self) -> int:
        """k, the number of tuned weights."""
        return len(self.names)

    @property
    def log_low(self) -> np.ndarray:
        return np.log(self.low)

    @property
    def log_high(self) -> np.ndarray:
        return np.log(self.high)

    @property
    def centre(self) -> np.ndarray:
        """u [k] in the middle of the box."""
        return 0.5 * (self.log_low + self.log_high)

    def clip(self, u: np.ndarray) -> np.ndarray:
        """The nearest u [..., k] in the box."""
        return np.clip(u, self.log_low, self.log_high)

    def weights(self, u: np.ndarray) -> np.ndarray:
        """lambda_1 .. lambda_k [..., k] of u; within [low, high] to the last bit."""
        return np.clip(np.exp(u), self.low, self.high)

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """u [count, k], uniform in the box."""
        return generator.uniform(self.log_low, self.log_high, (count, self.size))

    def named(self, weights: np.ndarray) -> dict[str, float]:
        """Weights [k] by name."""
        return dict(zip(self.names, np.asarray(weights, float).tolist(), strict=True))
