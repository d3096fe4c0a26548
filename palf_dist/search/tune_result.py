"""A result of Ray Tune as TuneLoss wants it: numbers checked and ordered, then one outcome per training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from palf_dist.errors import ConfigError
from palf_dist.learnloss.records import Outcome, Sensitivity
from palf_dist.learnloss.space import WeightSpace

GRADIENT, CURVATURE = "gradient", "curvature"
"""Keys of a result."""


class TrialReport(NamedTuple):
    """One report of a trial, with e turned into an error (negated in max mode)."""

    error: float
    features: list[float]  # [K], the reference first; NaN where a failed training had none to report
    gradient: list[float] | None  # [k] d error / d lambda
    curvature: list[list[float]] | None  # [k, k]


def read(result: Mapping[str, Any], space: WeightSpace, metric: str, features: str, sign: float) -> TrialReport:
    """A result of Tune (flat: a dict under ``phi`` has become ``phi/name``) as a report; errors are sign * metric."""
    error = sign * float(_numbers(result, metric, ()))
    names = (space.reference, *space.names)
    phi = _by_name(result, features, names)
    if phi is None:
        if np.isfinite(error):
            raise ConfigError(
                f"{features}: not in the report of trial {result.get('trial_id')}, which has {metric}; report the "
                f"features of the training loss with it, as a list of {', '.join(names)} or a dict by these names"
            )
        phi = np.full(len(names), np.nan)
    if not np.isfinite(phi).all():
        error = np.nan  # the training diverged, whatever its last error says
    gradient = _by_name(result, GRADIENT, space.names)
    curvature = _numbers(result, CURVATURE, (space.size, space.size)) if CURVATURE in result else None
    if curvature is not None and gradient is None:
        raise ConfigError(f"{CURVATURE}: reported without {GRADIENT}; report both, or {GRADIENT} alone")
    return TrialReport(
        error,
        phi.tolist(),
        None if gradient is None else (sign * gradient).tolist(),
        None if curvature is None else (sign * curvature).tolist(),
    )


def _by_name(result: Mapping[str, Any], key: str, names: Sequence[str]) -> np.ndarray | None:
    """The vector under ``key``, reported as a list or as a dict by name; None where there is none."""
    if key in result:
        return _numbers(result, key, (len(names),), f" in the order {', '.join(names)}")
    named = {name.removeprefix(f"{key}/") for name in result if name.startswith(f"{key}/")}
    if not named:
        return None
    if named != set(names):
        raise ConfigError(f"{key}: reported by the names {', '.join(sorted(named))}; it must have {', '.join(names)}")
    return np.array([float(_numbers(result, f"{key}/{name}", ())) for name in names])


def _numbers(result: Mapping[str, Any], key: str, shape: tuple[int, ...], order: str = "") -> np.ndarray:
    try:
        array = np.asarray(result[key], float)
    except (TypeError, ValueError):
        array = None
    if array is None or array.shape != shape:
        wanted = f"{' x '.join(map(str, shape))} numbers" if shape else "a number"
        raise ConfigError(f"{key}: trial {result.get('trial_id')} reported {result[key]!r}; report {wanted}{order}")
    return array


def failure(size: int) -> TrialReport:
    """What a training that crashed would have reported; ``size``: k."""
    return TrialReport(np.nan, [np.nan] * (size + 1), None, None)


def outcome_of(seen: Sequence[TrialReport], complete: bool) -> Outcome:
    """All snapshots of a training; the sensitivity is of use only where the last one is of the trained model."""
    last, sensitivity = seen[-1], None
    if complete and last.gradient is not None and np.isfinite(last.gradient).all():
        finite = last.curvature is not None and np.isfinite(last.curvature).all()
        sensitivity = Sensitivity(np.array(last.gradient), np.array(last.curvature) if finite else None)
    return Outcome(
        np.array([report.features for report in seen]), np.array([report.error for report in seen]), sensitivity
    )
