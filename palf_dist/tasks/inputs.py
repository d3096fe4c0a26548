"""What an inner model reads of a dataset's rows: encoded per task, with statistics of its training rows only."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfTransformer

from palf_dist.architecture_config import (
    Architecture,
    ConvConfig,
    MLPConfig,
    ModuleConfig,
    ResNetConfig,
    TransformerConfig,
)
from palf_dist.inner_models.shapes import InputShape
from palf_dist.tasks.encoded import EncodedDataset

_CLAMP = 6.0  # standardised values beyond it are cut off
_WORD_BINS = 256  # hash buckets of a text's words in ``read_features``

_READS: dict[type, str] = {
    MLPConfig: "columns",
    ConvConfig: "image",
    ResNetConfig: "image",
    TransformerConfig: "tokens",
}
_FAMILIES = {
    "columns": ("tabular", "image"),
    "numeric": ("tabular", "image"),
    "image": ("image",),
    "tokens": ("text",),
}


def fits(architecture: Architecture, dataset: EncodedDataset) -> bool:
    """True when the architecture can read the dataset."""
    reads_texts = isinstance(architecture, MLPConfig) and architecture.words is not None
    return dataset.family in _FAMILIES[_reads(architecture)] or (reads_texts and dataset.family == "text")


def group_shape(architecture: Architecture, datasets: list[EncodedDataset]) -> InputShape:
    """The padded shape that holds the inputs of all the datasets of a group."""
    reads = _reads(architecture)
    if isinstance(architecture, MLPConfig):
        return InputShape(
            numeric=max(_columns_width(architecture, dataset) for dataset in datasets),
            categorical=max(dataset.categorical.shape[1] for dataset in datasets),
            categories=max(_table_size(dataset) for dataset in datasets),
        )
    if reads == "numeric":
        return InputShape(numeric=max(_numeric_width(dataset) + _table_size(dataset) - 1 for dataset in datasets))
    if reads == "image":
        assert isinstance(architecture, ConvConfig | ResNetConfig | ModuleConfig)
        side = architecture.image_size
        return InputShape(image=(side, side, max(_present(dataset.images).shape[3] for dataset in datasets)))
    assert isinstance(architecture, TransformerConfig | ModuleConfig)
    return InputShape(tokens=architecture.length, vocabulary=architecture.vocabulary)


def read_inputs(
    architecture: Architecture, dataset: EncodedDataset, rows: np.ndarray, first_train: int
) -> tuple[np.ndarray, ...]:
    """Inputs of ``rows`` [n], unpadded, one array per kind of column (types.Inputs without the task axis).

    The training rows are those from ``first_train`` on. Numeric columns and pixels: standardised by the training rows
    (per column; images per channel, but per pixel where they are flat and not resized), clamped to +-6, 0 where missing
    or constant. Categories that no training row has: 0. A module that reads ``numeric`` gets the categories one-hot
    behind the numeric columns, an MLP the words of a text as tf-idf of their hash buckets with a mean square of 1.
    """
    reads = _reads(architecture)
    if isinstance(architecture, MLPConfig):
        return _columns(architecture, dataset, rows, first_train), _categorical(dataset, rows, first_train)
    if reads == "numeric":
        codes = _categorical(dataset, rows, first_train)
        one_hot = np.zeros((len(rows), _table_size(dataset)), np.float32)
        one_hot[np.arange(len(rows))[:, None], codes] = 1.0
        return (np.concatenate([_numeric(dataset, rows, first_train), one_hot[:, 1:]], axis=1),)
    if reads == "image":
        assert isinstance(architecture, ConvConfig | ResNetConfig | ModuleConfig)
        return (_images(_present(dataset.images)[rows], first_train, architecture.image_size),)
    assert isinstance(architecture, TransformerConfig | ModuleConfig)
    words = _present(dataset.words)[rows, : architecture.length].astype(np.int64)
    return (np.where(words > 0, 1 + words % (architecture.vocabulary - 1), 0),)


def read_features(dataset: EncodedDataset, rows: np.ndarray) -> np.ndarray:
    """All that ``rows`` [n] of a dataset hold, whatever architecture reads it: [n, D] numeric columns, pixels, one-hot
    categories and counts of hashed words, each column standardised over these rows."""
    values = [_raw_numbers(dataset, rows)]
    for column, size in zip(dataset.categorical[rows].T, dataset.categorical_sizes, strict=True):
        values.append(column[:, None] == np.arange(1, size + 1))
    if dataset.words is not None:
        values.append(_word_counts(dataset.words[rows], _WORD_BINS))
    return _standardise(np.concatenate(values, axis=1), first_train=0)


def input_widths(shape: InputShape) -> list[tuple[tuple[int, ...], type]]:
    """Trailing shape and element type of each input array."""
    if shape.image:
        return [(shape.image, np.float32)]
    if shape.tokens:
        return [((shape.tokens,), np.int64)]
    if shape.categories:
        return [((shape.numeric,), np.float32), ((shape.categorical,), np.int64)]
    return [((shape.numeric,), np.float32)]


def _reads(architecture: Architecture) -> str:
    return architecture.reads if isinstance(architecture, ModuleConfig) else _READS[type(architecture)]


def _present(array: np.ndarray | None) -> np.ndarray:
    assert array is not None, "the architecture cannot read this dataset"
    return array


def _numeric_width(dataset: EncodedDataset) -> int:
    return dataset.numeric.shape[1] if dataset.images is None else int(np.prod(dataset.images.shape[1:]))


def _table_size(dataset: EncodedDataset) -> int:
    """Rows of the one table that all categorical columns share; row 0 is for missing and unseen."""
    return 1 + sum(dataset.categorical_sizes)


def _columns_width(architecture: MLPConfig, dataset: EncodedDataset) -> int:
    if dataset.images is not None and architecture.image_size is not None:
        return architecture.image_size**2 * dataset.images.shape[3]
    words = architecture.words if dataset.words is not None else None
    return _numeric_width(dataset) + (words or 0)


def _columns(architecture: MLPConfig, dataset: EncodedDataset, rows: np.ndarray, first_train: int) -> np.ndarray:
    """What an MLP reads as numbers [n, D] float32."""
    if dataset.images is not None and architecture.image_size is not None:
        return _images(dataset.images[rows], first_train, architecture.image_size).reshape(len(rows), -1)
    values = _numeric(dataset, rows, first_train)
    if dataset.words is None or architecture.words is None:
        return values
    counts = _word_counts(dataset.words[rows], architecture.words)
    weights = TfidfTransformer().fit(counts[first_train:]).transform(counts).toarray()  # rows of length 1
    return np.concatenate([values, (weights * np.sqrt(architecture.words)).astype(np.float32)], axis=1)


def _word_counts(words: np.ndarray, bins: int) -> np.ndarray:
    """How often the words [n, L] of each text fall in each of the hash buckets: [n, bins]."""
    joint = np.arange(len(words))[:, None] * bins + words % bins
    return np.bincount(joint[words > 0], minlength=len(words) * bins).reshape(len(words), bins)


def _numeric(dataset: EncodedDataset, rows: np.ndarray, first_train: int) -> np.ndarray:
    return _standardise(_raw_numbers(dataset, rows), first_train)


def _raw_numbers(dataset: EncodedDataset, rows: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1], or the numeric columns [n, D] float64."""
    if dataset.images is not None:
        return dataset.images[rows].reshape(len(rows), -1) / np.float64(255)
    return dataset.numeric[rows].astype(np.float64)


