"""Every figure is that of a plain loop over the tasks that it names, and one that cannot be had says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from palf_dist.config_loading import parse_config
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.headline import Figure, headline
from palf_dist.randomness import random_generator

DATASETS = "abcdef"
CONDITIONS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "noise-0.4": {"noise_rate": 0.4},
    "flip": {"noise_rate": 0.3, "noise_kind": "pair_flip"},
    "flip-none": {"noise_kind": "pair_flip"},
    "flip-shifted": {"noise_rate": 0.3, "noise_kind": "pair_flip", "imbalance": 10.0, "target_prior": "uniform"},
    "by-class": {"noise_rate": 0.3, "noise_kind": "class_dependent"},
    "matched": {"imbalance": 10.0},
    "shifted": {"imbalance": 10.0, "target_prior": "uniform"},
    "balanced-test": {"target_prior": "uniform"},
}
METHODS = (
    "policy",
    "policy_schedule",
    "policy_shuffled",
    "learned_schedule",
    "learned_constant",
    "policy_trainval",
    "policy_shielded",
    "ce",
    "ce_trainval",
    "ce_by_validation",
    "ce_true_labels",
    "focal",
    "s5",
)
TUNING = {"ce": 0.7, "focal": 0.8, "s5": 0.75}  # so that focal is the best static loss, as chosen without held-out rows


def made(methods: tuple[str, ...] = METHODS, seeds: int = 2) -> list[dict[str, Any]]:
    rows = []
    for dataset in DATASETS:
        for condition, fields in CONDITIONS.items():
            for seed in range(seeds):
                for method in methods:
                    draw = random_generator("headline", dataset, condition, seed, method)
                    rows.append(
                        {
                            "method": method,
                            "dataset": dataset,
                            "architecture": "mlp",
                            "noise_kind": fields.get("noise_kind", "uniform"),
                            "noise_rate": fields.get("noise_rate", 0.0),
                            "condition": condition,
                            "target_prior": fields.get("target_prior", "train"),
                            "seed": seed,
                            "tuning_accuracy": TUNING.get(method),
                            "accuracy": draw.uniform(0.5, 0.9) + 0.1 * (method == "ce_true_labels"),
                            "balanced_accuracy": draw.uniform(0.4, 0.8),
                            "validation_accuracy": draw.uniform(0.4, 0.8),
                        }
                    )
    return rows


def figures(rows: list[dict[str, Any]], *overrides: str) -> dict[str, Figure]:
    conditions = [{"name": name, **fields} for name, fields in CONDITIONS.items()]
    data = f"data: {{train: [digits], held_out: [iris, wine]}}\nevaluation: {{suite_conditions: {conditions}}}"
    return headline(rows, *held_out(rows), parse_config(data, "a", overrides))


def plain(
    rows: list[dict[str, Any]], conditions: set[str], other: Callable[[dict[str, dict[str, Any]]], float] | str = "ce"
) -> float:
    """Mean difference in points of the policy to another method, or to what ``other`` makes of a task's rows."""
    tasks: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault((row["dataset"], row["condition"], row["seed"]), {})[row["method"]] = row
    differences = [
        task["policy"]["accuracy"] - (task[other]["accuracy"] if isinstance(other, str) else other(task))
        for (_, condition, _), task in tasks.items()
        if condition in conditions
    ]
    return 100 * float(np.mean(differences))


BALANCED = {"as-is", "noise-0.4", "flip", "flip-none", "by-class"}
MATCHED = BALANCED | {"matched"}
NOISY = {name for name, fields in CONDITIONS.items() if fields.get("noise_rate")}
EVERY = set(CONDITIONS)


def picked(task: dict[str, dict[str, Any]], score: str) -> float:
    return max((task[name] for name in TUNING), key=lambda row: row[score])["accuracy"]


