"""The benchmark of estimators: the same tasks and the same CPU time for each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import estimators
from benchmarks.estimators import ESTIMATORS, EXACT, Bench, Figures, Policy, affordable
from palf_dist import units
from tests.distributed.small import small_config


def test_every_estimator_gets_the_cpu_time_of_the_exact_one() -> None:
    config = estimators.settings()
    windows = -(-config.inner.steps // 50)
    windowed = ESTIMATORS["adjoint, windows of 50"]
    assert affordable(config, ESTIMATORS[EXACT], 2.0, 2.0, 30) == 30
    assert affordable(config, ESTIMATORS["es, 4 pairs"], 1.0, 2.0, 30) == 60
    assert affordable(config, windowed, 2.0, 2.0, 30) == 30 * windows, "a window is an outer step"
    assert affordable(config, ESTIMATORS["es, 16 pairs"], 100.0, 1.0, 30) == 1


def test_the_exact_one_has_its_own_direction_and_a_single_window_is_the_whole() -> None:
    config = small_config()
    bench = Bench(config)
    rng = np.random.default_rng(0)
    phi = 0.1 * rng.standard_normal(units.initial_policy(config).size).astype(np.float32)
    features = len(units.policy_spec(config.policy).features)
    reference = {"0/adam": {"learning_rate": 0.01, "weight_decay": 0.0}}
    prepared = {"reference": reference, "feature_mean": [0.0] * features, "feature_std": [1.0] * features}
    whole = ESTIMATORS[EXACT].model_copy(update={"window": config.inner.steps})
    found = estimators.directions(bench, Policy(phi, prepared), {EXACT: ESTIMATORS[EXACT], "whole": whole}, 2)
    cosines = [[each.cosine for each in of] for of in found.values()]
    assert cosines == [pytest.approx([1.0] * 4), pytest.approx([1.0] * 4)]
    one_step = estimators.directions(bench, Policy(phi, prepared), {"one_step": ESTIMATORS["one_step"]}, 1)
    assert all(each.cosine < 0.999 and each.seconds > 0 for each in one_step["one_step"])


def test_figures_of_seeds() -> None:
    mean, se = Figures(1.0, [0.5], 3, [0.1, 0.2, 0.3]).loss
    assert mean == pytest.approx(0.2) and se == pytest.approx(0.1 / np.sqrt(3))
    assert Figures(1.0, [0.5], 3, [0.1]).loss == (pytest.approx(0.1), 0.0)


@pytest.mark.slow
def test_the_whole_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: ESTIMATORS[name] for name in (EXACT, "one_step", "pes, 4 pairs, windows of 50")}
    monkeypatch.setattr(estimators, "ESTIMATORS", few)
    monkeypatch.setattr(estimators, "settings", small_config)
    monkeypatch.setattr(estimators, "PAGE", tmp_path / "results_estimators.md")
    monkeypatch.setattr(estimators, "JSON", tmp_path / "results_estimators.json")
    estimators.main(["--runs", "1", "--steps", "2", "--seeds", "2", "--write-docs"])
    found = json.loads(estimators.JSON.read_text())["estimators"]
    assert list(found) == list(few) and found[EXACT]["outer_steps"] == 2
    assert all(len(of["outer_losses"]) == 2 and len(of["cosines"]) == 2 for of in found.values())
    printed, page = capsys.readouterr().out, estimators.PAGE.read_text()
    assert all(name in printed and f"| {name} |" in page for name in few)
