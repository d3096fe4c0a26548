"""Warnings that name the line of the user's own code."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_OURS = tuple(f"{Path(module).parent}/" for module in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """A UserWarning about the innermost line that is neither in this package nor in torch, which calls our methods. So
    it says where to add what is missing, and Python shows it once for each such line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
