"""Files under a URI (s3://, gs://, any scheme of pyarrow; file:// for a folder that all nodes share): read and written
whole, and never outside that URI. What goes wrong raises OSError; pyarrow is imported when the first one is opened.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

from palf_dist.atomic import sync
from palf_dist.errors import RunDirectoryError
from palf_dist.redaction import has_credentials, redact

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SAFE_PART = re.compile(r"[\w=-][\w.=-]*")


def is_uri(path: str | Path) -> bool:
    return "://" in str(path)


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is a URI of something that no program can open as a file of this machine."""
    return is_uri(path) and not str(path).lower().startswith("file://")


def local_path(path: str | Path) -> Path:
    """The absolute folder that a path or a file:// URI names. Raises RunDirectoryError for other URIs."""
    if not is_uri(path):
        return Path(path).expanduser().absolute()
    if is_remote(path):
        raise RunDirectoryError(
            f"run directory: {redact(str(path))} is a URI, and this needs a local or mounted folder; only meta-train, "
            "evaluate and report work on a URI"
        )
    parts = urlsplit(str(path))
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise RunDirectoryError(f"run directory: {path} is not file:// and an absolute path, as in file:///mnt/run")
    return Path(unquote(parts.path))


def join(place: str | Path, name: str) -> str:
    """The path or URI of the file ``name`` in a folder; the query of a URI, with its endpoint, stays at the end."""
    if not is_uri(place):
        return str(Path(place) / name)
    location, mark, query = str(place).partition("?")
    return f"{location.rstrip('/')}/{name}{mark}{query}"


def split(file: str | Path) -> tuple[str, str]:
    """The folder and the name of a file, the opposite of ``join``."""
    location, mark, query = str(file).partition("?")
    folder, _, name = location.rstrip("/").rpartition("/")
    return folder + mark + query, name


def safe_name(name: str) -> str:
    """``name``, relative and of ordinary characters, so that it cannot lead out of the folder it is looked up in.

    Raises OSError where it could.
    """
    if not all(_SAFE_PART.fullmatch(part) for part in name.split("/")):
        raise OSError(f"{name!r} is no name of a file of a run")
    return name


class Storage:
    """The files under one URI. Names are relative to it, with slashes, and checked by ``safe_name``."""

    def __init__(self, uri: str) -> None:
        """Nothing is read or written yet. Raises RunDirectoryError for a URI that cannot be used at all."""
        self.uri = uri
        self._filesystem, self._root = _open(uri)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        with _os_errors(), self._filesystem.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Replace a file: a reader sees the old or the new one, as object stores and a rename promise."""
        path = self._path(name)
        with _os_errors():
            if self._filesystem.type_name != "local":
                with self._filesystem.open_output_stream(path) as stream:
                    stream.write(content)
                return
            target = Path(path)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")  # several may write the same file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                sync(temporary)
                os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            sync(target.parent)

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with _os_errors():
            try:
                self._filesystem.delete_file(self._path(name))
            except FileNotFoundError:
                return

    def delete_folder(self, name: str) -> None:
        """Remove all files below ``name``, if there are any."""
        with _os_errors():
            try:
                self._filesystem.delete_dir(self._path(name))
            except FileNotFoundError:
                return

    def names(self, folder: str = "", recursive: bool = True) -> list[str]:
        """Files below ``folder`` in order of name, with ``recursive=False`` files and folders right in it.

        Hidden ones and those with names that are not safe are left out.
        """
        return [name for name, is_file in self._list(folder, recursive) if is_file or not recursive]

    def names_without(self, folders: Collection[str]) -> list[str]:
        """All files but those below some ``folders``, which are not even listed: they may be many."""
        tops = [(name, is_file) for name, is_file in self._list("", False) if name not in folders]
        return [name for top, is_file in tops for name in ([top] if is_file else self.names(top))]

    def open_dataset_files(self, names: list[str]) -> tuple[FileSystem, list[str]]:
        """The file system and the files' paths in it, for those who read Parquet."""
        return self._filesystem, [self._path(name) for name in names]

    def _list(self, folder: str, recursive: bool) -> list[tuple[str, bool]]:
        """Names below a folder, and whether each is a file, in order of name."""
        import pyarrow.fs as pafs

        base = self._path(folder) if folder else self._root
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        with _os_errors():
            found = self._filesystem.get_file_info(selector)
        names = ((info.path[len(self._root) + 1 :], info.is_file) for info in found)
        return sorted(entry for entry in names if all(_SAFE_PART.fullmatch(part) for part in entry[0].split("/")))

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"


def read_file(file: str | Path) -> bytes:
    """The content of a file at a path or a URI. Raises OSError."""
    if not is_uri(file):
        return Path(file).read_bytes()
    folder, name = split(file)
    return Storage(folder).read(name)


def exists(file: str | Path) -> bool:
    """Whether there is a file at a path or a URI. Raises RunDirectoryError where that cannot be told."""
    if not is_uri(file):
        return Path(file).is_file()
    folder, name = split(file)
    try:
        return name in Storage(folder).names(recursive=False)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory: {folder} cannot be reached ({first_line(error)}); check the URI, the credentials and the "
            "network"
        ) from error


def _open(uri: str) -> tuple[FileSystem, str]:
    import pyarrow as pa
    import pyarrow.fs as pafs

    if has_credentials(uri):
        raise RunDirectoryError(
            f"run directory: {redact(uri)} holds credentials, which would end up in logs; leave them out and give them "
            "in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...)"
        )
    try:
        if not is_remote(uri):
            return pafs.LocalFileSystem(), str(local_path(uri))
        filesystem, root = _from_uri(urlsplit(uri))
    except (OSError, pa.ArrowException) as error:
        raise RunDirectoryError(f"run directory: {uri} cannot be used ({first_line(error)})") from error
    root = root.rstrip("/")
    if "/" not in root:
        raise RunDirectoryError(f"run directory: {uri} must name a folder in a bucket, as in s3://bucket/run")
    return filesystem, root


def _from_uri(parts: SplitResult) -> tuple[FileSystem, str]:
    """A small file goes to s3:// in one request where pyarrow knows how to, in three where it does not."""
    import pyarrow as pa
    import pyarrow.fs as pafs

    if parts.scheme == "s3" and "allow_delayed_open" not in parts.query:
        try:
            query = "&".join(filter(None, [parts.query, "allow_delayed_open=true"]))
            return pafs.FileSystem.from_uri(parts._replace(query=query).geturl())
        except pa.ArrowInvalid:
            pass  # an older pyarrow, or a mistake that is told below
    return pafs.FileSystem.from_uri(parts.geturl())


@contextmanager
def _os_errors() -> Iterator[None]:
    """pyarrow's own exceptions as OSError."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def first_line(error: Exception) -> str:
    """What an exception says, in short; storage libraries write paragraphs."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return redact(text.splitlines()[0][:300])
