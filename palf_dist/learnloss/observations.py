"""Everything the trainings have shown so far: the pairs (phi_j, e_j) that LearnLoss reasons about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_USABLE = 1e100  # beyond it a snapshot has diverged, and differences of features times weights may overflow


class Observations:
    """Snapshots of all trainings in the order in which they came: the index of an observation never changes.

    The buffers double when they are full, so that adding is cheap however many there are.
    """

    def __init__(self) -> None:
        self.dropped = 0  # snapshots refused because something in them was not finite (or beyond 1e100)
        self._count = 0
        self._values = np.empty((0, 1))  # the features, then the error
        self._trainings = np.empty(0, np.int64)
        self._finals = np.empty(0, bool)
        self._rows = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._count

    @property
    def features(self) -> np.ndarray:
        """phi [N, K], the reference first (a view, as the others: do not write to it)."""
        return self._values[: self._count, :-1]

    @property
    def errors(self) -> np.ndarray:
        """Validation errors e [N], to be minimised."""
        return self._values[: self._count, -1]

    @property
    def trainings(self) -> np.ndarray:
        """Which training [N] each comes from."""
        return self._trainings[: self._count]

    @property
    def finals(self) -> np.ndarray:
        """Whether [N] it is the model a training ended with, rather than a snapshot on the way."""
        return self._finals[: self._count]

    @property
    def rows(self) -> np.ndarray:
        """Which snapshot [N] of its training each is, those that were dropped counted too."""
        return self._rows[: self._count]

    def add(self, features: ArrayLike, errors: ArrayLike, training: int, final_last: bool) -> int:
        """Add the snapshots of one training: features [n, K], errors [n]; ``final_last`` says that the last one is the
        trained model. Snapshots that are not finite are left out and counted in ``dropped``. Returns how many were
        added."""
        values = np.column_stack([np.asarray(features, float), np.asarray(errors, float)])
        finals = np.zeros(len(values), bool)
        finals[-1:] = final_last
        usable = (np.abs(values) <= _USABLE).all(1)  # False for NaN too
        added = int(usable.sum())
        self.dropped += len(values) - added
        if added:
            self._append(values[usable], np.full(added, training), finals[usable], np.flatnonzero(usable))
        return added

    def _append(self, values: np.ndarray, trainings: np.ndarray, finals: np.ndarray, rows: np.ndarray) -> None:
        start, end = self._count, self._count + len(values)
        if end > len(self._values):
            self._values = _longer(self._values[:start], max(64, 2 * end), values.shape[1])
            self._trainings = _longer(self._trainings[:start], len(self._values))
            self._finals = _longer(self._finals[:start], len(self._values))
            self._rows = _longer(self._rows[:start], len(self._values))
        self._values[start:end], self._trainings[start:end] = values, trainings
        self._finals[start:end], self._rows[start:end] = finals, rows
        self._count = end

    def state(self) -> dict[str, Any]:
        """All of it as plain lists and numbers; JSON keeps every bit of them."""
        return {
            "features": self.features.tolist(),
            "errors": self.errors.tolist(),
            "trainings": self.trainings.tolist(),
            "finals": self.finals.tolist(),
            "rows": self.rows.tolist(),
            "dropped": self.dropped,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Observations:
        """What ``state`` returned."""
        observations = cls()
        if state["errors"]:
            values = np.column_stack([np.array(state["features"], float), np.array(state["errors"], float)])
            trainings, rows = (np.array(state[name], np.int64) for name in ("trainings", "rows"))
            observations._append(values, trainings, np.array(state["finals"], bool), rows)
        observations.dropped = int(state["dropped"])
        return observations


def _longer(column: np.ndarray, room: int, *width: int) -> np.ndarray:
    """``column`` with room for more rows; the first that comes decides how wide they are."""
    assert not len(column) or column.shape[1:] == width, "the number of features may not change"
    longer = np.empty((room, *width), column.dtype)
    longer[: len(column)] = column.reshape(-1, *width)
    return longer
