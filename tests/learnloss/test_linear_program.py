from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from palf_dist.learnloss.linear_program import LinearProgram, minimise
from palf_dist.randomness import random_generator

Box = tuple[np.ndarray, np.ndarray]
SEEDS = st.integers(0, 10**6)


def program(seed: int, size: int, count: int) -> tuple[np.ndarray, Box, np.ndarray, np.ndarray]:
    """Cost, box, rows and bounds; some have no solution."""
    generator = random_generator("program", seed)
    rows = generator.normal(size=(count, size))
    rows /= np.abs(rows).sum(1, keepdims=True)
    bounds = generator.normal(-0.05, 0.1, count)
    return generator.normal(size=size), (np.full(size, 1e-6), np.ones(size)), rows, bounds


def by_scipy(cost: np.ndarray, box: Box, rows: np.ndarray, bounds: np.ndarray) -> float | None:
    answer = linprog(cost, A_ub=-rows, b_ub=-bounds, bounds=np.column_stack(box))
    return float(answer.fun) if answer.success else None


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 9), count=st.integers(1, 60))
def test_generated_rows_give_what_all_rows_give(seed: int, size: int, count: int) -> None:
    cost, box, rows, bounds = program(seed, size, count)
    found, expected = minimise(cost, box, rows, bounds, [], 1e-9), by_scipy(cost, box, rows, bounds)
    assert (found is None) == (expected is None)
    if found is not None:
        assert cost @ found.point == pytest.approx(expected, abs=1e-6)
        assert (rows @ found.point >= bounds - 2e-9).all()
        assert len(set(found.active)) == len(found.active) <= found.solves


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_a_live_program_answers_like_a_new_one(seed: int) -> None:
    """Whatever it solved before: rows added, replaced by as many or by fewer, taken away altogether."""
    cost, box, rows, bounds = program(seed, 5, 20)
    live = LinearProgram(cost, *box)
    live.add(rows[:5], bounds[:5])
    for selected in (slice(0, 5), slice(5, 10), slice(10, 12), slice(0, 0), slice(3, 20)):
        live.replace(rows[selected], bounds[selected])
        for more in (slice(0, 0), slice(0, 2)):
            live.add(rows[more], bounds[more])
            fresh = LinearProgram(cost, *box)
            fresh.add(np.vstack([rows[selected], rows[more]]), np.append(bounds[selected], bounds[more]))
            warm, cold = live.solve(), fresh.solve()
            assert (warm is None) == (cold is None)
            if warm is not None and cold is not None:
                assert warm.value == pytest.approx(cold.value, abs=1e-9)


def test_multipliers_prove_the_optimum() -> None:
    """Weak duality: the multipliers of the rows, with the box, bound the value from below, here to the last digit."""
    cost, box, rows, bounds = program(3, 4, 12)
    live = LinearProgram(cost, *box)
    live.add(rows, bounds)
    optimum = live.solve()
    assert optimum is not None
    assert (optimum.multipliers >= 0).all() and optimum.multipliers.any()
    reduced = cost - optimum.multipliers @ rows
    bound = optimum.multipliers @ bounds + np.minimum(reduced * box[0], reduced * box[1]).sum()
    assert optimum.value == pytest.approx(bound, abs=1e-9)