def test_each_figure_is_of_the_tasks_that_it_names() -> None:
    rows = made()
    found = figures(rows)
    best = min(("focal", "learned_constant"), key=lambda name: plain(rows, EVERY, name))
    imbalanced = min(("focal", "learned_constant"), key=lambda name: plain(rows, {"matched"}, name))
    trainval = [
        {**row, "method": row["method"].removesuffix("_trainval")} for row in rows if "trainval" in row["method"]
    ]
    gain = plain(rows, NOISY)
    expected = {
        "diff_vs_tuned_ce": plain(rows, EVERY),
        "diff_vs_ce_by_validation": plain(rows, EVERY, "ce_by_validation"),
        "diff_trainval": plain(trainval, EVERY),
        "diff_matched_prior": plain(rows, MATCHED),
        "diff_at_no_noise": plain(rows, {"as-is", "flip-none", "matched"}),
        "diff_at_high_noise": plain(rows, {"noise-0.4"}),
        "diff_unseen_noise_pair_flip": plain(rows, {"flip"}),
        "diff_unseen_noise_class_dependent": plain(rows, {"by-class"}),
        "noise_cost_regained": gain / (gain - plain(rows, NOISY, "ce_true_labels")),
        "diff_vs_best_static": plain(rows, EVERY, best),
        "diff_vs_best_static_imbalanced": plain(rows, {"matched"}, imbalanced),
        "diff_vs_own_schedule": plain(rows, EVERY, "policy_schedule"),
        "diff_vs_own_schedule_balanced": plain(rows, BALANCED, "policy_schedule"),
        "diff_vs_learned_schedule": plain(rows, EVERY, "learned_schedule"),
        "diff_vs_learned_schedule_balanced": plain(rows, BALANCED, "learned_schedule"),
        "diff_vs_shuffled": plain(rows, EVERY, "policy_shuffled"),
        "diff_vs_picked_static": plain(rows, EVERY, lambda task: picked(task, "validation_accuracy")),
        "diff_vs_oracle": plain(rows, EVERY, lambda task: picked(task, "accuracy")),
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value), name
    assert found["diff_trainval"].of == "ce_trainval"
    assert found["diff_vs_best_static_imbalanced"].of == {"focal": "best_static"}.get(imbalanced, imbalanced)
    assert found["diff_at_no_noise"].meaning.endswith(", of the conditions as-is, flip-none, matched")
    others = set(found) - set(expected)
    assert others == {
        "se_clustered",
        "diff_shifted_prior",
        "diff_unseen_noise_instance_dependent",
        "steps_to_ce_best_ratio",
        "steps_to_ce_best_mean_ratio",
    }
    assert found["diff_unseen_noise_instance_dependent"].meaning.startswith("there are none: tasks with instance-dep")


def test_a_shifted_prior_takes_imbalanced_training() -> None:
    """A balanced test of tasks whose training rows have the data's own frequencies is another thing."""
    rows = made()
    balanced = [{**row, "accuracy": row["balanced_accuracy"]} for row in rows]
    assert figures(rows)["diff_shifted_prior"].value == pytest.approx(plain(balanced, {"shifted", "flip-shifted"}))
    alone = [row for row in rows if row["condition"] in ("as-is", "balanced-test")]
    assert figures(alone)["diff_shifted_prior"].value is None


def test_noise_that_meta_training_has_is_not_unseen() -> None:
    found = figures(made(), "tasks.noise.kind=pair_flip")
    assert found["diff_at_high_noise"].value == pytest.approx(plain(made(), {"flip"}))
    assert found["diff_unseen_noise_pair_flip"].meaning == "meta-training has pair-flip noise, so it is not unseen"
    assert found["diff_unseen_noise_class_dependent"].value is not None


def test_what_is_not_there_says_so() -> None:
    found = figures([row for row in made(("policy", "ce", "focal")) if row["condition"] == "as-is"])
    for name, reason in {
        "diff_matched_prior": "",
        "diff_vs_best_static_imbalanced": "takes best tuned static, learned constants, label smoothing, S5",
        "diff_vs_ce_by_validation": "takes the method CE, by validation, which these runs do not have",
        "noise_cost_regained": "there are no tasks with label noise",
        "diff_trainval": "takes policy, train + val and CE, train + val, which these runs do not have",
        "diff_vs_own_schedule": "takes the method own mean schedule, which these runs do not have",
        "diff_vs_own_schedule_balanced": "takes the method own mean schedule, which these runs do not have",
        "diff_vs_learned_schedule_balanced": "takes the method learned schedule (t/T only), which these",
        "diff_vs_shuffled": "takes the method shuffled states, which these runs do not have",
        "diff_at_high_noise": "there are none: tasks with a rate of 0.3 or more of meta-training's kind",
    }.items():
        assert (found[name].value is None) == bool(reason), name
        assert found[name].meaning.startswith(reason), name
    pooled = ("diff_vs_picked_static", "diff_vs_oracle")
    assert {found[name].missing for name in pooled} == {("label_smoothing", "s5_tuned")}
    full = figures(made((*METHODS, "label_smoothing", "s5_tuned")))
    assert [full[name].missing for name in (*pooled, "diff_vs_best_static")] == [(), (), ("best_static",)]
    only_shifted = figures([row for row in made() if row["condition"] == "shifted"])
    assert only_shifted["diff_vs_own_schedule_balanced"].meaning.startswith("there are none: tasks with the data's own")


