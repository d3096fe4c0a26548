from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from palf_dist.errors import DataError
from palf_dist.tasks.files import fingerprint, parquet_files
from tests.tasks.cases import write_parquet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("train-0.parquet", "train-1.parquet", "test-0.parquet", "more/train-2.parquet")):
        write_parquet(tmp_path / name, pa.table({"x": np.arange(50.0) + index, "label": np.arange(50) % 2}))
    (tmp_path / "README.md").write_text("no table")
    return tmp_path


def names(path: str, folder: Path) -> list[str]:
    return [Path(info.path).relative_to(folder).as_posix() for info in parquet_files(path)[1]]


def test_files_folders_and_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = ["more/train-2.parquet", "test-0.parquet", "train-0.parquet", "train-1.parquet"]
    assert names(f"{folder}/test-0.parquet", folder) == ["test-0.parquet"]
    assert names(str(folder), folder) == names(f"{folder}/", folder) == everything
    assert names(f"{folder}/train-*.parquet", folder) == ["train-0.parquet", "train-1.parquet"]
    assert names(f"{folder}/**/train-?.parquet", folder) == ["more/train-2.parquet"]
    assert names(f"{folder}/*/train-[0-9].parquet", folder) == ["more/train-2.parquet"]
    assert names(folder.as_uri(), folder) == everything
    assert names(f"{folder.as_uri()}/train-*.parquet", folder) == ["train-0.parquet", "train-1.parquet"]
    monkeypatch.chdir(folder)
    assert names("train-*.parquet", folder) == ["train-0.parquet", "train-1.parquet"]
    assert names("more", folder) == ["more/train-2.parquet"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/missing.parquet", "missing.parquet: no such file or folder"),
        ("{folder}/missing/*.parquet", "no such file or folder"),
        ("{folder}/*.csv", "no Parquet file there"),
        ("ftp://host/x.parquet", "cannot be opened"),
    ],
)
def test_paths_that_lead_nowhere_are_one_clear_error(path: str, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        parquet_files(path.format(folder=folder))


def test_hub_paths_name_the_package_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"^hf://datasets/x/y: .*pip install huggingface_hub"):
        parquet_files("hf://datasets/x/y")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client raises errors of its HTTP library, which are no OSError; elsewhere such an error is a defect."""

    class Away:
        def get_file_info(self, _: object) -> None:
            raise RuntimeError("connection refused")

    monkeypatch.setattr("palf_dist.tasks.files._open", lambda base, path: (Away(), base))
    with pytest.raises(DataError, match=r"^hf://datasets/a/b/\*\.parquet: cannot be reached \(connection refused\)$"):
        parquet_files("hf://datasets/a/b/*.parquet")
    with pytest.raises(RuntimeError):
        parquet_files("s3://a/*.parquet")


def test_copies_have_one_fingerprint_and_other_contents_another(folder: Path) -> None:
    shutil.copy(folder / "train-0.parquet", folder / "copy.parquet")
    local = pafs.LocalFileSystem()
    first, copy, other = (
        fingerprint(local, local.get_file_info(str(folder / name)))
        for name in ("train-0.parquet", "copy.parquet", "train-1.parquet")
    )
    assert first == copy != other
