from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from palf_dist.tasks.encoded import EncodedDataset
from tests.tasks.cases import image_dataset, text_dataset, toy_dataset

DATASETS = [toy_dataset(), image_dataset(channels=3), text_dataset()]
ARRAYS = ("numeric", "categorical", "images", "words", "labels")


def assert_same(a: EncodedDataset, b: EncodedDataset) -> None:
    for field in ("name", "family", "origin", "class_names", "categorical_sizes"):
        assert getattr(a, field) == getattr(b, field)
    for field in ARRAYS:
        left, right = getattr(a, field), getattr(b, field)
        assert (left is None) == (right is None), field
        if left is not None:
            assert left.dtype == right.dtype and left.shape == right.shape, field
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.family)
def test_saving_and_loading_keeps_everything(dataset: EncodedDataset, tmp_path: Path) -> None:
    dataset.save(tmp_path / "x.arrow")
    assert_same(dataset, EncodedDataset.load(tmp_path / "x.arrow"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.arrow"]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset.family)
def test_loaded_arrays_are_views_on_the_memory_map(dataset: EncodedDataset, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    dataset.save(path)
    before = pa.total_allocated_bytes()
    loaded = EncodedDataset.load(path)
    assert pa.total_allocated_bytes() - before < 4096
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for field in ARRAYS:
        array = getattr(loaded, field)
        if array is not None and array.size:
            address = array.__array_interface__["data"][0]
            assert any(low <= address and address + array.nbytes <= high for low, high in ranges), field
            assert not array.flags.writeable


def test_from_arrays_holds_the_very_arrays() -> None:
    dataset = toy_dataset()
    arrays = dataset.to_arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    again = EncodedDataset.from_arrays(arrays)
    assert_same(dataset, again)
    for field in ("numeric", "categorical", "labels"):
        assert np.shares_memory(getattr(dataset, field), getattr(again, field))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_torn_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    toy_dataset().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content) if kept < 1 else kept)])
    with pytest.raises(pa.ArrowInvalid):
        EncodedDataset.load(path)


def test_shared_origins() -> None:
    one = toy_dataset(origin="a b")
    assert one.shares_rows_with(toy_dataset(origin="b c"))
    assert not one.shares_rows_with(toy_dataset(origin="ab c"))
