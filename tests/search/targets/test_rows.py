from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.errors import ConfigError, DataError
from palf_dist.search.targets import LossWeightsConfig
from palf_dist.search.targets.config import SoftmaxConfig
from palf_dist.search.targets.rows import load_rows


def config(tmp_path: Path, **settings: object) -> LossWeightsConfig:
    return LossWeightsConfig.model_validate({"dataset": "wine", "cache": str(tmp_path / "cache"), **settings})


def own_table(tmp_path: Path, **columns: list[object]) -> dict[str, object]:
    pq.write_table(pa.table(columns), tmp_path / "own.parquet")
    return {"name": "own", "path": str(tmp_path / "own.parquet")}


def test_splits_are_disjoint_and_stratified(tmp_path: Path) -> None:
    data = load_rows(config(tmp_path, rows={"train": 60, "validation": 50}))
    assert {split: len(rows) for split, rows in data.rows.items()} == {"test": 53, "validation": 50, "train": 60}
    assert len(set(np.concatenate(list(data.rows.values())))) == 163
    shares = np.bincount(data.dataset.labels) / data.dataset.rows
    for split, rows in data.rows.items():
        assert np.array_equal(data.labels[split], data.dataset.labels[rows])
        assert np.abs(np.bincount(data.labels[split]) - shares * len(rows)).max() < 2


def test_rows_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, again, other = (load_rows(config(tmp_path, seed=seed)).rows for seed in (0, 0, 1))
    assert all(np.array_equal(first[split], again[split]) for split in first)
    assert not np.array_equal(first["train"], other["train"])


def test_only_training_labels_are_noisy(tmp_path: Path) -> None:
    data = load_rows(config(tmp_path, label_noise={"kind": "pair_flip", "rate": 1.0}))
    clean = {split: data.dataset.labels[rows] for split, rows in data.rows.items()}
    assert np.array_equal(data.labels["train"], (clean["train"] + 1) % 3)
    assert all(np.array_equal(data.labels[split], clean[split]) for split in ("validation", "test"))


def test_rare_classes_are_left_out(tmp_path: Path) -> None:
    own = own_table(tmp_path, x=list(range(64)), label=["a"] * 30 + ["b"] * 4 + ["c"] * 30)
    data = load_rows(config(tmp_path, dataset=own))
    assert data.classes == 2 and set(np.concatenate(list(data.labels.values()))) == {0, 1}


def test_categories_are_one_hot_and_numbers_standardised(tmp_path: Path) -> None:
    x, colours = [float(i % 7) for i in range(80)], ["red", "green", "blue", "red"] * 20
    own = own_table(tmp_path, x=x, colour=colours, label=[i % 2 for i in range(80)])
    data = load_rows(config(tmp_path, dataset=own))
    designs, categorical = data.design(SoftmaxConfig())
    assert categorical.tolist() == [False, True, True, True, False]
    rows = data.rows["train"]
    train = designs["train"]
    expected = np.array(x)[rows]
    np.testing.assert_allclose(train[:, 0], (expected - expected.mean()) / expected.std(), rtol=1e-5, atol=1e-6)
    assert (train[:, 1:4].sum(1) == 1).all() and (train[:, 4] == 1).all()
    for colour in ("red", "green", "blue"):
        has = np.array(colours)[rows] == colour
        assert any(np.array_equal(train[:, column] == 1, has) for column in (1, 2, 3))


def test_texts_are_bags_of_words(tmp_path: Path) -> None:
    texts = [("good fine " if i % 2 else "bad bad ") + f"word{i % 5}" for i in range(80)]
    own = own_table(tmp_path, text=texts, label=[i % 2 for i in range(80)])
    data = load_rows(config(tmp_path, dataset=own))
    designs, categorical = data.design(SoftmaxConfig(vocabulary=4096))
    assert designs["test"].shape == (24, 4097) and not categorical.any()
    for row, values in zip(data.rows["test"], designs["test"], strict=True):
        words = texts[row].split()
        counts = sorted(np.log1p([words.count(word) for word in set(words)]))
        np.testing.assert_allclose(sorted(values[:-1][values[:-1] > 0]), counts / np.linalg.norm(counts) * 64)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rows": {"train": 150, "test": 20}}, ConfigError, r"target.rows: .* more than the 178 rows of wine"),
        ({"rows": {"validation": 2}}, ConfigError, r"target.rows.validation: 2 rows cannot have all 3 classes"),
        ({"model": {"kind": "conv"}}, DataError, r"target.model.kind: conv cannot read wine \(tabular\)"),
        ({"dataset": "wne"}, DataError, r"did you mean wine\?"),
    ],
)
def test_what_cannot_be_had_is_said(
    settings: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_rows(config(tmp_path, **settings))
