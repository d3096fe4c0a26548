"""What tasks do to clean data: label noise and class imbalance."""

from __future__ import annotations

import numpy as np


def add_label_noise(
    labels: np.ndarray, kind: str, rate: float, num_classes: int, generator: np.random.Generator
) -> np.ndarray:
    """Noisy copy of ``labels`` [N]; each row is hit with probability ``rate``.

    ``uniform`` resamples a hit label over all classes, the true one included: a share 1 - rate (1 - 1/k) stays right.
    ``pair_flip`` moves a hit label y to y + 1 mod k.
    """
    hit = generator.random(len(labels)) < rate
    if kind == "uniform":
        wrong = generator.integers(num_classes, size=len(labels))
    else:
        assert kind == "pair_flip", kind
        wrong = (labels + 1) % num_classes
    return np.where(hit, wrong, labels)


def imbalance_profile(num_classes: int, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """Class frequencies [k] that fall exponentially from the largest to the smallest, ``ratio`` times rarer; which
    class is how frequent is random."""
    exponents = np.linspace(0.0, 1.0, num_classes)
    profile = ratio**-exponents
    return generator.permutation(profile / profile.sum())
