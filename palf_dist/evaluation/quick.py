"""A held-out comparison that is cut down to see that everything works. Its figures are no results."""

from __future__ import annotations

from collections.abc import Sequence

from palf_dist.config import RunConfig
from palf_dist.evaluation.methods import select_methods

METHODS = ("policy", "ce", "s5", "label_smoothing", "curriculum")
"""One of each sort of method, as far as the configuration has them."""

CONDITIONS = 3
"""Conditions of a suite that are kept: the first ones."""

NO_RESULTS = (
    "--quick: one task for each dataset and condition, few conditions and methods, nothing tuned. These figures are no "
    "results; leave --quick out for some."
)


def cut(config: RunConfig) -> RunConfig:
    """The configuration with less to do: every held-out dataset once under few conditions, few methods, and the middle
    of a grid in the place of a tuned value."""
    evaluation, inner = config.evaluation, config.inner
    grid = getattr(inner.grids, config.tasks.optimisers[0])  # held-out tasks have the first one
    values = {
        name: _middle(getattr(grid, name))
        for name in ("learning_rate", "weight_decay")
        if getattr(inner, name) == "tuned"
    }
    wanted = [method.name for method in select_methods(evaluation.methods)]
    less = {
        "methods": tuple(name for name in METHODS if name in wanted),
        "seeds": 1,
        "suite_conditions": evaluation.suite_conditions[:CONDITIONS],
        "noise_rates": tuple(sorted({min(evaluation.noise_rates), max(evaluation.noise_rates)})),
    }
    return config.model_copy(
        update={"inner": inner.model_copy(update=values), "evaluation": evaluation.model_copy(update=less)}
    )


def _middle(values: Sequence[float]) -> float:
    return values[len(values) // 2]
