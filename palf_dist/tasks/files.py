"""Parquet files wherever they lie: this machine, s3://, gs://, hf://; a file, a folder or a glob."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re

import pyarrow as pa
import pyarrow.fs as pafs

from palf_dist.errors import DataError

_SAMPLE = 1 << 16  # bytes read at either end of a file to recognise its contents


def parquet_files(path: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """The file system of ``path`` and its Parquet files in order of name. DataError when there is none."""
    wildcard = re.search(r"[*?\[]", path)
    base = path[: path.rfind("/", 0, wildcard.start()) + 1] if wildcard else path
    filesystem, root = _open(base or ".", path)
    pattern = f"{root.rstrip('/')}/{path[len(base) :]}"
    try:
        found = filesystem.get_file_info(root.rstrip("/") or "/")
        if found.type == pafs.FileType.Directory:
            selector = pafs.FileSelector(found.path, recursive=True)
            files = [info for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
        else:
            files = [found] if found.type == pafs.FileType.File else []
    except Exception as error:
        # The hub's client raises those of its HTTP library, which are no OSError.
        if not (isinstance(error, (OSError, pa.ArrowException)) or path.startswith("hf://")):
            raise
        raise DataError(f"{path}: cannot be reached ({error})") from error
    if wildcard:
        files = [info for info in files if _matches(info.path, pattern)]
    elif found.type == pafs.FileType.Directory:
        files = [info for info in files if info.path.endswith(".parquet")]
    if not files:
        what = "no such file or folder" if found.type == pafs.FileType.NotFound else "no Parquet file there"
        raise DataError(f"{path}: {what}; check the dataset's path")
    return filesystem, sorted(files, key=lambda info: info.path)


def fingerprint(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """A name for a file's contents, the same for every copy: a digest of its size and both ends (the footer of a
    Parquet file, with its statistics and offsets, is at the end)."""
    with filesystem.open_input_file(info.path) as file:
        size = file.size()
        head = file.read_at(min(size, _SAMPLE), 0)
        tail = file.read_at(min(size, _SAMPLE), max(0, size - _SAMPLE))
    return hashlib.sha256(b"%d:" % size + head + tail).hexdigest()[:32]


def _open(base: str, path: str) -> tuple[pafs.FileSystem, str]:
    if base.startswith("hf://"):
        try:
            from huggingface_hub import HfFileSystem
        except ImportError as error:
            raise DataError(f"{path}: hf:// paths need one more package: pip install huggingface_hub") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem())), base.removeprefix("hf://")
    if "://" in base:
        try:
            return pafs.FileSystem.from_uri(base)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be opened ({error})") from error
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(base))


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) and ("**" in pattern or path.count("/") == pattern.count("/"))
