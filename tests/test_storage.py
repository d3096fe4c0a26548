from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.storage import Storage, exists, is_remote, join, local_path, read_file, safe_name, split

QUERY = "endpoint_override=127.0.0.1:9&scheme=http"


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../b", "a//b", "", ".", ".hidden", "a\\b", "a/", "a\nb", "..", "a/.b"]
)
def test_names_that_could_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    storage = Storage((tmp_path / "run").as_uri())
    for attempt in (
        lambda: safe_name(name),
        lambda: storage.read(name),
        lambda: storage.write(name, b""),
        lambda: storage.delete(name),
        lambda: storage.delete_folder(name),
    ):
        with pytest.raises(OSError, match="is no name of a file of a run"):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_listed_read_and_deleted(tmp_path: Path) -> None:
    storage = Storage((tmp_path / "run").as_uri())
    assert storage.names() == storage.names("checkpoints") == []
    for name in ("config.yaml", "checkpoints/step-000002/state.json", "trajectories/step=000001/group-0000.parquet"):
        storage.write(name, b"old")
        storage.write(name, name.encode())
        assert storage.read(name) == name.encode() == (tmp_path / "run" / name).read_bytes()
    (tmp_path / "run" / ".lock").touch()
    assert storage.names(recursive=False) == ["checkpoints", "config.yaml", "trajectories"]
    assert storage.names("checkpoints") == ["checkpoints/step-000002/state.json"]
    assert len(storage.names()) == 3
    storage.delete("config.yaml")
    storage.delete_folder("checkpoints/step-000002")
    for _ in range(2):
        storage.delete("config.yaml")
        storage.delete_folder("checkpoints/step-000002")
    assert storage.names() == ["trajectories/step=000001/group-0000.parquet"]
    with pytest.raises(FileNotFoundError):
        storage.read("config.yaml")


def test_a_local_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    (tmp_path / "group-0000.parquet" / "x").mkdir(parents=True)  # no file can take its place
    with pytest.raises(OSError):
        storage.write("group-0000.parquet", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["group-0000.parquet"]


def test_the_query_of_a_uri_stays_at_its_end() -> None:
    uri = f"s3://bucket/runs/a?{QUERY}"
    assert join(uri, "best/policy.json") == f"s3://bucket/runs/a/best/policy.json?{QUERY}"
    assert split(f"s3://bucket/runs/a/policy.json?{QUERY}") == (uri, "policy.json")
    assert join("/runs/a", "b") == "/runs/a/b" and split("/runs/a/b") == ("/runs/a", "b")


def test_file_uris_are_local_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a b%"
    folder.mkdir()
    (folder / "x").write_bytes(b"1")
    assert local_path(folder.as_uri()) == folder and not is_remote(folder.as_uri())
    for place in (folder, folder.as_uri()):
        assert read_file(join(place, "x")) == b"1" and exists(join(place, "x")) and not exists(join(place, "y"))


@pytest.mark.parametrize("uri", ["file://host/x", "file:relative://x", "file:///x?y=1", "s3://bucket/run"])
def test_other_uris_are_no_local_paths(uri: str) -> None:
    with pytest.raises(RunDirectoryError, match="run directory: "):
        local_path(uri)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/run?colour=red", "Unexpected query parameter"),
        (f"s3://bucket?{QUERY}", "must name a folder in a bucket"),
        ("s3:///run", "Missing bucket"),
        ("nowhere://x/y", "Unrecognized filesystem type"),
    ],
)
def test_uris_that_cannot_be_used(uri: str, words: str) -> None:
    with pytest.raises(RunDirectoryError, match=words):
        Storage(uri)


@pytest.mark.parametrize("uri", ["s3://KEY:canary-1@bucket/run", "s3://bucket/run?secret_key=canary-1"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(RunDirectoryError, match="holds credentials") as error:
        Storage(uri)
    assert "canary" not in str(error.value)


def test_paths_need_no_pyarrow() -> None:
    """So that --help stays quick."""
    script = "import sys, palf_dist.storage as s; s.join('s3://a/b', 'c'); sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
