"""Names that come from a file lead nowhere but into the folder that the file lies in."""

from __future__ import annotations

import os
from pathlib import Path


def is_inside(folder: Path, path: Path) -> bool:
    """Whether ``path``, links followed, lies in ``folder``."""
    return path.resolve().is_relative_to(folder.resolve())


def link_out_of(folder: Path) -> Path | None:
    """A symbolic link somewhere in ``folder`` that leads out of it; None where there is none."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() and not is_inside(folder, path):
                return path
    return None
