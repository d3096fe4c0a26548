from __future__ import annotations

from pathlib import Path

import pytest

from palf_dist.config_loading import dump_config
from palf_dist.errors import ConfigError
from palf_dist.search.config import AshaConfig, NoScheduler, PbtConfig, load_search_config, search_differences
from tests.search.quadratic import search_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SHORT = "target: {kind: loss_weights, dataset: digits}\nsearcher: random\n"


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(SHORT)
    return path


@pytest.mark.parametrize("name", ["tune-digits.yaml", "tune-quick.yaml"])
def test_shipped_configurations_are_valid_and_survive_the_run_directory(name: str, tmp_path: Path) -> None:
    config = load_search_config(CONFIGS / name)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_search_config(tmp_path / "config.yaml") == config


def test_a_scheduler_may_be_named_alone(short: Path) -> None:
    assert load_search_config(short).scheduler == NoScheduler()
    network = "target.model={kind: mlp}"  # softmax regression is trained before its first report
    assert load_search_config(short, ["scheduler=asha", network]).scheduler == AshaConfig()
    asha = load_search_config(short, ["scheduler.kind=asha", "scheduler.grace=2", network]).scheduler
    assert asha == AshaConfig(grace=2)
    assert load_search_config(short, ["scheduler=pbt", network]).scheduler == PbtConfig()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["searcher=tpe"], "searcher: must be 'tuneloss', 'optuna' or 'random', not \"tpe\""),
        (["trials=0"], "--set: trials: must be greater than or equal to 1, not 0"),
        (["trails=3"], "trails: unknown key; did you mean trials?"),
        (["scheduler=hyperband"], "scheduler.kind: must be 'none' or 'asha' or 'pbt'"),
        (["target.kind=loss"], "target.kind: must be 'loss_weights' or 'meta_training'"),
        (["scheduler=pbt"], "scheduler: pbt cannot change l1, l2,"),
        (["scheduler=pbt", "searcher=optuna"], "searcher: must be random with scheduler pbt"),
        (["scheduler=pbt", "concurrent=2"], "concurrent: must be left out with scheduler pbt"),
        (["scheduler=pbt", "trials=1"], "trials: must be at least 2 with scheduler pbt"),
    ],
)
def test_mistakes_are_named(short: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_search_config(short, overrides)
    assert message in str(refused.value)


def test_a_resumed_search_may_grow_and_move_but_not_change() -> None:
    old = search_config(trials=4)
    moved = search_config(trials=9, concurrent=3, distributed={"address": "auto"}, tracking={"enabled": True})
    assert search_differences(old, moved) == []
    assert search_differences(old, search_config(seed=1, searcher="optuna")) == [
        'searcher: "random" in the run, "optuna" now',
        "seed: 0 in the run, 1 now",
    ]
