"""palf_dist learns how to weigh losses while a model trains. ``AdaptiveLoss`` is the drop-in for your own loop,
``basis_loss`` makes a function a loss that it can mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palf_dist.adaptive_loss import AdaptiveLoss
    from palf_dist.own_losses import basis_loss

__all__ = ["AdaptiveLoss", "basis_loss"]


def __getattr__(name: str) -> object:
    """Import lazily: the command line must not wait for torch to print its help."""
    if name == "AdaptiveLoss":
        from palf_dist.adaptive_loss import AdaptiveLoss

        return AdaptiveLoss
    if name == "basis_loss":
        from palf_dist.own_losses import basis_loss

        return basis_loss
    raise AttributeError(f"module 'palf_dist' has no attribute {name!r}")
