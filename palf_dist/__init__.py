"""palf_dist learns how to weigh losses while a model trains. ``AdaptiveLoss`` is the drop-in for your own loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palf_dist.adaptive_loss import AdaptiveLoss

__all__ = ["AdaptiveLoss"]


def __getattr__(name: str) -> object:
    """Import lazily: the command line must not wait for torch to print its help."""
    if name == "AdaptiveLoss":
        from palf_dist.adaptive_loss import AdaptiveLoss

        return AdaptiveLoss
    raise AttributeError(f"module 'palf_dist' has no attribute {name!r}")
