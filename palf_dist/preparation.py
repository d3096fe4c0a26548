"""What is found on tasks of the training datasets before a run's real work, as units and what they come to: learning
rate and L2 strength of plain cross-entropy, which every method gets; the hyper-parameters of the tuned baselines, on
the same tasks; and the statistics that normalise the state features.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np

from palf_dist.config import RunConfig
from palf_dist.evaluation.methods import Method, tuned_together
from palf_dist.tasks.family import whole_turns
from palf_dist.types import Contribution, TaskSpec, Unit

TUNING_GROUPS = 4  # task groups per grid point: fewer leave the choice to chance
CALIBRATION_GROUPS = 2

Key = TypeVar("Key", bound=Hashable)


def canonical(settings: Mapping[str, Any]) -> str:
    """The settings of a unit as text; equal ones give equal text."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def tune_units(config: RunConfig) -> list[Unit]:
    """One unit per architecture, optimiser, grid point and task group; none where both values are given."""
    if config.inner.learning_rate != "tuned" and config.inner.weight_decay != "tuned":
        return []
    points = [
        {"architecture": a, "optimiser": o, "learning_rate": r, "weight_decay": w, "group": g}
        for a, o in _trainings(config)
        for r, w in _grid(config, o)
        for g in range(whole_turns(config, TUNING_GROUPS))
    ]
    return [Unit("tune", 0, index, canonical(point)) for index, point in enumerate(points)]


def reduce_tune(config: RunConfig, contributions: Sequence[Contribution]) -> dict[str, Any]:
    """Learning rate and L2 strength of the best mean accuracy of plain cross-entropy, per architecture/optimiser."""
    inner = config.inner
    if not contributions:
        chosen = {"learning_rate": inner.learning_rate, "weight_decay": inner.weight_decay}
        return {"reference": {f"{a}/{o}": chosen for a, o in _trainings(config)}}
    scored = [
        (_training(point), {name: point[name] for name in ("learning_rate", "weight_decay")}, accuracy)
        for point, accuracy in _results(contributions)
    ]
    return {"reference": {training: chosen for training, (chosen, _) in _best(scored).items()}}


def edges(config: RunConfig, prepared: Mapping[str, Any]) -> list[str]:
    """Tuned learning rates at an edge of their grid, beyond which a better one may lie; one sentence each."""
    found = []
    for name, chosen in prepared["reference"].items():
        optimiser = name.split("/")[1]
        rates = sorted({rate for rate, _ in _grid(config, optimiser)})
        if len(rates) > 1 and chosen["learning_rate"] in (rates[0], rates[-1]):
            found.append(
                f"architecture/optimiser {name}: the tuned learning rate {chosen['learning_rate']:g} is at an edge of "
                f"its grid; a wider inner.grids.{optimiser}.learning_rate may hold a better one"
            )
    return found


def baseline_units(config: RunConfig) -> list[Unit]:
    """As ``tune_units``, for the hyper-parameters of the static losses of the comparison (``tuned_together``), on the
    tasks and with the values that were found for cross-entropy."""
    points = [
        {"architecture": a, "optimiser": o, "method": method.name, "hyperparameters": point, "group": g}
        for method in tuned_together(config.evaluation.methods)
        for a, o in _trainings(config)
        for point in method.points
        for g in range(whole_turns(config, TUNING_GROUPS))
    ]
    return [Unit("tune", 0, index, canonical(point)) for index, point in enumerate(points)]


def reduce_baselines(contributions: Sequence[Contribution]) -> dict[str, Any]:
    """Hyper-parameters of the best mean accuracy, and that accuracy, by method and by architecture/optimiser; nothing
    where there was nothing to tune."""
    scored = [
        ((point["method"], _training(point)), point["hyperparameters"], accuracy)
        for point, accuracy in _results(contributions)
    ]
    found: dict[str, dict[str, Any]] = {}
    for (method, training), (chosen, accuracy) in _best(scored).items():
        found.setdefault(method, {})[training] = {"hyperparameters": chosen, "accuracy": accuracy}
    return {"baselines": found} if found else {}


