"""Clustered errors, tests and intervals against independent computations."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palf_dist.evaluation.inference import bootstrap_interval, clustered_mean, holm
from palf_dist.randomness import random_generator

finite = st.floats(-100, 100, allow_nan=False)
clustered = st.lists(st.tuples(finite, st.sampled_from("abcdefg")), min_size=1, max_size=40)


def sandwich(values, names):
    """Independent: least squares on a constant with the CR1 covariance, written as matrices (for one regressor the
    factor (N-1)/(N-k) is one, so CR1 is G/(G-1) times bread . meat . bread)."""
    design = np.ones((len(values), 1))
    beta, *_ = np.linalg.lstsq(design, values, rcond=None)
    residual = values - design @ beta
    bread = np.linalg.inv(design.T @ design)
    groups = sorted(set(names))
    member = np.array([[name == group for name in names] for group in groups], dtype=float)
    scores = member @ (design * residual[:, None])
    return float(np.sqrt(len(groups) / (len(groups) - 1) * (bread @ scores.T @ scores @ bread)[0, 0]))


@given(clustered)
def test_clustered_error_is_the_sandwich_estimator(pairs):
    values, names = np.array([value for value, _ in pairs]), [name for _, name in pairs]
    estimate = clustered_mean(values, names)
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-9)
    assert (estimate.tasks, estimate.clusters) == (len(values), len(set(names)))
    if len(set(names)) == 1:
        assert math.isnan(estimate.se) and math.isnan(estimate.low) and math.isnan(estimate.high)
    else:
        assert estimate.se == pytest.approx(sandwich(values, names), rel=1e-9, abs=1e-9)


@given(st.lists(finite, min_size=2, max_size=30))
def test_one_task_per_dataset_is_the_ordinary_standard_error_and_t_interval(values):
    estimate = clustered_mean(values, range(len(values)))
    assert estimate.se == pytest.approx(stats.sem(values), rel=1e-9, abs=1e-9)
    if estimate.se > 1e-6:
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(interval), rel=1e-9, abs=1e-9)


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2, max_size=8))
def test_with_equal_clusters_it_is_the_delete_one_cluster_jackknife(groups):
    values = np.array(groups)
    left_out = np.array([np.delete(values, g, axis=0).mean() for g in range(len(values))])
    jackknife = math.sqrt((len(values) - 1) / len(values) * ((left_out - left_out.mean()) ** 2).sum())
    names = np.repeat(np.arange(len(values)), 3)
    assert clustered_mean(values.ravel(), list(names)).se == pytest.approx(jackknife, rel=1e-7, abs=1e-7)


@given(clustered, st.floats(-50, 50), st.floats(-3, 3), st.randoms())
def test_shift_scale_and_order(pairs, shift, scale, random):
    before = clustered_mean([value for value, _ in pairs], [name for _, name in pairs])
    random.shuffle(pairs)
    after = clustered_mean([scale * value + shift for value, _ in pairs], [name for _, name in pairs])
    assert after.mean == pytest.approx(scale * before.mean + shift, abs=1e-7)
    assert after.se == pytest.approx(abs(scale) * before.se, abs=1e-7, nan_ok=True)


def test_the_interval_covers_and_the_unclustered_one_does_not():
    """10 datasets of 12 tasks with a shared effect. Of 2,000 intervals 95 % should hold the truth: the count is
    binomial (standard deviation 9.7), so leaving 95 +- 2.2 % by chance has a probability below 1e-5; 1,000 normal
    data sets lie well outside where the error is not clustered."""
    random = random_generator("coverage")
    datasets, tasks, runs = 10, 12, 2000
    values = random.normal(size=(runs, datasets, 1)) + random.normal(size=(runs, datasets, tasks))
    names = list(np.repeat(np.arange(datasets), tasks))
    clustered_hits = plain_hits = 0
    for sample in values:
        estimate = clustered_mean(sample.ravel(), names)
        clustered_hits += estimate.low <= 0 <= estimate.high
        plain = clustered_mean(sample.ravel(), range(sample.size))
        plain_hits += plain.low <= 0 <= plain.high
    assert abs(clustered_hits / runs - 0.95) < 0.022
    assert plain_hits / runs < 0.7


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=2, max_size=8))
def test_with_equal_clusters_the_test_is_that_of_their_means(groups):
    """scipy's one-sample t test of one mean per dataset."""
    values = np.array(groups)
    estimate = clustered_mean(values.ravel(), [*np.repeat(np.arange(len(values)), 3)])
    if estimate.se > 1e-6:
        assert estimate.p == pytest.approx(stats.ttest_1samp(values.mean(1), 0).pvalue, rel=1e-6, abs=1e-12)


