"""The rows of one dataset that a search tunes loss weights on: split once, and read the way the model reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from palf_dist.architecture_config import Architecture, MLPConfig
from palf_dist.config import DataConfig, DatasetSource
from palf_dist.errors import ConfigError, DataError
from palf_dist.randomness import random_generator
from palf_dist.search.targets.config import LossWeightsConfig, RowsConfig, SoftmaxConfig
from palf_dist.tasks.corruptions import add_label_noise
from palf_dist.tasks.datasets import load_dataset
from palf_dist.tasks.encoded import EncodedDataset
from palf_dist.tasks.inputs import fits, read_inputs
from palf_dist.tasks.splits import MIN_CLASS_ROWS

SPLITS = ("test", "validation", "train")
SHARES = {"test": 0.3, "validation": 0.3, "train": 0.4}


@dataclass(frozen=True)
class SplitRows:
    """Rows of a dataset by split, with their labels 0 .. classes - 1; those of training carry the label noise."""

    dataset: EncodedDataset
    rows: dict[str, np.ndarray]  # split -> [n] indices into the dataset
    labels: dict[str, np.ndarray]  # split -> [n]
    classes: int

    def inputs(self, architecture: Architecture) -> dict[str, tuple[np.ndarray, ...]]:
        """What a network reads of each split (types.Inputs without the task axis), by statistics of training rows."""
        edges = np.cumsum([len(self.rows[split]) for split in SPLITS])[:-1]
        joined = np.concatenate([self.rows[split] for split in SPLITS])
        columns = read_inputs(architecture, self.dataset, joined, first_train=edges[-1])
        parts = [np.split(column, edges) for column in columns]
        return {split: tuple(part[index] for part in parts) for index, split in enumerate(SPLITS)}

    def design(self, model: SoftmaxConfig) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """What softmax regression reads of each split, float64 [n, d], and which of the d columns are categorical.

        Numeric columns and pixels are standardised, categories one-hot; a text is the vector of log(1 + count) of
        its hashed words, scaled to a mean square of 1. A last column of ones stands for the intercept.
        """
        if self.dataset.family == "text":
            assert self.dataset.words is not None
            values = {split: _bag(self.dataset.words[rows], model.vocabulary) for split, rows in self.rows.items()}
            categorical = np.zeros(model.vocabulary, bool)
        else:
            table = 1 + sum(self.dataset.categorical_sizes)
            values = {}
            for split, (numeric, codes) in self.inputs(MLPConfig()).items():
                one_hot = (codes[:, :, None] == np.arange(1, table)).any(1)
                values[split] = np.concatenate([numeric, one_hot], axis=1, dtype=np.float64)
            categorical = np.arange(values["train"].shape[1]) >= values["train"].shape[1] - (table - 1)
        if not model.intercept:
            return values, categorical
        designs = {split: np.concatenate([part, np.ones((len(part), 1))], axis=1) for split, part in values.items()}
        return designs, np.append(categorical, False)


def load_rows(config: LossWeightsConfig) -> SplitRows:
    """The split rows of the configured dataset; the same for every trial.

    Raises DataError for a dataset that cannot be loaded or that the model cannot read, ConfigError for more rows than
    there are.
    """
    data = DataConfig(
        train=(config.dataset,), held_out=(DatasetSource(name="-"),), cache=config.cache, max_rows=config.max_rows
    )
    dataset = load_dataset(config.dataset, data)
    if not isinstance(config.model, SoftmaxConfig) and not fits(config.model, dataset):
        raise DataError(
            f"target.model.kind: {config.model.kind} cannot read {dataset.name} ({dataset.family}): mlp reads tables "
            "and images, with words also texts; conv and resnet read images, transformer texts, softmax all of them"
        )
    counts = np.bincount(dataset.labels)
    kept = np.flatnonzero(counts >= MIN_CLASS_ROWS)
    if len(kept) < 2:
        raise DataError(f"{dataset.name}: fewer than two classes have {MIN_CLASS_ROWS} rows; use a larger dataset")
    usable = np.flatnonzero(np.isin(dataset.labels, kept))
    labels = np.searchsorted(kept, dataset.labels)
    rows = _split(usable, labels, _sizes(config.rows, len(usable), len(kept), dataset.name), config.seed)
    by_split = {split: labels[chosen] for split, chosen in rows.items()}
    noise = config.label_noise
    by_split["train"] = add_label_noise(
        by_split["train"], noise.kind, noise.rate, len(kept), random_generator("loss_weights", config.seed, "noise")
    )
    return SplitRows(dataset, rows, by_split, len(kept))


def _sizes(config: RowsConfig, available: int, classes: int, name: str) -> dict[str, int]:
    """Rows of each split. Raises ConfigError where they are too many, or too few to have all classes."""
    sizes = {split: getattr(config, split) or int(share * available) for split, share in SHARES.items()}
    if sum(sizes.values()) > available:
        asked = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise ConfigError(
            f"target.rows: {asked} are more than the {available} rows of {name}; lower one, or give all three"
        )
    for split, size in sizes.items():
        if size < classes:
            raise ConfigError(f"target.rows.{split}: {size} rows cannot have all {classes} classes of {name}; raise it")
    return sizes


def _split(rows: np.ndarray, labels: np.ndarray, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Cut one keyed order of the rows. In it each class is spread evenly, so that every slice is stratified."""
    generator = random_generator("loss_weights", seed, "rows")
    shuffled = generator.permutation(rows)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels[by_class])
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = by_class[np.argsort((rank + generator.random(len(rows))) / np.repeat(counts, counts), kind="stable")]
    edges = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, np.split(order[: edges[-1]], edges[:-1]), strict=True))


def _bag(words: np.ndarray, vocabulary: int) -> np.ndarray:
    counts = np.zeros((len(words), vocabulary))
    row, _ = np.nonzero(words)
    np.add.at(counts, (row, words[words > 0] % vocabulary), 1.0)
    values = np.log1p(counts)
    return values / np.maximum(np.sqrt((values**2).mean(1, keepdims=True)), 1e-12)
