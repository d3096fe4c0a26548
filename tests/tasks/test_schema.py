from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from palf_dist.config import Columns
from palf_dist.errors import DataError
from palf_dist.tasks.encoded import WORDS
from palf_dist.tasks.schema import MAX_CATEGORIES, encode, find_roles
from tests.tasks.cases import encode_table, png, write_parquet

LABELS = [0, 1, 0, 1]


def images(count: int, channels: int = 3) -> list[np.ndarray]:
    shape = (4, 4, 3) if channels == 3 else (4, 4)
    return [np.full(shape, 10 * row, np.uint8) for row in range(count)]


def image_column(kind: pa.DataType, count: int = 4) -> pa.Array:
    struct = pa.struct([("bytes", kind), ("path", pa.string())])
    return pa.array([{"bytes": png(pixels), "path": None} for pixels in images(count)], struct)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("column", ["img", "image"])
def test_hub_images(kind: pa.DataType, column: str, tmp_path: Path) -> None:
    """uoft-cs/cifar10, ufldl-stanford/svhn."""
    table = pa.table({column: image_column(kind), "label": pa.array(LABELS, pa.int64())})
    path = write_parquet(tmp_path / "train-0.parquet", table, {"label": ["airplane", "bird"]})
    dataset = encode(ds.dataset(path), Columns(), "toy", "toy", 100)
    assert (dataset.family, dataset.class_names) == ("image", ("airplane", "bird"))
    np.testing.assert_array_equal(dataset.images, np.stack(images(4)))
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_hub_images_with_two_label_columns_never_read_the_coarse_one(tmp_path: Path) -> None:
    """uoft-cs/cifar100."""
    table = pa.table({"img": image_column(pa.binary()), "fine_label": LABELS, "coarse_label": LABELS})
    names = {"fine_label": ["apple", "bear"], "coarse_label": ["fruit", "mammal"]}
    source = ds.dataset(write_parquet(tmp_path / "x.parquet", table, names))
    assert find_roles(source.schema, Columns(), "toy").features == ["img"]
    assert encode(source, Columns(), "toy", "toy", 100).class_names == ("apple", "bear")
    assert encode(source, Columns(label="coarse_label"), "toy", "toy", 100).class_names == ("fruit", "mammal")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("column", ["text", "sentence"])
def test_hub_texts_drop_unlabelled_rows(kind: pa.DataType, column: str, tmp_path: Path) -> None:
    """stanfordnlp/imdb, fancyzhx/ag_news, stanfordnlp/sst2."""
    texts = pa.array(["Good film", "a BAD film!", "unlabelled", None, "good"], kind)
    table = pa.table({"idx": pa.array(range(5), pa.int32()), column: texts, "label": [1, 0, -1, 0, 1]})
    path = write_parquet(tmp_path / "x.parquet", table, {"label": ["neg", "pos"]})
    dataset = encode(ds.dataset(path), Columns(), "toy", "toy", 100)
    assert (dataset.family, dataset.class_names, dataset.rows) == ("text", ("neg", "pos"), 4)
    assert dataset.words is not None and dataset.words.shape == (4, WORDS)
    code = {word: zlib.crc32(word.encode()) for word in ("good", "film", "a", "bad")}
    assert dataset.words[0, :3].tolist() == [code["good"], code["film"], 0]
    assert dataset.words[1, :4].tolist() == [code["a"], code["bad"], code["film"], 0]
    assert not dataset.words[2].any()
    assert dataset.numeric.shape == (4, 0), "idx is not a feature"


def test_long_texts_are_cut() -> None:
    dataset = encode_table(pa.table({"text": ["word " * 1000, "x"], "label": [0, 1]}))
    assert dataset.words is not None and (dataset.words[0] == zlib.crc32(b"word")).all()


def test_tabular_types_nulls_and_labels() -> None:
    features = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float32)), 2)
    table = pa.table(
        {
            "size": pa.array([1.5, None, float("inf"), 4], pa.float64()),
            "count": pa.array([1, 2, None, 4], pa.int16()),
            "features": pa.concat_arrays([features[:3], pa.nulls(1, features.type)]),
            "colour": ["red", None, "blue", "red"],
            "kind": pa.array(["x", "y", "x", None]).dictionary_encode(),
            "flag": [True, None, False, True],
            "label": ["no", "yes", None, "no"],
        }
    )
    dataset = encode_table(table)
    assert (dataset.family, dataset.class_names) == ("tabular", ("no", "yes"))
    expected = [[1.5, 1, 0, 1], [np.nan, 2, 2, 3], [4, 4, np.nan, np.nan]]
    np.testing.assert_array_equal(dataset.numeric, np.array(expected, np.float32))
    assert dataset.categorical.tolist() == [[1, 1, 1], [0, 2, 0], [1, 0, 1]], "the third row has no label"
    assert dataset.categorical_sizes == (1, 2, 1)