def found_by_tuning(method: Method, spec: TaskSpec, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What was found for a static method on trainings as that of the task; nothing where it was not looked for."""
    training = f"{spec.architecture}/{spec.optimiser}"
    return prepared.get("baselines", {}).get(method.name, {}).get(training, {})


def tuning_columns(method: Method, spec: TaskSpec, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """The same as columns of a result, where any method of the comparison has them."""
    if "baselines" not in prepared:
        return {}
    found = found_by_tuning(method, spec, prepared)
    chosen = found.get("hyperparameters")
    return {"tuned": canonical(chosen) if chosen else None, "tuning_accuracy": found.get("accuracy")}


def calibrate_units(config: RunConfig) -> list[Unit]:
    return [Unit("calibrate", 0, group) for group in range(whole_turns(config, CALIBRATION_GROUPS))]


def reduce_calibrate(config: RunConfig, contributions: Sequence[Contribution]) -> dict[str, Any]:
    """Mean and standard deviation of each state feature over the known values of all refreshes and tasks. Those of what
    an adapting policy reads are its unit, however small; 1 for an output that nothing answers to."""
    ordered = sorted(contributions, key=lambda item: item.unit)
    count, total, square = (sum(c.arrays[name] for c in ordered) for name in ("count", "sum", "square"))
    known = np.maximum(count, 1)
    mean = np.asarray(total / known)
    std = np.sqrt(np.maximum(square / known - mean**2, 0))
    if config.policy.kind == "maml":
        std = np.where(np.hypot(mean, std) < np.finfo(np.float32).tiny, 1.0, std)
    else:
        std = np.where(std < 1e-3, 1.0, std)  # a feature that never varied says nothing
    return {"feature_mean": mean.astype(np.float32).tolist(), "feature_std": std.astype(np.float32).tolist()}


def _trainings(config: RunConfig) -> list[tuple[int, str]]:
    """The pairs of architecture and optimiser, each of which is tuned by itself."""
    return list(product(range(len(config.tasks.architectures)), config.tasks.optimisers))


def _training(point: Mapping[str, Any]) -> str:
    return f"{point['architecture']}/{point['optimiser']}"


def _grid(config: RunConfig, optimiser: str) -> list[tuple[float, float]]:
    """The pairs of learning rate and weight decay to try."""
    inner = config.inner
    grid = getattr(inner.grids, optimiser)
    rates = grid.learning_rate if inner.learning_rate == "tuned" else (inner.learning_rate,)
    decays = grid.weight_decay if inner.weight_decay == "tuned" else (inner.weight_decay,)
    return list(product(rates, decays))


def validated_pairs(config: RunConfig) -> list[dict[str, float]]:
    """The pairs of learning rate and L2 strength that a method which is tuned on each held-out task is tuned among:
    the whole grid of these tasks' optimiser, whatever the configuration gives to the others."""
    grid = getattr(config.inner.grids, config.tasks.optimisers[0])
    return [
        {"learning_rate": rate, "weight_decay": decay} for rate, decay in product(grid.learning_rate, grid.weight_decay)
    ]


def _results(contributions: Sequence[Contribution]) -> list[tuple[dict[str, Any], float]]:
    """Settings and accuracy of each unit, in key order."""
    ordered = sorted(contributions, key=lambda item: item.unit)
    return [(json.loads(item.unit.settings), item.metrics["accuracy"]) for item in ordered]


def _best(scored: Sequence[tuple[Key, dict[str, float], float]]) -> dict[Key, tuple[dict[str, float], float]]:
    """For each key the point of the best mean score, the first of equals, and that mean."""
    scores: dict[Key, dict[str, list[float]]] = {}
    for key, point, score in scored:
        scores.setdefault(key, {}).setdefault(canonical(point), []).append(score)
    found = {}
    for key, by_point in scores.items():
        means = {point: float(np.mean(values)) for point, values in by_point.items()}
        best = max(means, key=means.__getitem__)
        found[key] = (json.loads(best), means[best])
    return found