def test_without_any_variation_the_test_is_certain():
    assert clustered_mean([0.0, 0.0], "ab").p == 1
    assert clustered_mean([0.5, 0.5], "ab").p == 0
    assert math.isnan(clustered_mean([0.5, 0.5], "aa").p)


def test_holm_known_answer():
    """R: p.adjust(c(.01, .04, .03, .005), "holm")."""
    got = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "none": math.nan})
    assert got == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "none": math.nan}, nan_ok=True)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1), min_size=1))
def test_holm_is_the_closure_of_bonferroni(p):
    """A hypothesis is rejected where every set of hypotheses that holds it is, by Bonferroni's test of that set."""
    closed = {
        name: max(
            min(1.0, size * min(p[each] for each in chosen))
            for size in range(1, len(p) + 1)
            for chosen in combinations(p, size)
            if name in chosen
        )
        for name in p
    }
    assert holm(p) == pytest.approx(closed)


@given(st.permutations([2.0, -1.0, 5.5]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_of_three_datasets_the_bootstrap_gives_the_extremes(means, first, second, third):
    """One dataset three times over is drawn with probability 1/27 = 3.7 %, more than the 2.5 % beyond either end. Tasks
    of a dataset stay together, however many they are."""
    sizes = [first, second, third]
    values = [
        mean + offset for mean, size in zip(means, sizes, strict=True) for offset in np.arange(size) - (size - 1) / 2
    ]
    names = np.repeat([0, 1, 2], sizes).tolist()
    assert bootstrap_interval(values, names) == pytest.approx((-1.0, 5.5))


def test_a_dataset_weighs_as_many_tasks_as_it_has():
    """Of four datasets the one with five tasks, all 10, is drawn k times with probability binomial(4, 1/4): up to twice
    in 94.9 %, up to three times in 99.6 %. So the upper end is at k = 3: 3 * 5 * 10 / (3 * 5 + 1)."""
    values, names = [0.0, 0.0, 0.0, *[10.0] * 5], [0, 1, 2, *[3] * 5]
    assert bootstrap_interval(values, names) == pytest.approx((0, 150 / 16))


def test_of_many_datasets_the_bootstrap_is_near_the_t_interval():
    values = random_generator("bootstrap", "many").normal(3, 2, size=(100, 4)) + np.linspace(-3, 3, 100)[:, None]
    names = np.repeat(np.arange(100), 4).tolist()
    low, high = bootstrap_interval(values.ravel(), names)
    estimate = clustered_mean(values.ravel(), names)
    assert (low, high) == pytest.approx((estimate.low, estimate.high), abs=0.1 * (estimate.high - estimate.low))
    plain = clustered_mean(values.ravel(), range(400))
    assert high - low > 1.3 * (plain.high - plain.low)


def test_one_dataset_has_no_bootstrap_interval():
    assert all(map(math.isnan, bootstrap_interval([1.0, 2.0], "aa")))
    assert all(map(math.isnan, bootstrap_interval([], "")))
    assert bootstrap_interval([1.0, 1.0], "ab") == (1, 1)
