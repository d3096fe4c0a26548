"""What tasks do to clean data: label noise and class imbalance."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, softmax

from palf_dist.config import MOST_WRONG

_SPREAD = 1.0
"""Standard deviation, over classes or examples, of the log-odds of a rate's share of ``MOST_WRONG``. That of the rate
is then about .1 where the mean is .2 or .3, and .07 where it is .4; Xia et al. have .1."""


def add_label_noise(
    labels: np.ndarray, kind: str, rate: float, num_classes: int, generator: np.random.Generator
) -> np.ndarray:
    """Noisy copy of ``labels`` [N]; each row is hit with probability ``rate``, whatever it is.

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


def class_transitions(labels: np.ndarray, rate: float, num_classes: int, generator: np.random.Generator) -> np.ndarray:
    """A random transition matrix [k, k]: P(noisy label | label), each row summing to 1.

    Classes differ in how often they are mislabelled, with ``rate`` as the mean over ``labels`` [N], and in what they
    are taken for: the shares of the wrong labels are uniform on the simplex.
    """
    wrong = _rates(generator.standard_normal(num_classes), labels, rate)
    shares = np.zeros((num_classes, num_classes))
    others = ~np.eye(num_classes, dtype=bool)
    shares[others] = generator.dirichlet(np.ones(num_classes - 1), num_classes).reshape(-1)
    return wrong[:, None] * shares + np.diag(1 - wrong)


def instance_transitions(
    labels: np.ndarray, features: np.ndarray, rate: float, num_classes: int, generator: np.random.Generator
) -> np.ndarray:
    """P(noisy label | example) [N, k] for examples with ``labels`` [N] and standardised ``features`` [N, D].

    The construction of Xia et al. (2020), Part-dependent label noise, algorithm 2: an example of class y is mislabelled
    at its own rate, and the wrong labels have the shares softmax(x W_y), W_y random. There the rates are drawn apart
    from x; here they too depend on x, by a random projection, and their mean is ``rate``.
    """
    projection = features @ generator.standard_normal(features.shape[1])
    deviation = projection.std()
    scores = (projection - projection.mean()) / (deviation if deviation > 0 else 1.0)
    wrong = _rates(scores, np.arange(len(labels)), rate)
    scores = np.empty((len(labels), num_classes))
    for y in range(num_classes):  # one W_y at a time: together they can be large
        weights = generator.standard_normal((features.shape[1], num_classes))
        scores[labels == y] = features[labels == y] @ weights
    own = np.arange(num_classes) == labels[:, None]
    return np.where(own, 1 - wrong[:, None], wrong[:, None] * softmax(np.where(own, -np.inf, scores), axis=1))


def draw_labels(transitions: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One label [N] from each row of ``transitions`` [N, k]."""
    edges = transitions.cumsum(1)
    return (generator.random((len(edges), 1)) * edges[:, -1:] >= edges).sum(1)


def _rates(scores: np.ndarray, of_row: np.ndarray, rate: float) -> np.ndarray:
    """Rates below ``MOST_WRONG`` that rise with ``scores`` [M]: the log-odds of their shares of it are ``_SPREAD *
    scores`` plus what makes the mean over rows ``rate``; ``of_row`` [N] says which of them each row has."""
    assert rate < MOST_WRONG, rate
    if rate < 1e-9:  # where log-odds end
        return np.zeros(len(scores))
    share = rate / MOST_WRONG
    scores = _SPREAD * scores
    present = scores[of_row]
    low, high = logit(share) - present.max() - 1, logit(share) - present.min() + 1
    return MOST_WRONG * expit(scores + brentq(lambda offset: expit(present + offset).mean() - share, low, high))


def imbalance_profile(num_classes: int, ratio: float, generator: np.random.Generator) -> np.ndarray:
    """Class frequencies [k] that fall exponentially from the largest to the smallest, ``ratio`` times rarer; which
    class is how frequent is random."""
    exponents = np.linspace(0.0, 1.0, num_classes)
    profile = ratio**-exponents
    return generator.permutation(profile / profile.sum())
