"""LearnLoss, TuneLoss and a scikit-learn estimator: loss weights tuned by exact methods. Needs no torch and no ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palf_dist.learnloss.classifier import TuneLossClassifier
    from palf_dist.learnloss.learn_loss import LearnLoss
    from palf_dist.learnloss.space import WeightSpace
    from palf_dist.learnloss.tuning import TuneLoss, tune_loss

__all__ = ["LearnLoss", "TuneLoss", "TuneLossClassifier", "WeightSpace", "tune_loss"]

_MODULES = {
    "LearnLoss": "learn_loss",
    "TuneLoss": "tuning",
    "TuneLossClassifier": "classifier",
    "WeightSpace": "space",
    "tune_loss": "tuning",
}


def __getattr__(name: str) -> object:
    """Import lazily: only the classifier needs scikit-learn, which takes a second to load."""
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
