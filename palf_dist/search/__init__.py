"""The outer search on Ray Tune, and TuneLoss as a searcher for anybody's own Tuner."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palf_dist.search.searcher import TuneLossSearcher

__all__ = ["TuneLossSearcher"]


def __getattr__(name: str) -> object:
    """Import lazily: what never searches must not wait for Ray Tune."""
    if name == "TuneLossSearcher":
        from palf_dist.search.searcher import TuneLossSearcher

        return TuneLossSearcher
    raise AttributeError(f"module 'palf_dist.search' has no attribute {name!r}")
