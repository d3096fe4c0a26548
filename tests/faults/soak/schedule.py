"""What breaks, in which order, how soon after the last fault and for how long: all from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from palf_dist.randomness import random_generator

GAP_SECONDS = (0.2, 3.0)
LASTING_SECONDS = (1.0, 12.0)
ON_TOP = 0.4
"""Share of the faults that do not wait until the run has recovered from the one before."""


@dataclass(frozen=True)
class Planned:
    """One fault to come."""

    number: int
    kind: str
    on_top: bool  # does not wait for the recovery from the one before
    gap: float  # seconds after that
    seconds: float  # how long it lasts, where it is of a kind that passes
    victim: float  # in [0, 1): which of the workers or nodes that there are then


def schedule(kinds: Sequence[str], seed: int) -> Iterator[Planned]:
    """Endless: round after round with every kind once, in an order of its own."""
    generator = random_generator("soak", seed)
    number = 0
    while True:
        for kind in generator.permutation(sorted(kinds)).tolist():
            number += 1
            yield Planned(
                number,
                kind,
                bool(generator.random() < ON_TOP),
                float(generator.uniform(*GAP_SECONDS)),
                float(generator.uniform(*LASTING_SECONDS)),
                float(generator.random()),
            )
