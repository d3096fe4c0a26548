"""What is tuned and calibrated before a run: choices, ties, and that it is what the comparison then uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palf_dist import preparation, units
from palf_dist.config import GridsConfig, RunConfig
from palf_dist.config_loading import load_config
from palf_dist.evaluation.derived import BEST_STATIC, pick_rows
from palf_dist.evaluation.methods import METHODS, TUNED, tuned_together
from palf_dist.group_work import measure
from palf_dist.inner_loop import InnerLoop
from palf_dist.policies import StaticPolicy
from palf_dist.policies.static import control_vector
from palf_dist.rehearsal import Work, need, works
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.family import evaluation_specs
from palf_dist.types import Contribution, Unit

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(SMOKE, [f"data.cache={tmp_path_factory.mktemp('cache')}"])


def comparing(config: RunConfig, *methods: str) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"methods": methods})})


def test_tuning_picks_the_best_grid_point(config: RunConfig) -> None:
    work = preparation.tune_units(config)
    grid = config.inner.grids.adam
    assert len(work) == len(grid.learning_rate) * len(grid.weight_decay) * preparation.TUNING_GROUPS
    target = {"learning_rate": grid.learning_rate[-1], "weight_decay": grid.weight_decay[0]}
    made = []
    for unit in work:
        settings = json.loads(unit.settings)
        hit = all(settings[name] == value for name, value in target.items())
        made.append(Contribution(unit, 0, metrics={"accuracy": 0.9 if hit else 0.5}))
    tuned = preparation.reduce_tune(config, made[::-1])
    assert tuned == {"reference": {"0/adam": target}}
    (sentence,) = preparation.edges(config, tuned)
    assert "0/adam: the tuned learning rate 0.05 is at an edge" in sentence
    wider = grid.model_copy(update={"learning_rate": (0.01, 0.05, 0.2)})
    inner = config.inner.model_copy(update={"grids": config.inner.grids.model_copy(update={"adam": wider})})
    assert preparation.edges(config.model_copy(update={"inner": inner}), tuned) == []


def test_given_values_are_not_tuned(config: RunConfig) -> None:
    inner = config.inner.model_copy(update={"learning_rate": 0.02, "weight_decay": 0.1})
    fixed = config.model_copy(update={"inner": inner})
    assert preparation.tune_units(fixed) == []
    assert preparation.reduce_tune(fixed, [])["reference"]["0/adam"] == {"learning_rate": 0.02, "weight_decay": 0.1}


def test_calibration_is_the_mean_and_deviation_of_known_values(
    config: RunConfig,
) -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0]])
    arrays = {"count": np.array([2.0, 2.0]), "sum": values.sum(0), "square": (values**2).sum(0)}
    unknown = {"count": np.zeros(2), "sum": np.zeros(2), "square": np.zeros(2)}
    made = [Contribution(Unit("calibrate", 0, g), 0, arrays=a) for g, a in enumerate((arrays, unknown))]
    got = preparation.reduce_calibrate(config, made)
    assert got == {"feature_mean": [2.0, 5.0], "feature_std": [1.0, 1.0]}, "a constant feature is left unscaled"


def test_what_an_adapting_policy_reads_keeps_its_unit_however_small(config: RunConfig) -> None:
    """Three outputs: of small slopes, of small ones that never vary, and one that nothing answers to."""
    maml = config.model_copy(update={"policy": config.policy.model_copy(update={"kind": "maml"})})
    values = np.array([[3e-5, -2e-6, 0.0], [-1e-5, -2e-6, 0.0]])
    arrays = {"count": np.full(3, 2.0), "sum": values.sum(0), "square": (values**2).sum(0)}
    got = preparation.reduce_calibrate(maml, [Contribution(Unit("calibrate", 0, 0), 0, arrays=arrays)])
    rms = np.hypot(got["feature_mean"], got["feature_std"])
    assert rms == pytest.approx([np.sqrt(5e-10), 2e-6, 1.0], rel=1e-5)


def test_nothing_is_tuned_for_a_comparison_without_tuned_baselines(config: RunConfig) -> None:
    assert tuned_together(None) == () and preparation.baseline_units(config) == []
    assert preparation.reduce_baselines([]) == {}
    assert Work("baseline", 0, "adam") not in works(config, load_all(config.data))


def test_every_grid_holds_the_untuned_constants_and_no_more_points_than_cross_entropy_has() -> None:
    for name, _, grid in TUNED:
        method, tuned = METHODS[name], METHODS[f"{name}_tuned"]
        assert tuned.by_name and tuned.alpha == method.alpha and tuned.grid == grid
        for optimiser in GridsConfig.model_fields:
            pairs = getattr(GridsConfig(), optimiser)
            assert len(tuned.points) <= len(pairs.learning_rate) * len(pairs.weight_decay)
        constants = control_vector(method.alpha, method.hyperparameters).tolist()
        assert [control_vector(method.alpha, point).tolist() for point in tuned.points].count(constants) == 1
    assert METHODS["mae"].points == [{}]


def test_baselines_get_the_point_of_the_best_mean_for_each_training(config: RunConfig) -> None:
    tasks = config.tasks.model_copy(update={"optimisers": ("sgd", "adam")})
    config = comparing(config.model_copy(update={"tasks": tasks}), "focal_tuned", "mae", "ce_early_stopping", "policy")
    work = preparation.baseline_units(config)
    points = len(METHODS["focal_tuned"].points) + 2  # mae and ce, as they are
    assert len(work) == points * 2 * preparation.TUNING_GROUPS and len(set(work)) == len(work)
    made = []
    for unit in work:
        settings = json.loads(unit.settings)
        gamma = settings["hyperparameters"].get("gamma")
        accuracy = 0.6 if gamma == {"sgd": 0.5, "adam": 5.0}[settings["optimiser"]] else 0.5
        if gamma == 1.0 and settings["group"] == 0:
            accuracy = 0.85  # the best single one, not the best mean
        made.append(Contribution(unit, 0, metrics={"accuracy": accuracy}))
    found = preparation.reduce_baselines(made[::-1])["baselines"]
    assert set(found) == {"ce", "mae", "focal_tuned"}
    assert found["focal_tuned"] == {
        "0/sgd": {"hyperparameters": {"gamma": 0.5}, "accuracy": pytest.approx(0.6)},
        "0/adam": {"hyperparameters": {"gamma": 5.0}, "accuracy": pytest.approx(0.6)},
    }
    assert found["ce"]["0/adam"] == {"hyperparameters": {}, "accuracy": 0.5}


Tuned = tuple[RunConfig, units.Runner, dict[str, Any], dict[str, float]]


@pytest.fixture(scope="module")
def tuned(config: RunConfig) -> Tuned:
    """A comparison with tuned baselines, its runner, what was prepared, and the accuracy of each unit of tuning."""
    config = comparing(config, "focal", "focal_tuned", "s5_tuned", "policy")
    runner, phi = units.Runner(config, load_all(config.data)), units.initial_policy(config)
    first = [runner.run(unit, phi, 0, {}) for unit in preparation.tune_units(config)]
    prepared = preparation.reduce_tune(config, first)
    second = [runner.run(unit, phi, 0, prepared) for unit in preparation.baseline_units(config)]
    prepared |= preparation.reduce_baselines(second)
    calibration = [runner.run(unit, phi, 0, prepared) for unit in preparation.calibrate_units(config)]
    prepared |= preparation.reduce_calibrate(config, calibration)
    assert json.loads(json.dumps(prepared)) == prepared, "what a checkpoint keeps"
    return config, runner, prepared, {item.unit.settings: item.metrics["accuracy"] for item in [*first, *second]}


def test_baselines_are_tuned_on_the_tasks_and_with_the_values_of_cross_entropy(tuned: Tuned) -> None:
    _, _, prepared, accuracies = tuned
    key = {"architecture": 0, "optimiser": "adam"}

    def accuracy(group: int, method: str, hyperparameters: dict[str, float]) -> float:
        settings = {"method": method, "hyperparameters": hyperparameters, "group": group}
        return accuracies[preparation.canonical(key | settings)]

    for group in range(preparation.TUNING_GROUPS):
        of_ce = accuracies[preparation.canonical(key | prepared["reference"]["0/adam"] | {"group": group})]
        assert of_ce == accuracy(group, "ce", {})
        assert accuracy(group, "focal", {}) == accuracy(group, "focal_tuned", {"gamma": 2.0})
    assert len({value for settings, value in accuracies.items() if "s5_tuned" in settings}) > 1


def test_the_comparison_trains_under_what_was_found_and_says_so(tuned: Tuned) -> None:
    config, runner, prepared, _ = tuned
    chosen = {"la": 0.5, "e": 0.4, "ew": 0.3}
    found = {
        **prepared["baselines"],
        "s5_tuned": {"0/adam": {"hyperparameters": chosen, "accuracy": 0.99}},
        "focal_tuned": {"0/adam": {"hyperparameters": {"gamma": 2.0}, "accuracy": 0.5}},
    }
    work = units.evaluate_units(config, runner.datasets)
    phi = units.initial_policy(config)
    rows = units.rows_of(runner.run(unit, phi, 0, prepared | {"baselines": found}) for unit in work)

    def of(method: str, column: str) -> list[Any]:
        return [row[column] for row in rows if row["method"] == method]

    assert set(of("s5_tuned", "tuned")) == {preparation.canonical(chosen)}
    assert set(of("s5_tuned", "tuning_accuracy")) == {0.99}
    for name in ("ce", "focal", "policy"):
        assert set(of(name, "tuned")) == {None}
        assert (None in of(name, "tuning_accuracy")) == (name == "policy")
    assert of("focal", "nll") == of("focal_tuned", "nll")
    specs = evaluation_specs(config, runner.datasets)[0]
    group = runner._build(specs, prepared["reference"])
    loop = InnerLoop(group, StaticPolicy(control_vector({"robust_ce": 1.0}, chosen)), config.inner)
    want = measure(loop, torch.zeros(0))["nll"].tolist()
    assert of("s5_tuned", "nll")[: len(specs)] == pytest.approx(want, rel=1e-6)
    (best,) = {tuple(row["picked"]) for row in pick_rows(rows) if row["method"] == BEST_STATIC}
    assert best == ("s5_tuned",)


def test_what_tuning_needs_of_memory_holds_for_every_static_loss(config: RunConfig) -> None:
    datasets = load_all(config.data)
    everything = comparing(config, *METHODS)
    work = Work("baseline", 0, "adam")
    assert works(everything, datasets)[work] == config.tasks.group_size
    found = need(everything, datasets, work)
    for name in ("focal_tuned", "elr_tuned", "bootstrap_tuned", "s5_tuned"):
        alone = need(comparing(config, name), datasets, work)
        assert 0 < alone.work <= found.work and alone.data == found.data


def test_the_page_names_what_is_tried() -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    for name, _, grid in TUNED:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}_tuned` |")]
        for hyperparameter, values in grid.items():
            assert hyperparameter in line and ", ".join(f"{value:g}" for value in values) in line
