"""Two change points: those that were planted, those that trying all pairs finds, and none where there is a ramp."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from palf_dist.evaluation.change_points import Phases, bent_lines, find_phases, fit, phase_of
from palf_dist.randomness import random_generator

TIMES = np.arange(15) / 15
CLUSTERS = [name for name in "abcdef" for _ in range(4)]


def steps(first: int, second: int, levels: np.ndarray, moments: int = 15) -> np.ndarray:
    """A curve [moments, C] with these three levels [3, C]."""
    return levels[np.digitize(np.arange(moments), [first, second])]


def noisy(curve: np.ndarray, scale: float, *keys: int | str, clusters: list[str] = CLUSTERS) -> np.ndarray:
    """Inner runs about a curve, each off by a bit at each moment, and all of a dataset off as a whole."""
    random = random_generator("noisy", *keys)
    offsets = {name: random.normal(size=curve.shape[1]) for name in sorted(set(clusters))}
    each = curve + scale * random.normal(size=(len(clusters), *curve.shape))
    return each + np.array([offsets[name] for name in clusters])[:, None]


def residual(curve: np.ndarray, design: np.ndarray) -> float:
    coefficients = np.linalg.lstsq(design, curve, rcond=None)[0]
    return float(((curve - design @ coefficients) ** 2).sum())


@given(
    curve=arrays(
        np.float64, st.tuples(st.integers(4, 12), st.integers(1, 3)), elements=st.integers(-12, 12).map(float)
    ),
)
def test_the_fits_are_the_best_of_all(curve: np.ndarray) -> None:
    found = fit(curve, bent_lines(len(curve)))
    total = float(((curve - curve.mean(0)) ** 2).sum())
    if total < 1e-9:
        assert (found.by_phases, found.by_line) == (0, 0)
        return
    time = np.arange(len(curve))
    two = {at: residual(curve, np.eye(2)[(time >= at).astype(int)]) for at in time[1:]}
    assert two[found.only] == pytest.approx(min(two.values()), abs=1e-9 * (1 + total))
    three = {
        (first, second): residual(curve, np.eye(3)[np.digitize(time, [first, second])])
        for first, second in combinations(range(1, len(curve)), 2)
    }
    assert three[found.first, found.second] == pytest.approx(min(three.values()), abs=1e-9 * (1 + total))
    assert total * (1 - found.by_phases) == pytest.approx(min(three.values()), abs=1e-9 * (1 + total))
    bent = min(residual(curve, np.stack([time**0, time, np.maximum(time - at, 0)], 1)) for at in time[1:-1])
    assert total * (1 - found.by_line) == pytest.approx(bent, abs=1e-9 * (1 + total))


@given(
    places=st.lists(st.integers(1, 14), min_size=2, max_size=2, unique=True).map(sorted),
    controls=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_planted_boundaries_are_found(places: list[int], controls: int, seed: int) -> None:
    random = random_generator("levels", seed)
    jumps = random.uniform(1, 2, (3, controls)) * random.choice([-1, 1], (3, controls))
    curve = noisy(steps(*places, jumps.cumsum(0)), 0.2, seed).mean(0)
    found = fit(curve, bent_lines(len(curve)))
    assert [found.first, found.second] == places and found.by_phases > 0.9


@pytest.mark.parametrize(
    ("places", "agree"), [((3, 12), (True, True)), ((6, 12), (False, True)), ((3, 8), (True, False))]
)
def test_phases_of_the_paper_and_others(places: tuple[int, int], agree: tuple[bool, bool]) -> None:
    """Of 15 refreshes the fourth is at 20 % and the thirteenth at 80 % of the run."""
    found = find_phases(noisy(steps(*places, np.array([[0.0], [3.0], [1.0]])), 0.3, "paper"), CLUSTERS, TIMES)
    assert found.boundaries == (TIMES[places[0]], TIMES[places[1]]) and (found.runs, found.clusters) == (24, 6)
    assert found.agree == agree and found.ahead[0] > 0 and found.third[0] > 0.05
    assert found.intervals == (pytest.approx((found.boundaries[0],) * 2), pytest.approx((found.boundaries[1],) * 2))


@pytest.mark.parametrize("bend", [0, 5, 9])
def test_a_ramp_has_no_phases(bend: int) -> None:
    """Two boundaries are found in a gradual change too, but a line explains more."""
    time = np.arange(15.0)
    ramp = np.stack([time - 0.7 * np.maximum(time - bend, 0), -2 * time], 1) / 5
    found = find_phases(noisy(ramp, 0.1, "ramp"), CLUSTERS, TIMES)
    assert 0 < found.boundaries[0] < found.boundaries[1] < 1
    assert found.by_line > 0.99 > 0.95 > found.by_phases and found.ahead[1] < 0


@pytest.mark.parametrize("curve", [steps(3, 12, np.array([[0.0], [3.0], [3.0]])), np.zeros((15, 1))])
def test_a_third_phase_that_is_none_adds_nothing_on_other_datasets(curve: np.ndarray) -> None:
    """Though on the curves that it is fitted to it explains more, of noise."""
    ends = [find_phases(noisy(curve, 0.5, "third", draw), CLUSTERS, TIMES).third for draw in range(10)]
    assert all(low <= 0 for low, _ in ends)


def test_datasets_that_disagree_give_wide_intervals() -> None:
    levels = np.array([[0.0], [4.0], [8.0]])
    curves = np.concatenate(
        [
            noisy(steps(early, 12, levels), 0.1, early, clusters=[name] * 4)
            for name, early in zip("abcdef", (1, 1, 2, 6, 7, 9), strict=True)
        ]
    )
    wide, narrow = (high - low for low, high in find_phases(curves, CLUSTERS, TIMES).intervals)
    assert wide >= 4 / 15 and narrow <= 1 / 15


def test_one_dataset_gives_no_interval_and_a_still_policy_explains_nothing() -> None:
    curve = steps(3, 12, np.array([[0.0], [3.0], [1.0]]))
    alone = find_phases(noisy(curve, 0.1, clusters=["a"] * 5), ["a"] * 5, TIMES)
    assert np.isnan([*alone.intervals, alone.ahead, alone.third]).all() and alone.agree == (False, False)
    still = find_phases(np.ones((24, 15, 2)), CLUSTERS, TIMES)
    assert (still.by_phases, still.by_line, still.ahead) == (0, 0, (0, 0))


def test_equal_curves_give_equal_intervals_whatever_the_names_of_the_datasets() -> None:
    curves = noisy(np.zeros((15, 2)), 1.0, "drawn")
    assert find_phases(curves, CLUSTERS, TIMES) == find_phases(curves, [name.upper() for name in CLUSTERS], TIMES)


@pytest.mark.parametrize(
    ("low", "high", "within"),
    [(0.1, 0.25, False), (0.2, 0.2, True), (0.15, 0.19, False), (0.25, 0.35, True), (0.27, 0.4, False)],
)
def test_a_change_is_seen_at_the_next_refresh(low: float, high: float, within: bool) -> None:
    nothing = (0.0, 0.0)
    found = Phases((0.2, 0.8), (nothing, (0.8, 0.8)), 1 / 15, 1, 1, nothing, nothing, 1, 5)
    assert replace(found, intervals=((low, high), (0.8, 0.8))).agree == (within, True)


def test_the_phase_of_a_moment() -> None:
    assert phase_of(np.array([0, 0.19, 3 * 0.2 / 3, 0.5, 0.8, 0.99])).tolist() == [0, 0, 1, 1, 2, 2]
    assert phase_of(np.arange(0, 150, 10) / 150).tolist() == [0] * 3 + [1] * 9 + [2] * 3
