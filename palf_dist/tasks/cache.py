"""The cache folder of converted datasets, and writes that are either whole or not there at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from palf_dist.atomic import sync
from palf_dist.errors import DataError


def cache_folder(cache: str | None) -> Path:
    """The folder named by ``data.cache``, else by $PALF_CACHE, else ./.palf_cache. Never the home folder."""
    return Path(cache or os.environ.get("PALF_CACHE") or ".palf_cache").absolute()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place, synced to disk, once the block ends without error.

    Every writer has a path of its own: several processes may fill one cache. Raises DataError when the folder cannot
    be written.
    """
    part = path.with_name(f".part-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
    except OSError as error:
        raise DataError(
            f"the cache folder {path.parent} cannot be written ({error.strerror}): "
            "name another one in data.cache or $PALF_CACHE"
        ) from error
    try:
        yield part
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
