"""What a user says of the classes: how often each is a training label, and where the model will be used."""

from __future__ import annotations

import torch
from torch import Tensor

from palf_dist.cross_entropy_arguments import PerClass
from palf_dist.errors import ConfigError


def checked_class_counts(values: PerClass) -> Tensor:
    counts = torch.as_tensor(values, dtype=torch.float64).cpu()
    whole = counts.isfinite().all() and (counts >= 0).all() and (counts == counts.round()).all()
    if counts.dim() != 1 or len(counts) < 2 or not whole or counts.sum() < len(counts):
        raise ConfigError(
            f"class_counts: {values} given; needs how many training labels each class has, as whole numbers with a sum "
            "of at least the number of classes (not frequencies)"
        )
    return counts


def log_prior_ratio(class_counts: Tensor | None, target_prior: str | PerClass) -> Tensor | None:
    """log(pi_train / pi_target) [C] with the training frequencies smoothed by one example per class; None: no shift."""
    if isinstance(target_prior, str):
        if target_prior not in ("train", "uniform"):
            raise ConfigError(
                f"target_prior: {target_prior!r} is unknown; give 'train', 'uniform' or class frequencies"
            )
        if target_prior == "train":
            return None
    if class_counts is None:
        raise ConfigError(
            "class_counts: needed to adjust to a target_prior other than 'train'; count the training labels"
        )
    classes = len(class_counts)
    target = torch.full_like(class_counts, 1 / classes)
    if not isinstance(target_prior, str):
        target = torch.as_tensor(target_prior, dtype=torch.float64).cpu()
        if target.shape != class_counts.shape or not target.isfinite().all() or (target <= 0).any():
            raise ConfigError(
                f"target_prior: {target_prior} given; needs one frequency > 0 for each of {classes} classes"
            )
    train = (class_counts + 1) / (class_counts.sum() + classes)
    return (train * target.sum() / target).log()