def test_other_uses_of_the_policy_and_other_ce_change_no_other_figure() -> None:
    names = ("policy_trainval", "policy_shielded", "ce_trainval", "ce_by_validation", "tuneloss", "ce_true_labels")
    rows = [row | ({"accuracy": 0.99} if row["method"] in names else {}) for row in made()]
    found, without = figures(rows), figures([row for row in rows if row["method"] not in names])
    changed = {name for name in found if found[name] != without[name]}
    assert changed == {"diff_vs_ce_by_validation", "diff_trainval", "noise_cost_regained"}


def test_noise_that_costs_nothing_leaves_no_share() -> None:
    found = figures([row | ({"accuracy": 0.3} if row["method"] == "ce_true_labels" else {}) for row in made()])
    assert found["noise_cost_regained"].value is None
    assert found["noise_cost_regained"].meaning == "label noise costs tuned CE nothing on these tasks"
    found = figures([row | ({"accuracy": None} if row["method"] == "ce_true_labels" else {}) for row in made()])
    assert found["noise_cost_regained"].value is None
    assert found["noise_cost_regained"].meaning.startswith("no task with label noise has a result of each")


def test_differences_of_steps_are_in_steps() -> None:
    def curve(row: dict[str, Any]) -> dict[str, Any]:
        reached = 30 if row["method"] == "policy" else 90
        return {**row, "curve_steps": [0, reached, 150], "curve_accuracy": [0.1, 0.8, 0.8]}

    figure = figures([curve(row) for row in made(("policy", "ce"))])["steps_to_ce_best_ratio"]
    assert figure.value == pytest.approx(1 / 3) and figure.unit == "inner steps"
    assert figure.estimate is not None and math.isclose(figure.estimate.mean, -60)
    assert figure.meaning.endswith("; reached on 100 % of tasks, by tuned CE on 100 %")
    rows = [curve(row) for row in made(("policy", "ce"))]
    half = [row | {"curve_accuracy": [0.1] * 3} if row["method"] == "policy" and row["seed"] else row for row in rows]
    assert "; reached on 50 % of tasks" in figures(half)["steps_to_ce_best_ratio"].meaning


def test_steps_by_the_mean_curve() -> None:
    """Two tasks, whose best moments under CE are 50 and 150; that of their mean, .65, is 150."""
    curves = {
        ("ce", 0): [0.1, 0.7, 0.5, 0.5],
        ("ce", 1): [0.1, 0.3, 0.4, 0.8],
        ("policy", 0): [0.1, 0.5, 0.6, 0.6],
        ("policy", 1): [0.1, 0.3, 0.9, 0.9],
    }
    tasks = [row for row in made(("policy", "ce")) if row["condition"] == "as-is"]
    some = [row for row in tasks if row["dataset"] == tasks[0]["dataset"]]
    rows = [
        {**row, "curve_steps": [0, 50, 100, 150], "curve_accuracy": curves[row["method"], row["seed"]]}
        for row in some
        if row["seed"] < 2
    ]
    name = "steps_to_ce_best_mean_ratio"
    assert len(rows) == 4
    found = figures(rows)[name]
    assert found.value == pytest.approx(100 / 150) and "100 of 150" in found.meaning and found.clusters == 1
    never = [{**row, "curve_accuracy": [0.0] * 4} if row["method"] == "policy" else row for row in rows]
    assert figures(never)[name].value == 1 and "never in 150 of 150" in figures(never)[name].meaning
    other = [{**row, "curve_steps": [0, 60, 100, 150]} if row["seed"] == 0 else row for row in rows]
    assert "differ" in figures(other)[name].meaning and figures(other)[name].value is None
    flat = [{**row, "curve_accuracy": [0.5] * 4} for row in rows]
    assert "never better than before" in figures(flat)[name].meaning
    assert "no learning curves" in figures(some)[name].meaning
