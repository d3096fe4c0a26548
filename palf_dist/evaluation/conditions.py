"""What conditions of a held-out comparison are, by name: rows tell the name, their configuration the rest."""

from __future__ import annotations

from palf_dist.config import EvaluationConfig


def imbalanced(evaluation: EvaluationConfig) -> frozenset[str]:
    """The conditions whose training rows are made imbalanced."""
    if not evaluation.suite_conditions:
        return frozenset({"matched", "shifted"})
    return frozenset(item.name for item in evaluation.suite_conditions if item.imbalance > 1)


def as_is(evaluation: EvaluationConfig) -> frozenset[str]:
    """The conditions that leave a dataset as it is: all its rows at its own class frequencies, and no noise added.
    Without a suite there are none: the number of training rows is then drawn for each task."""
    return frozenset(
        item.name
        for item in evaluation.suite_conditions
        if item.train_size is None and item.imbalance == 1 and item.noise_rate == 0 and item.target_prior == "train"
    )
