"""Datasets by name or path: fetched, encoded, cached as memory-mapped files; the held-out split is checked here."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from palf_dist.config import DataConfig, DatasetSource
from palf_dist.errors import DataError
from palf_dist.tasks.cache import cache_folder
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.fetch import ensure_table, is_cached
from palf_dist.tasks.files import fingerprint, parquet_files
from palf_dist.tasks.registry import REGISTRY, Package, find_entry
from palf_dist.tasks.schema import encode

_ENCODING = 1  # count up when the encoding changes


def load_dataset(source: DatasetSource, data: DataConfig) -> EncodedDataset:
    """The dataset on a memory map, fetched and encoded first when the cache does not hold it. Raises DataError."""
    dataset = _load(source, cache_folder(data.cache), data.max_rows)
    if source.family not in (None, dataset.family):
        raise DataError(
            f"{source.name}: declared to be of the family {source.family}, but its columns make it {dataset.family}; "
            "mend family, or name its image or text column in columns"
        )
    if len(dataset.class_names) > data.max_classes:
        raise DataError(
            f"{source.name}: {len(dataset.class_names)} classes, more than data.max_classes ({data.max_classes}); "
            "raise it, or name another label column in columns.label"
        )
    return dataset


def load_all(data: DataConfig) -> dict[str, EncodedDataset]:
    """Every dataset of ``data.train`` and ``data.held_out`` by name.

    Raises DataError, naming both, when a held-out dataset holds rows of one that is trained on. Two held-out datasets
    may hold the same rows: ``EncodedDataset.origin`` makes them one cluster of standard errors.
    """
    datasets = {source.name: load_dataset(source, data) for source in data.train + data.held_out}
    for held_out, other in product(data.held_out, data.train):
        if datasets[held_out.name].shares_rows_with(datasets[other.name]):
            raise DataError(
                f"held-out dataset {held_out.name} and training dataset {other.name} hold the same rows "
                f"(origin {datasets[other.name].origin}); leave one of them out"
            )
    return datasets


def list_datasets(cache: str | None = None) -> list[dict[str, Any]]:
    """What the registry knows, one record per dataset; nothing is downloaded."""
    folder = cache_folder(cache)
    return [
        {
            "name": entry.name,
            "family": entry.family,
            "rows": entry.rows,
            "classes": entry.classes,
            "origin": entry.origin,
            "package": str(entry.package),
            "cached": entry.package.kind == "bundled" or is_cached(entry, folder),
        }
        for entry in REGISTRY.values()
    ]


def describe(source: str | DatasetSource, cache: str | None = None) -> dict[str, Any]:
    """Size and shape of one whole dataset, by registry name or as a source with a path."""
    source = DatasetSource(name=source) if isinstance(source, str) else source
    dataset = _load(source, cache_folder(cache), sys.maxsize)
    counts = np.bincount(dataset.labels)
    return {
        "name": dataset.name,
        "family": dataset.family,
        "rows": dataset.rows,
        "classes": len(dataset.class_names),
        "class_names": list(dataset.class_names),
        "majority_share": float(counts.max() / dataset.rows),
        "smallest_class": int(counts.min()),
        "numeric_columns": dataset.numeric.shape[1],
        "categorical_columns": dataset.categorical.shape[1],
        "image_shape": None if dataset.images is None else list(dataset.images.shape[1:]),
        "missing_share": float(np.isnan(dataset.numeric).mean()) if dataset.numeric.size else 0.0,
        "origin": dataset.origin,
        "package": source.path or str(find_entry(source.name).package),
    }


def fetch(names: Iterable[str], cache: str | None = None) -> dict[str, Path]:
    """Bring registry datasets into the cache: their tables' paths by name.

    Raises DataError for an unknown name before anything is downloaded, and, when all else is there, one that tells of
    every package that could not be had.
    """
    entries = [find_entry(name) for name in names]
    paths: dict[str, Path] = {}
    failures: dict[Package, str] = {}
    for entry in entries:
        if entry.package not in failures:
            try:
                paths[entry.name] = ensure_table(entry, cache_folder(cache))
            except DataError as error:
                failures[entry.package] = str(error)
    if failures:
        raise DataError("\n".join(failures.values()))
    return paths


def _load(source: DatasetSource, folder: Path, max_rows: int) -> EncodedDataset:
    if source.path is None:
        entry = find_entry(source.name)
        path = str(ensure_table(entry, folder))
        filesystem: pafs.FileSystem = pafs.LocalFileSystem()
        files = [filesystem.get_file_info(path)]
        origin = entry.origin
    else:
        path = source.path
        filesystem, files = parquet_files(path)
        origin = ""
    try:
        prints = [fingerprint(filesystem, info) for info in files]
        origin = origin or " ".join(sorted(set(prints)))
        times = [info.mtime_ns for info in files]
        identity = [_ENCODING, source.name, source.columns.model_dump(), max_rows, origin, prints, times]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        encoded = folder / "encoded" / f"{source.name.replace(os.sep, '_')}-{digest}.arrow"
        with suppress(FileNotFoundError, pa.ArrowInvalid):  # absent or torn: made anew below
            return EncodedDataset.load(encoded)
        table = ds.dataset([info.path for info in files], filesystem=filesystem, format="parquet")
        encode(table, source.columns, source.name, origin, max_rows).save(encoded)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source.name}: {path} cannot be read as Parquet ({error})") from error
    return EncodedDataset.load(encoded)
