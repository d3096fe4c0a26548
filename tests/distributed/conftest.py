"""One private Ray for each module that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import Share, connect


@pytest.fixture(scope="module")
def share() -> Iterator[Share]:
    """What one worker takes of a private Ray with room for three."""
    with connect(DistributedConfig(workers=3)) as given:
        yield given
