"""A small linear program whose rows come one by one: HiGHS with the model and its basis kept between solves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

FEASIBILITY = 1e-10  # the smallest tolerance that HiGHS takes; rows and variables are scaled to about 1


@dataclass(frozen=True)
class Optimum:
    """Where a linear program is smallest."""

    point: np.ndarray  # [n]
    value: float
    multipliers: np.ndarray  # [m] >= 0, of the rows in the order they were added


class LinearProgram:
    """min cost . x subject to low <= x <= high and rows x >= bounds, for few variables n and a growing set of rows."""

    def __init__(self, cost: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        self._columns = np.arange(len(cost), dtype=np.int32)
        self._highs = highspy.Highs()
        for option, value in (
            ("output_flag", False),
            ("presolve", "off"),  # the models are tiny and live: presolve only forgets the basis
            ("primal_feasibility_tolerance", FEASIBILITY),
            ("dual_feasibility_tolerance", FEASIBILITY),
            ("small_matrix_value", 1e-12),  # coefficients below it count as 0; the default 1e-9 is too coarse here
        ):
            self._highs.setOptionValue(option, value)
        self._highs.addVars(len(cost), np.asarray(low, float), np.asarray(high, float))
        self._highs.changeColsCost(len(cost), self._columns, np.asarray(cost, float))

    def add(self, rows: np.ndarray, bounds: np.ndarray) -> None:
        """More constraints rows [m, n] x >= bounds [m]; the next solve starts from the last basis."""
        count, width = rows.shape
        self._highs.addRows(
            count,
            np.ascontiguousarray(bounds, float),
            np.full(count, highspy.kHighsInf),
            rows.size,
            np.arange(0, rows.size, width, dtype=np.int32),
            np.tile(self._columns, count),
            np.ascontiguousarray(rows, float).ravel(),
        )

    def replace(self, rows: np.ndarray, bounds: np.ndarray) -> None:
        """Other constraints in place of all there are, taken to be similar: the basis is kept as far as it goes."""
        old, count = self._highs.getBasis(), self._highs.getNumRow()
        self._highs.deleteRows(count, np.arange(count, dtype=np.int32))
        self.add(rows, bounds)
        if old.valid and count == len(rows):
            self._highs.setBasis(old)

    def solve(self) -> Optimum | None:
        """The optimum; None when no x satisfies the constraints, or their sizes are too far apart to tell."""
        self._highs.run()
        if self._highs.getModelStatus() not in _ANSWERS:  # numerical trouble on the way from the last basis
            self._highs.clearSolver()
            self._highs.run()
        if self._highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution = self._highs.getSolution()
        return Optimum(
            np.array(solution.col_value),
            self._highs.getObjectiveValue(),
            np.maximum(np.array(solution.row_dual), 0.0),
        )


_ANSWERS = (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible)


@dataclass(frozen=True)
class Generated:
    """The optimum of a linear program with many rows, of which few matter."""

    point: np.ndarray  # [n]
    active: list[int]  # the rows that were ever added
    solves: int


def minimise(
    cost: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    bounds: np.ndarray,
    start: Sequence[int],
    tolerance: float,
) -> Generated | None:
    """min cost . x subject to box[0] <= x <= box[1] and all of rows [N, n] x >= bounds [N], by constraint generation:
    solve with the rows ``start``, add the most violated of all rows, and again, until none is violated by more than
    ``tolerance``. None where ``LinearProgram.solve`` finds none."""
    program, active = LinearProgram(cost, *box), list(start)
    program.add(rows[active], bounds[active])
    solves = 0
    while True:
        optimum = program.solve()
        solves += 1
        if optimum is None:
            return None
        slack = rows @ optimum.point - bounds
        worst = int(slack.argmin())
        if slack[worst] >= -tolerance or worst in active:
            return Generated(optimum.point, active, solves)
        active.append(worst)
        program.add(rows[worst : worst + 1], bounds[worst : worst + 1])
