"""Datasets, tables and configurations that the tests of palf_dist.tasks share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from palf_dist.config import Columns, DataConfig, DatasetSource, RunConfig
from palf_dist.tasks.encoded import WORDS, EncodedDataset
from palf_dist.tasks.schema import encode
from palf_dist.types import TaskSpec

REFERENCE = {
    f"{index}/{optimiser}": {"learning_rate": 0.01 * (index + 1), "weight_decay": 0.003}
    for index in range(4)
    for optimiser in ("sgd", "momentum", "adam")
}


def encode_table(table: pa.Table, columns: Columns | None = None, max_rows: int = 10**6) -> EncodedDataset:
    return encode(ds.dataset(table), columns or Columns(), "toy", "toy", max_rows)


def write_parquet(path: Path, table: pa.Table, class_names: dict[str, list[str]] | None = None) -> str:
    """A Parquet file as the Hugging Face hub publishes it, with class names in the footer where they are given."""
    if class_names:
        features = {column: {"names": names, "_type": "ClassLabel"} for column, names in class_names.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def toy_dataset(name: str = "toy", rows: int = 400, classes: int = 3, seed: int = 0, **changes: Any) -> EncodedDataset:
    """Numeric columns (the first holds the row's number) and two categorical ones; some values are missing."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(rows) % classes).astype(np.int64)
    numeric = generator.normal(size=(rows, 4)).astype(np.float32) + labels[:, None]
    numeric[:, 0] = np.arange(rows)
    numeric[generator.random(rows) < 0.1, 2] = np.nan
    fields: dict[str, Any] = dict(
        name=name,
        family="tabular",
        origin=name,
        class_names=tuple(map(str, range(classes))),
        numeric=numeric,
        categorical=generator.integers(0, [4, 6], size=(rows, 2)).astype(np.int32),
        categorical_sizes=(3, 5),
        images=None,
        words=None,
        labels=labels,
    )
    return EncodedDataset(**fields | changes)


def image_dataset(name: str = "pictures", rows: int = 300, side: int = 6, channels: int = 1) -> EncodedDataset:
    pixels = np.random.default_rng(1).integers(0, 256, size=(rows, side, side, channels), dtype=np.uint8)
    nothing = np.zeros((rows, 0))
    return toy_dataset(
        name,
        rows,
        family="image",
        images=pixels,
        numeric=nothing.astype(np.float32),
        categorical=nothing.astype(np.int32),
        categorical_sizes=(),
    )


def text_dataset(name: str = "texts", rows: int = 300, **changes: Any) -> EncodedDataset:
    words = np.random.default_rng(2).integers(1, 2**32, size=(rows, WORDS), dtype=np.uint32)
    words[:, 20:] = 0
    return toy_dataset(name, rows, **{"family": "text", "words": words} | changes)


def run_config(
    datasets: tuple[EncodedDataset, ...] | list[EncodedDataset],
    held_out: tuple[EncodedDataset, ...] = (),
    tasks: dict[str, Any] | None = None,
    **sections: Any,
) -> RunConfig:
    return RunConfig(
        data=DataConfig(
            train=tuple(DatasetSource(name=dataset.name) for dataset in datasets),
            held_out=tuple(DatasetSource(name=dataset.name) for dataset in held_out)
            or (DatasetSource(name="elsewhere"),),
        ),
        tasks=tasks or {},
        **{"inner": {"steps": 8, "batch_size": 16}} | sections,
    )


def task_spec(**changes: Any) -> TaskSpec:
    fields: dict[str, Any] = dict(
        keys=(0, "test", 0),
        dataset="toy",
        train_size=100,
        noise_kind="uniform",
        noise_rate=0.0,
        imbalance=1.0,
        target_prior="train",
        architecture=0,
        optimiser="adam",
    )
    return TaskSpec(**fields | changes)
