"""The random-number rule of the whole project. Needs numpy only."""

from __future__ import annotations

import zlib

import numpy as np


def random_generator(*keys: int | str) -> np.random.Generator:
    """The one source of randomness: a generator that depends on the keys alone, never on process state.

    Strings are hashed with CRC-32, so that the draws are the same in every process and on every machine.
    """
    words = [zlib.crc32(key.encode()) if isinstance(key, str) else int(key) for key in keys]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
