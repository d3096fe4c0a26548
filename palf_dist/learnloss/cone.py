"""The weights that make one observation the minimiser of the loss, and proofs that there are none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-9  # of the scale-invariant margin: rounding, not a setting
_RESOLUTION = 1e-11  # features that differ by less than this, relatively, are equal: the rest is rounding


class Cone:
    """The weights for which observation i is a minimiser: {lambda in F : lambda . (phi_j - phi_i) >= 0 for all j}, in
    the variables x = lambda / high, so that each is between low / high and 1.

    Each row j is divided by n_j = |d_0| + sum_k |d_k| high_k, d = phi_j - phi_i, the most it can be over the box: the
    margins are in [-1, 1] whatever the units of the features. Rows of equal features say nothing (0 >= 0); nor may
    snapshots at the end of a training that differ by rounding alone, or the rounding would choose the weights.
    """

    def __init__(self, scaled: np.ndarray, i: int) -> None:
        """``scaled`` [N, K] are the features times (1, high)."""
        self.differences = scaled - scaled[i]
        self.norms = _norms(self.differences)  # n [N]; 0 for i itself and its equals
        same = self.norms <= _RESOLUTION * _norms(scaled[i : i + 1])
        self.differences[same] = self.norms[same] = 0.0
        self._inverse = 1.0 / np.where(self.norms > 0, self.norms, 1.0)

    def margins(self, x: np.ndarray) -> np.ndarray:
        """[N] of every row at x [k]; negative where violated."""
        return (self.differences[:, 0] + self.differences[:, 1:] @ x) * self._inverse

    def rows(self, slopes: np.ndarray, index: slice | list[int] = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Constraints rows [n, k + 1] (x, t) >= bounds [n]: the margin of j is at least slopes [N] times t."""
        normalised = self.differences[index] * self._inverse[index, None]
        return np.column_stack([normalised[:, 1:], -slopes[index]]), -normalised[:, 0]


@dataclass(frozen=True)
class Witness:
    """A convex combination of observations: whatever lies above it for every lambda in F is no minimiser for any."""

    point: np.ndarray  # [K] in scaled features
    radius: float  # mean distance of the combined observations from it, in the norm of the rows

    @classmethod
    def of(cls, scaled: np.ndarray, shares: np.ndarray) -> Witness:
        """The combination of ``scaled`` [n, K] in the proportions ``shares`` [n] >= 0."""
        shares = shares / shares.sum()
        point = shares @ scaled
        return cls(point, float(shares @ _norms(scaled - point)))

    def beats(self, scaled: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Which rows of ``scaled`` [n, K] it proves to be dead; ``low`` [k] are the least x.

        The margin t of a row phi obeys t sum_j w_j n_j <= lambda . (mixture - phi) for the combined observations j, and
        n_j <= (distance of j from the mixture) + |phi - mixture|.
        """
        differences = scaled - self.point
        sizes = np.abs(differences)
        # the least of d x over low <= x <= 1 is (d (1 + low) - |d| (1 - low)) / 2
        lead = differences @ np.r_[1.0, 0.5 + 0.5 * low] - sizes @ np.r_[0.0, 0.5 - 0.5 * low]
        equal = _RESOLUTION * np.abs(self.point).sum()
        return lead > equal + TOLERANCE * (self.radius + sizes @ np.ones(len(self.point)))


def _norms(differences: np.ndarray) -> np.ndarray:
    return np.abs(differences) @ np.ones(differences.shape[1])
