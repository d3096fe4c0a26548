"""Datasets as they are: the tests are scipy's, corrected over the datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from palf_dist.config import Condition, EvaluationConfig
from palf_dist.evaluation.as_is import LEVEL, compare_as_is
from palf_dist.evaluation.inference import holm
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
    assert found.below == [name for name, p in holm(expected).items() if p < LEVEL and gains[name] < 0]
    assert "a" in found.below and found.adjusted["d"] < LEVEL, "d is significantly above, which is no harm"
    figure = found.figure()
    assert figure.value == len(found.below) and figure.meaning.endswith(f": {', '.join(found.below)}")
    record = found.record()
    assert record["significantly_below"] == found.below and record["datasets"]["c"]["tasks"] == 5
    header, cells = found.cells()
    assert cells[0][0] == "a" and all(len(row) == len(header) for row in cells)


def test_what_one_test_alone_would_call_significant_may_not_be() -> None:
    one = {"a": -1.2}
    many = one | {f"other-{index}": 0.0 for index in range(40)}
    assert compare_as_is(made(one), EVALUATION).below == ["a"]
    assert compare_as_is(made(many), EVALUATION).below == []


def test_none_below_holds() -> None:
    figure = compare_as_is(made({"a": 1.0, "b": 3.0}), EVALUATION).figure()
    assert figure.value == 0 and ": " not in figure.meaning


def test_what_cannot_be_tested_says_so() -> None:
    single = compare_as_is(made({"a": 1.0, "b": 3.0}, seeds=1), EVALUATION)
    assert single.figure().value is None and single.figure().meaning.endswith("not so: a, b") and not single.below
    nothing = compare_as_is(made({"a": 1.0}), EvaluationConfig())
    assert nothing.figure().meaning == "no condition of these runs leaves the datasets as they are"
    assert nothing.record() == {"level": LEVEL, "significantly_below": [], "datasets": {}}
