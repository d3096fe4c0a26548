from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config, load_config
from palf_dist.errors import ConfigError
from palf_dist.search.config import load_search_config, search_differences
from palf_dist.search.targets import LossWeightsConfig, MetaTrainingConfig

BASE = """
data: {train: [wine], held_out: [iris]}
inner: {steps: 12}
distributed: {workers: 0}
"""
RATE = {"kind": "log", "low": 0.001, "high": 0.1}


def refusal(folder: Path, target: dict[str, Any], **search: Any) -> str:
    """What is said about a search with this target."""
    (folder / "search.yaml").write_text(yaml.safe_dump({"searcher": "random", **search, "target": target}))
    with pytest.raises(ConfigError) as error:
        load_search_config(folder / "search.yaml")
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"l1", "l2", "label_smoothing", "logit_penalty"}),
        ({"weights": {"l1": [0.1, 1]}}, {"l1"}),
        (
            {"model": {"kind": "mlp"}},
            {"focal", "label_smoothing", "symmetric_ce", "robust_ce", "weight_decay"},
        ),
        (
            {"model": {"kind": "mlp"}, "training": {"weight_decay": 0.5}},
            {"focal", "label_smoothing", "symmetric_ce", "robust_ce"},
        ),
    ],
)
def test_weights_that_are_tuned(settings: dict[str, Any], expected: set[str]) -> None:
    assert LossWeightsConfig.model_validate({"dataset": "wine", **settings}).ranges.keys() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"l3": [0.1, 1]}}, "weights.l3: softmax has no such weight; known: l1, l2,"),
        ({"model": {"kind": "mlp"}, "weights": {"l1": [0.1, 1]}}, "weights.l1: mlp has no such weight; known: focal,"),
        (
            {"model": {"kind": "mlp"}, "weights": {"elr": [0.1, 1]}},
            "weights.elr: mlp has no such weight; known: ",
        ),
        ({"weights": {"l2": [0.1, 1], "l2_numeric": [0.1, 1]}}, "weights.l2: weighs all columns"),
        ({"weights": {"l1": [1, 0.1]}}, r"weights.l1: [1, 0.1] is no interval"),
        ({"model": {"kind": "mlp"}, "on_the_fly": True}, "on_the_fly: mlp cannot; use model.kind softmax"),
        (
            {
                "model": {"kind": "mlp"},
                "weights": {"weight_decay": [0.1, 1]},
                "training": {"weight_decay": 1.0},
            },
            "training.weight_decay: is searched",
        ),
        ({"rows": {"train": 0}}, "target.rows.train: must be greater than or equal to 1, not 0"),
    ],
)
def test_loss_weights_that_make_no_sense(settings: dict[str, Any], message: str, folder: Path) -> None:
    assert message in refusal(folder, {"kind": "loss_weights", "dataset": "wine", **settings})


def test_the_base_is_found_beside_the_search_and_becomes_part_of_it(folder: Path) -> None:
    target = {"kind": "meta_training", "base": "base.yaml", "space": {"meta_learner.learning_rate": RATE}}
    (folder / "search.yaml").write_text(yaml.safe_dump({"searcher": "random", "target": target}))
    config = load_search_config(folder / "search.yaml")
    assert isinstance(config.target, MetaTrainingConfig)
    assert config.target.base == load_config(folder / "base.yaml")
    (folder / "stored").mkdir()
    (folder / "stored" / "config.yaml").write_text(dump_config(config))
    (folder / "base.yaml").unlink()
    assert load_search_config(folder / "stored" / "config.yaml") == config


@pytest.mark.parametrize(
    ("path", "domain", "message"),
    [
        ("meta_learner.learning_rte", RATE, "learning_rte: unknown key; did you mean meta_learner.learning_rate?"),
        ("meta_learner.learning_rate", {**RATE, "kind": "uniform", "low": 0}, "must be greater than 0, not 0"),
        ("policy.refresh", {"kind": "uniform", "low": 1, "high": 4}, "space.policy.refresh: must be a valid integer"),
        ("policy.refresh", {"kind": "choice", "values": [1, "often"]}, 'not "often"'),
        ("policy.refresh", {"kind": "log"}, "target.space.policy.refresh.low: is required"),
        ("estimator.window", {"kind": "choice", "values": [4, 40]}, "window: must be at most inner.steps (12), not 40"),
        ("distributed.workers", {"kind": "integer", "low": 0, "high": 2}, "workers: may not be searched"),
        ("name", {"kind": "choice", "values": ["a", "b"]}, "space.name: may not be searched"),
        ("meta_learner.outer_steps", {"kind": "integer", "low": 1, "high": 9}, "outer_steps: may not be searched"),
        ("data.max_rows", {"kind": "integer", "low": 90, "high": 99}, "data.max_rows: may not be searched"),
    ],
)
def test_what_may_not_be_searched_is_said_before_any_work(path: str, domain: Any, message: str, folder: Path) -> None:
    assert message in refusal(folder, {"kind": "meta_training", "base": "base.yaml", "space": {path: domain}})