def test_infinite_numbers_count_as_null() -> None:
    dataset = encode_table(pa.table({"x": [1.0, float("inf"), 2.0, float("-inf")], "label": LABELS}))
    np.testing.assert_array_equal(np.isnan(dataset.numeric[:, 0]), [False, True, False, True])


def test_named_roles_win_over_found_ones() -> None:
    table = pa.table({"code": [1, 2, 1, 2], "text": ["a", "b", "a", "b"], "other": [1.0, 2, 3, 4], "class": LABELS})
    dataset = encode_table(table, Columns(label="class", categorical=("code",), drop=("text",)))
    assert dataset.family == "tabular"
    assert dataset.categorical.tolist() == [[1], [2], [1], [2]]
    np.testing.assert_array_equal(dataset.numeric[:, 0], [1, 2, 3, 4])
    only = encode_table(table, Columns(label="class", numeric=("other",), categorical=()))
    assert only.numeric.shape == (4, 1) and only.categorical.shape == (4, 0)


def test_the_rarest_of_too_many_categories_count_as_missing() -> None:
    values = [f"id{row:04d}" for row in range(400)] + ["common"] * 10
    dataset = encode_table(pa.table({"id": values, "label": [row % 2 for row in range(410)]}))
    assert dataset.categorical_sizes == (MAX_CATEGORIES,)
    assert (dataset.categorical == 0).sum() == 401 - MAX_CATEGORIES
    assert (dataset.categorical[400:] > 0).all()


def test_class_names_beyond_the_footer_are_the_values(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", pa.table({"x": [1, 2], "label": [0, 7]}), {"label": ["a", "b"]})
    assert encode(ds.dataset(path), Columns(), "toy", "toy", 9).class_names == ("0", "7")


def test_a_larger_table_is_sampled_the_same_way_each_time() -> None:
    table = pa.table({"x": np.arange(1000.0), "label": np.arange(1000) % 2})
    first, second = encode_table(table, max_rows=100), encode_table(table, max_rows=100)
    assert first.rows == 100 and len(np.unique(first.numeric)) == 100
    np.testing.assert_array_equal(first.numeric, second.numeric)
    np.testing.assert_array_equal(first.labels, first.numeric[:, 0] % 2)
    assert first.numeric.max() > 500, "not the first rows"


BAD_TABLES: dict[str, tuple[dict[str, Any], Columns, str]] = {
    "no rows": ({"x": pa.array([], pa.float64()), "label": pa.array([], pa.int64())}, Columns(), "no rows"),
    "no labelled rows": ({"x": [1.0, 2], "label": [-1, -1]}, Columns(), r"label has 0 class"),
    "one class": ({"x": [1.0, 2], "label": [3, 3]}, Columns(), r"label has 1 class.* at least 2"),
    "no label": ({"x": [1.0, 2], "y": [0, 1]}, Columns(), r"no label column; name one of x, y in columns\.label"),
    "float label": ({"x": [1.0, 2], "label": [0.0, 1.0]}, Columns(), r"label is double"),
    "null column": (
        {"x": [1.0, 2], "z": pa.array([None, None], pa.float32()), "label": [0, 1]},
        Columns(),
        r"column z is null.*columns\.drop",
    ),
    "column of type null": ({"z": pa.nulls(2), "label": [0, 1]}, Columns(), r"column z is null.*columns\.drop"),
    "column without a finite number": ({"z": [float("nan")] * 2, "label": [0, 1]}, Columns(), "column z is a finite"),
    "unknown column": (
        {"width": [1.0, 2], "label": [0, 1]},
        Columns(numeric=("widht",)),
        r"columns\.numeric names widht.*did you mean width\?",
    ),
    "unknown label": ({"x": [1.0], "label": [0]}, Columns(label="zzz"), r"columns\.label names zzz.*has x, label"),
    "two roles": ({"x": [1, 2], "label": [0, 1]}, Columns(label="label", numeric=("label",)), "column label is named"),
    "text that is none": ({"x": [1, 2], "label": [0, 1]}, Columns(text="x"), "text column x is int64"),
    "numbers that are none": ({"x": ["a", "b"], "label": [0, 1]}, Columns(numeric=("x",)), "column x .string. is not"),
    "image that is none": ({"x": [1, 2], "label": [0, 1]}, Columns(image="x"), "image column x has type int64"),
    "unusable type": ({"t": pa.array([1, 2], pa.timestamp("s")), "label": [0, 1]}, Columns(), "t has type timestamp"),
    "nothing to read": ({"label": [0, 1]}, Columns(), "no column is left"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_one_clear_error(case: str) -> None:
    content, columns, message = BAD_TABLES[case]
    with pytest.raises(DataError, match=f"^toy: .*{message}"):
        encode_table(pa.table(content), columns)
