"""LearnLoss, TuneLoss and a scikit-learn estimator: loss weights tuned by exact methods. Needs no torch and no ray."""

from __future__ import annotations

from typing import TYPE_CHECKING

from palf_dist.learnloss.learn_loss import LearnLoss
from palf_dist.learnloss.space import WeightSpace
from palf_dist.learnloss.tuning import TuneLoss, tune_loss  # at once: the function takes the name of its own module

if TYPE_CHECKING:
    from palf_dist.learnloss.classifier import TuneLossClassifier

__all__ = ["LearnLoss", "TuneLoss", "TuneLossClassifier", "WeightSpace", "tune_loss"]


def __getattr__(name: str) -> object:
    """Import lazily: only the classifier needs scikit-learn, which takes a second to load."""
    if name == "TuneLossClassifier":
        from palf_dist.learnloss.classifier import TuneLossClassifier

        return TuneLossClassifier
    raise AttributeError(f"module 'palf_dist.learnloss' has no attribute {name!r}")
