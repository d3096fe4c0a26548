"""A dataset as numpy arrays: what every worker shares without copies, stored as one memory-mapped Arrow file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from palf_dist.tasks.cache import atomic_write

WORDS = 256
"""Words kept of each text."""

_ARRAYS = ("numeric", "categorical", "images", "words", "labels")


@dataclass(frozen=True, eq=False)
class EncodedDataset:
    """N labelled rows of one dataset. Nothing here is learnt from the rows: statistics are taken per task."""

    name: str
    family: str  # tabular | image | text
    origin: str  # space-separated source groups; two datasets that have one in common hold the same rows
    class_names: tuple[str, ...]
    numeric: np.ndarray  # [N, D] float32, NaN where null
    categorical: np.ndarray  # [N, J] int32, 0 = missing, categories from 1
    categorical_sizes: tuple[int, ...]  # categories of each of the J columns
    images: np.ndarray | None  # [N, H, W, channels] uint8
    words: np.ndarray | None  # [N, WORDS] uint32 CRC-32 of lower-cased words, 0 = padding
    labels: np.ndarray  # [N] int64

    @property
    def rows(self) -> int:
        return len(self.labels)

    @property
    def origins(self) -> frozenset[str]:
        return frozenset(self.origin.split())

    def shares_rows_with(self, other: EncodedDataset) -> bool:
        """True when the two have a source in common."""
        return not self.origins.isdisjoint(other.origins)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The arrays, and the metadata as JSON in a uint8 array: ready for an object store, without copies."""
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        return arrays | {"metadata": np.frombuffer(json.dumps(self._metadata()).encode(), dtype=np.uint8)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> EncodedDataset:
        """The inverse of ``to_arrays``; the dataset holds the very arrays it is given."""
        fields: dict[str, Any] = json.loads(arrays["metadata"].tobytes())
        for name in ("class_names", "categorical_sizes"):
            fields[name] = tuple(fields[name])
        return cls(**fields | {name: arrays.get(name) for name in _ARRAYS})

    def save(self, path: Path) -> None:
        """Write one uncompressed Arrow IPC file, atomically."""
        columns: dict[str, pa.Array] = {}
        shapes = {}
        for name in _ARRAYS:
            array = getattr(self, name)
            if array is None:
                continue
            shapes[name] = array.shape
            width = int(np.prod(array.shape[1:]))
            flat = pa.array(np.ascontiguousarray(array).reshape(-1))
            if width:  # Arrow has no zero-width columns: the shape alone says they are there
                columns[name] = pa.FixedSizeListArray.from_arrays(flat, width)
        batch = pa.record_batch(columns)
        header = {"metadata": json.dumps(self._metadata()), "shapes": json.dumps(shapes)}
        with atomic_write(path) as part, pa.ipc.new_file(str(part), batch.schema.with_metadata(header)) as writer:
            writer.write_batch(batch)

    @classmethod
    def load(cls, path: Path) -> EncodedDataset:
        """Map a file written by ``save``; the arrays are read-only views on the map. pa.ArrowInvalid when torn."""
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        header = batch.schema.metadata
        arrays = {"metadata": np.frombuffer(header[b"metadata"], dtype=np.uint8)}
        for name, shape in json.loads(header[b"shapes"]).items():
            if name in batch.schema.names:
                arrays[name] = batch.column(name).values.to_numpy(zero_copy_only=True).reshape(shape)
            else:
                arrays[name] = np.zeros(shape, dtype=np.float32 if name == "numeric" else np.int32)
        return cls.from_arrays(arrays)

    def _metadata(self) -> dict[str, object]:
        return {
            "name": self.name,
            "family": self.family,
            "origin": self.origin,
            "class_names": self.class_names,
            "categorical_sizes": self.categorical_sizes,
        }


def fingerprints(datasets: Mapping[str, EncodedDataset]) -> dict[str, str]:
    """What each dataset holds, in short: another table under the same name has another fingerprint."""
    return {name: f"{dataset.rows} rows of {dataset.origin}" for name, dataset in datasets.items()}