def test_the_workers_of_a_trial_are_a_number(folder: Path) -> None:
    base = {"file": "base.yaml", "distributed": {"workers": "auto"}}
    space = {"meta_learner.learning_rate": RATE}
    message = refusal(folder, {"kind": "meta_training", "base": base, "space": space})
    assert "target: base.distributed.workers: may not be auto" in message and "give a number" in message


def test_a_trial_is_the_base_with_its_values(folder: Path) -> None:
    space = {"meta_learner.learning_rate": RATE, "policy.kind": {"kind": "choice", "values": ["robust", "palf"]}}
    config = MetaTrainingConfig.model_validate({"base": BASE_DATA, "space": space})
    trial = config.trial({"meta_learner.learning_rate": 0.012345678901234567, "policy.kind": "palf"})
    assert trial.meta_learner.learning_rate == 0.012345678901234567 and trial.policy.kind == "palf"
    assert trial.data == config.base.data and not trial.tracking.enabled


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"searcher": "tuneloss"}, "searcher: tuneloss searches the weights of a loss that is linear in them"),
        ({"scheduler": {"kind": "asha", "grace": 10}}, "scheduler.grace: a trial of this target gives 10 report(s)"),
        ({"scheduler": {"kind": "pbt", "every": 10}}, "scheduler.every: a trial of this target gives 10 report(s)"),
    ],
)
def test_a_search_that_cannot_be_is_refused_without_its_datasets(
    search: dict[str, Any], message: str, folder: Path
) -> None:
    base = {**BASE_DATA, "meta_learner": {"outer_steps": 20}, "evaluation": {"select_every": 2}}
    base["data"] = {"train": [{"name": "own", "path": "nowhere.csv"}], "held_out": ["iris"]}
    target = {"kind": "meta_training", "base": base, "space": {"meta_learner.learning_rate": RATE}}
    assert message in refusal(folder, target, **search)


def test_fields_of_a_base_that_is_a_file_can_be_overridden(folder: Path) -> None:
    target = {"kind": "meta_training", "base": "base.yaml", "space": {"meta_learner.learning_rate": RATE}}
    (folder / "search.yaml").write_text(yaml.safe_dump({"searcher": "random", "target": target}))

    def base(*overrides: str) -> RunConfig:
        config = load_search_config(folder / "search.yaml", overrides)
        assert isinstance(config.target, MetaTrainingConfig)
        return config.target.base

    named = ["distributed.workers=3", "tasks.architectures.0={kind: mlp, hidden: [4]}"]
    assert base(*(f"target.base.{text}" for text in named)) == load_config(folder / "base.yaml", named)
    with pytest.raises(ConfigError, match=r"--set: target.base.inner.stops: unknown key; did you mean .*inner.steps"):
        base("target.base.inner.stops=3")
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read"):
        base("target.base=nowhere.yaml", "target.base.inner.steps=3")


def test_a_base_may_be_a_file_and_what_differs(folder: Path) -> None:
    def target(**differs: Any) -> dict[str, Any]:
        base = {"file": "base.yaml", **differs}
        return {"kind": "meta_training", "base": base, "space": {"meta_learner.learning_rate": RATE}}

    text = yaml.safe_dump({"searcher": "random", "target": target(distributed={"workers": 1}, name="other")})
    (folder / "search.yaml").write_text(text)
    config = load_search_config(folder / "search.yaml", ["target.base.inner.steps=13"])
    assert isinstance(config.target, MetaTrainingConfig)
    named = ["distributed.workers=1", "name=other", "inner.steps=13"]
    assert config.target.base == load_config(folder / "base.yaml", named)
    assert refusal(folder, target(inner={"stops": 3})) == (
        "target.base.inner.stops: unknown key; did you mean inner.steps?"
    )


def test_a_resume_may_give_trials_other_workers(folder: Path) -> None:
    target = {"kind": "meta_training", "base": "base.yaml", "space": {"meta_learner.learning_rate": RATE}}
    (folder / "search.yaml").write_text(yaml.safe_dump({"searcher": "random", "target": target}))
    old = load_search_config(folder / "search.yaml")
    free = ["target.base.distributed.workers=3", "target.base.data.cache=elsewhere"]
    assert search_differences(old, load_search_config(folder / "search.yaml", free)) == []
    fixed = load_search_config(folder / "search.yaml", ["target.base.distributed.threads=2"])
    assert search_differences(old, fixed) == ["target.base.distributed.threads: 1 in the run, 2 now"]


BASE_DATA = yaml.safe_load(BASE)


def test_pbt_changes_only_what_can_change_in_the_middle(folder: Path) -> None:
    hidden = {"kind": "integer", "low": 4, "high": 8}
    target = {"kind": "meta_training", "base": "base.yaml", "space": {"policy.hidden": hidden}}
    assert "scheduler: pbt cannot change policy.hidden in the middle" in refusal(folder, target, scheduler="pbt")
    target = {"kind": "loss_weights", "dataset": "wine"}
    assert "scheduler: asha can save nothing with model softmax" in refusal(folder, target, scheduler="asha")
    assert "scheduler: pbt cannot change l1, l2," in refusal(folder, target, scheduler="pbt")
