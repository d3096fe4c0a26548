"""A suite's fold from the overrides to the report: what a run is trained and judged on."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from palf_dist import rehearsal, units
from palf_dist.config_loading import load_config
from palf_dist.errors import ConfigError
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.headline import UNSEEN_KINDS
from palf_dist.evaluation.plots import plot_held_out, plot_noise
from palf_dist.evaluation.table import to_markdown, to_rich
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.family import check_tasks, evaluation_specs
from palf_dist.tasks.splits import train_capacity
from palf_dist.tasks.suites import (
    load_suite,
    suite_overrides,
)
from tests.command import SMOKE, Command
from tests.tasks.own_suite import OWN, PAGE, cache, names, own

__all__ = ["cache"]


TABLES: dict[str, Any] = {
    "datasets": ["digits", "wine", "iris", "breast_cancer"],
    "train_only": [],
    "folds": [["digits", "wine"], ["iris", "breast_cancer"]],
    "conditions": [
        {"name": "noisy", "noise_rate": 0.3, "noise_kind": "pair_flip"},
        {"name": "as-is"},
        {"name": "few", "train_size": 30},
    ],
}


def test_a_suite_is_what_a_run_is_judged_on() -> None:
    """Every dataset of the fold under every condition, from the overrides to the order of the report's columns."""
    suite = own(**TABLES)
    config = load_config(SMOKE, [*suite_overrides(suite, "1"), "evaluation.seeds=2", "tasks.group_size=12"])
    assert (names(config.data.train), names(config.data.held_out)) == (["digits", "wine"], ["iris", "breast_cancer"])
    assert config.data.max_rows == suite.max_rows and config.evaluation.suite_conditions == suite.conditions
    datasets = load_all(config.data)
    check_tasks(config, datasets)
    (specs,) = evaluation_specs(config, datasets)
    assert len({spec.keys for spec in specs}) == len(specs) == 2 * 3 * 2
    assert {(spec.condition, spec.noise_kind, spec.noise_rate) for spec in specs} == {
        ("noisy", "pair_flip", 0.3),
        ("as-is", "uniform", 0.0),
        ("few", "uniform", 0.0),
    }
    sizes = {(spec.dataset, spec.condition): spec.train_size for spec in specs}
    assert sizes["iris", "few"] == 30 and sizes["iris", "as-is"] == train_capacity(datasets["iris"], config.tasks)
    widest = rehearsal._widest_group(config, [*datasets.values()][2:], rehearsal.Work("evaluate", 0, "adam"))
    assert widest.train.labels.shape[1] == max(sizes.values()), "the memory plan knows them"
    runner = units.Runner(config, datasets)
    prepared = {"reference": {"0/adam": {"learning_rate": 0.01, "weight_decay": 0.0}}}
    work = [unit for unit in units.evaluate_units(config, datasets) if "policy" not in unit.settings]
    rows = units.rows_of(runner.run(unit, np.zeros(0, np.float32), 0, prepared) for unit in work)
    compared, _ = held_out(rows)
    assert [item.overall.difference.tasks for item in compared] == [12] * len(compared)
    assert list(compared[0].by_condition) == ["noisy", "as-is", "few"], "as the suite lists them"
    assert "balanced:" not in to_markdown(compared)
    console = Console(file=io.StringIO(), width=80)
    console.print(to_rich(compared))
    assert all(name in console.file.getvalue() for name in ("noisy", "as-is", "few"))
    plot_noise(compared)
    plot_held_out(compared)


def test_a_family_is_held_out_by_name() -> None:
    overrides = suite_overrides(load_suite("palf12"), "text")
    config = load_config(SMOKE, overrides)
    assert names(config.data.held_out) == ["newsgroups", "reuters-r52", "snippets", "fine_foods"]
    assert tuple(item.noise_kind for item in config.evaluation.suite_conditions)[-3:] == UNSEEN_KINDS


@pytest.mark.parametrize("fold", ["2", "-1", "sound"])
def test_what_cannot_be_held_out(fold: str, cli: Command) -> None:
    complaint = "suite palf12 has the folds 0 to 1 and the families image, text, tabular"
    assert complaint in cli.refused("meta-train", "--config", SMOKE, "--suite", "palf12", "--fold", fold)
    assert "--suite and --fold go together" in cli.refused("evaluate", "policy", "--suite", "palf12")


def test_rates_at_which_labels_mean_something_else_are_refused() -> None:
    kind, rates = "tasks.noise.kind=instance_dependent", "evaluation.noise_rates=[0.0, 0.4]"
    with pytest.raises(ConfigError, match=r"tasks\.noise\.high: must be less than 0\.5 with instance_dependent noise"):
        load_config(SMOKE, [kind, rates])
    load_config(SMOKE, [kind, rates, "tasks.noise.high=0.45"])
    with pytest.raises(ConfigError, match=r"evaluation\.noise_rates: must be less than 0\.5"):
        load_config(SMOKE, [kind, "tasks.noise.high=0.45", "evaluation.noise_rates=[0.0, 0.5]"])
    worst = 'evaluation.suite_conditions=[{"name": "a", "noise_kind": "class_dependent", "noise_rate": 0.6}]'
    with pytest.raises(ConfigError, match=r"suite_conditions\.0\.noise_rate: must be less than 0\.5"):
        load_config(SMOKE, [worst])


def test_two_conditions_of_one_name_are_refused() -> None:
    twice = 'evaluation.suite_conditions=[{"name": "a"}, {"name": "a", "noise_rate": 0.2}]'
    with pytest.raises(ConfigError, match=r"evaluation\.suite_conditions: a is named more than once"):
        load_config(SMOKE, [twice])


@pytest.mark.slow
def test_a_fold_is_trained_and_judged_from_the_command_line(cli: Command) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(OWN | TABLES))
    (commands,) = re.findall(r"```sh suite\n(.*?)```", PAGE.read_text(), re.DOTALL)
    known = {"configs/quick.yaml": SMOKE, "palf12": "own.yaml"}
    train, evaluate = (
        [known.get(word, word) for word in shlex.split(line)[1:]] + ["--workers", "0", "--json"]
        for line in commands.splitlines()
    )
    readable = 'tasks.architectures=[{"kind": "mlp", "hidden": [8]}]'  # of tables, not a transformer
    ended = cli(*train, "--set", "evaluation.seeds=2", "--set", readable)
    assert ended.code == 0, ended.err
    judged = {each["method"]: each for each in json.loads(ended.out)["held_out"]}
    assert list(judged["policy"]["by_condition"]) == ["noisy", "as-is", "few"] and judged["policy"]["tasks"] == 12
    again = cli(*evaluate)
    assert again.code == 0 and json.loads(again.out)["held_out"] == list(judged.values())
    evaluate[evaluate.index("0")] = "1"
    assert "was trained on" in cli.refused(*evaluate)
