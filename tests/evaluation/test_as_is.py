"""Datasets as they are: the tests are scipy's, corrected over the datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from palf_dist.config import Condition, EvaluationConfig
from palf_dist.evaluation.as_is import LEVEL, POWER, compare_as_is, detectable_loss
from palf_dist.evaluation.inference import clustered_mean, holm
from palf_dist.randomness import random_generator

EVALUATION = EvaluationConfig(suite_conditions=(Condition(name="as-is"), Condition(name="noise", noise_rate=0.4)))


def made(gains: dict[str, float], seeds: int = 5) -> list[dict[str, Any]]:
    """CE at 70 %, the policy above it by these points, give or take; far below it where there is noise."""
    rows = []
    for dataset, gain in gains.items():
        for seed in range(seeds):
            scatter = random_generator("as is", dataset, seed).normal()
            for condition, rate, ahead in (("as-is", 0.0, gain + scatter), ("noise", 0.4, -20.0)):
                task = {"dataset": dataset, "architecture": "mlp", "noise_rate": rate, "condition": condition}
                for method, points in (("ce", 0.0), ("policy", ahead), ("focal", -30.0)):
                    rows.append({"method": method, **task, "seed": seed, "accuracy": 0.7 + points / 100})
    return rows


def test_the_tests_are_those_of_scipy() -> None:
    gains = {"a": -8.0, "b": -2.0, "c": 0.0, "d": 5.0}
    rows = made(gains)
    found = compare_as_is(rows, EVALUATION)
    expected = {}
    for name in gains:
        of = {
            method: [row["accuracy"] for row in rows if (row["method"], row["dataset"]) == (method, name)][::2]
            for method in ("policy", "ce")
        }
        expected[name] = float(stats.ttest_rel(of["policy"], of["ce"]).pvalue)
        mean = 100 * np.mean(np.subtract(of["policy"], of["ce"]))
        assert found.differences[name].mean == pytest.approx(mean)
        assert found.differences[name].p == pytest.approx(expected[name])
    assert found.adjusted == pytest.approx(holm(expected))
    assert found.below == [name for name, p in expected.items() if p < LEVEL and gains[name] < 0]
    assert found.below_by_holm == [name for name, p in holm(expected).items() if p < LEVEL and gains[name] < 0]
    assert "a" in found.below and found.adjusted["d"] < LEVEL, "d is significantly above, which is no harm"
    figure = found.figures()["datasets_below_ce_as_is"]
    assert figure.value == len(found.below) and figure.meaning.endswith(f": {', '.join(found.below)}")
    record = found.record()
    assert record["significantly_below"] == found.below and record["datasets"]["c"]["tasks"] == 5
    header, cells = found.cells()
    assert cells[0][0] == "all" and cells[1][0] == "a" and all(len(row) == len(header) for row in cells)


def test_a_loss_on_every_dataset_is_not_corrected_away() -> None:
    """2.6 points below on each of twelve datasets, of two seeds each with a scatter that makes no p of a dataset
    survive Holm's correction."""
    rows = []
    for index in range(12):
        for seed in range(2):
            ahead = -2.6 + (0.09 if seed else -0.09)
            for method, points in (("ce", 0.0), ("policy", ahead)):
                task = {"dataset": f"d{index}", "architecture": "mlp", "noise_rate": 0.0, "condition": "as-is"}
                rows.append({"method": method, **task, "seed": seed, "accuracy": 0.7 + points / 100})
    found = compare_as_is(rows, EVALUATION)
    figures = found.figures()
    assert len(found.below) == 12 and not found.below_by_holm
    assert figures["datasets_below_ce_as_is"].value == 12 == figures["datasets_below_ce_as_is"].clusters
    assert figures["diff_as_is"].value == pytest.approx(-2.6)


def test_harm_on_the_whole_is_found_where_no_dataset_alone_shows_it() -> None:
    rows = made(dict.fromkeys("abcdefghijkl", -0.6), seeds=3)
    found = compare_as_is(rows, EVALUATION)
    assert found.below == [] and found.pooled.high < 0 and found.pooled.clusters == 12
    ahead = [row["accuracy"] for row in rows if (row["method"], row["condition"]) == ("policy", "as-is")]
    assert found.figures()["diff_as_is"].value == pytest.approx(100 * np.mean(ahead) - 70)


@pytest.mark.parametrize("count", [6, 40])
def test_the_detectable_loss_is_found_as_often_as_it_says(count: int) -> None:
    draws = random_generator("power").normal(size=(4000, count))
    scale = stats.norm.std()
    loss = detectable_loss(clustered_mean(np.resize([-scale, scale], count), range(count)))
    loss /= np.std(np.resize([-scale, scale], count), ddof=1)
    rejected = stats.ttest_1samp(draws - loss, 0, axis=1).pvalue < LEVEL
    assert np.mean(rejected) == pytest.approx(POWER, abs=0.04)


def test_none_below_holds() -> None:
    figure = compare_as_is(made({"a": 1.0, "b": 3.0}), EVALUATION).figures()["datasets_below_ce_as_is"]
    assert figure.value == 0 and ": " not in figure.meaning


def test_what_cannot_be_tested_says_so() -> None:
    single = compare_as_is(made({"a": 1.0, "b": 3.0}, seeds=1), EVALUATION)
    assert single.figures()["datasets_below_ce_as_is"].value is None
    assert single.figures()["datasets_below_ce_as_is"].meaning.endswith("not so: a, b") and not single.below
    nothing = compare_as_is(made({"a": 1.0}), EvaluationConfig())
    assert {figure.meaning for figure in nothing.figures().values()} == {
        "no condition of these runs leaves the datasets as they are"
    }
    assert nothing.record() == {"level": LEVEL, "significantly_below": [], "by_holm": [], "datasets": {}}
