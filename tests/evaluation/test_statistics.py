"""Clustered standard errors against independent computations, and the pairing of tasks."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palf_dist.evaluation.statistics import clustered_mean, compare
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


def row(method, accuracy, dataset="iris", noise_rate=0.0, condition="balanced", seed=0, architecture=0):
    return {
        "method": method,
        "dataset": dataset,
        "architecture": architecture,
        "noise_rate": noise_rate,
        "condition": condition,
        "seed": seed,
        "accuracy": accuracy,
    }


def by_method(rows):
    return {item.method: item for item in compare(rows)}


def test_differences_are_paired_and_in_points():
    rows = [row("ce", 0.5), row("ce", 0.9, "wine"), row("s5", 0.95, "wine"), row("s5", 0.6)]
    s5 = by_method(rows)["s5"]
    assert s5.overall.accuracy == pytest.approx(77.5)
    assert s5.overall.difference.mean == pytest.approx(7.5)
    assert s5.overall.difference.se == pytest.approx(2.5)
    assert (s5.overall.difference.low, s5.overall.difference.high) == pytest.approx(
        (7.5 - 12.706 * 2.5, 7.5 + 12.706 * 2.5), abs=1e-2
    )
    assert (s5.overall.difference.tasks, s5.overall.difference.clusters) == (2, 2)


@pytest.mark.parametrize(
    "column, value",
    [("dataset", "wine"), ("noise_rate", 0.3), ("condition", "matched"), ("seed", 1), ("architecture", 1)],
)
def test_tasks_that_differ_in_any_key_are_never_paired(column, value):
    s5 = by_method([row("ce", 0.5), row("s5", 0.6, **{column: value})])["s5"]
    assert s5.overall.difference.tasks == 0
    assert s5.missing == 2  # each of the two tasks lacks one side
    assert math.isnan(s5.overall.difference.mean) and math.isnan(s5.overall.accuracy)


def test_slices_hold_their_own_tasks():
    rows = []
    for dataset in ("iris", "wine"):
        for rate in (0.3, 0.0):
            for condition in ("shifted", "balanced"):
                rows.append(row("ce", 0.5, dataset, rate, condition))
                gain = rate / 10 + (0.02 if condition == "shifted" else 0) + (0.001 if dataset == "wine" else 0)
                rows.append(row("s5", 0.5 + gain, dataset, rate, condition))
    s5 = by_method(rows)["s5"]
    assert {rate: part.difference.mean for rate, part in s5.by_noise.items()} == pytest.approx({0.0: 1.05, 0.3: 4.05})
    assert list(s5.by_condition) == ["balanced", "shifted"]
    assert s5.by_condition["shifted"].difference.mean == pytest.approx(3.55)
    assert s5.by_cell["balanced", 0.3].difference.mean == pytest.approx(3.05)
    assert s5.by_cell["balanced", 0.3].difference.clusters == 2
    assert s5.by_dataset["wine"].difference.mean == pytest.approx(2.6)
    assert s5.by_dataset["wine"].difference.clusters == 4  # tasks: within one dataset they are the replicates


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_missing_and_non_finite_results_are_counted(bad):
    rows = [row("ce", 0.5, seed=seed) for seed in range(4)]
    rows += [row("s5", 0.6, seed=0), row("s5", bad, seed=1), row("s5", 0.7, seed=2)]
    s5 = by_method(rows)["s5"]
    assert (s5.missing, s5.non_finite, s5.overall.difference.tasks) == (1, 1, 2)
    assert s5.overall.difference.mean == pytest.approx(15)
    ce = by_method(rows)["ce"]
    assert (ce.missing, ce.non_finite, ce.overall.difference.tasks) == (0, 0, 4)


def test_two_results_of_one_task_are_an_error():
    with pytest.raises(AssertionError, match="two results of ce"):
        compare([row("ce", 0.5), row("ce", 0.6)])


def test_the_reference_must_be_there():
    with pytest.raises(AssertionError, match="reference"):
        compare([row("s5", 0.5)])


def test_an_arrow_table_gives_the_same_and_noise_rates_survive_float32():
    rows = [row(name, 0.5 + 0.1 * seed, seed=seed, noise_rate=0.15) for name in ("ce", "s5") for seed in range(3)]
    table = pa.Table.from_pylist(rows)
    narrow = table.set_column(
        table.column_names.index("noise_rate"), "noise_rate", table["noise_rate"].cast(pa.float32())
    )
    assert compare(table) == compare(rows) == compare(narrow)


def test_order_reference_first_then_by_difference():
    rows = [row(name, value) for name, value in {"s5": 0.6, "focal": 0.4, "ce": 0.5, "policy": 0.7}.items()]
    rows.append(row("uniform", math.nan))
    assert [item.method for item in compare(rows)] == ["ce", "policy", "s5", "focal", "uniform"]