def _standardise(values: np.ndarray, first_train: int) -> np.ndarray:
    """Columns [n, D] by the mean and standard deviation of rows ``first_train`` on; NaN becomes the mean, 0."""
    missing = np.isnan(values)
    values = np.where(missing, 0.0, values)
    training = values[first_train:]
    present = ~missing[first_train:]
    count = np.maximum(present.sum(0), 1)
    mean = training.sum(0) / count
    deviation = np.sqrt((np.square(training - mean) * present).sum(0) / count)
    constant = deviation <= 1e-6 * np.abs(mean)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
    scaled = np.where(missing, 0.0, (values - mean) * scale)
    return np.clip(scaled, -_CLAMP, _CLAMP).astype(np.float32)


def _categorical(dataset: EncodedDataset, rows: np.ndarray, first_train: int) -> np.ndarray:
    offsets = np.cumsum((0, *dataset.categorical_sizes))[:-1]
    codes = dataset.categorical[rows].astype(np.int64)
    codes = np.where(codes > 0, codes + offsets, 0)
    seen = np.zeros(_table_size(dataset), bool)
    seen[codes[first_train:]] = True
    return np.where(seen[codes], codes, 0)


def _images(pixels: np.ndarray, first_train: int, side: int) -> np.ndarray:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
    if images.shape[2:] != (side, side):
        images = torch.nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    values = images.permute(0, 2, 3, 1).numpy()
    by_channel = values.reshape(-1, values.shape[3])
    return _standardise(by_channel, first_train * side * side).reshape(values.shape)
