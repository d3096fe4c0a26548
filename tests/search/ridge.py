"""A small convex problem and trainables for it, in a module that a trial's process imports fast."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from palf_dist.randomness import random_generator

RANGES = {"first": (1e-4, 1e2), "second": (1e-4, 1e2)}
STEPS = 3
GROUPS = np.repeat(np.eye(2), 4, axis=0)  # [8 coefficients, 2]


def ridge(weights: np.ndarray) -> tuple[float, list[float], list[float]]:
    """Ridge regression with one penalty for each half of the coefficients, of which the second half matters less:
    validation error, phi [3], d e / d weights [2]."""
    generator = random_generator(1, "ridge")
    x, x_val = generator.normal(size=(16, 8)), generator.normal(size=(200, 8))
    truth = np.repeat([1.0, 0.3], 4)
    y, y_val = (data @ truth + generator.normal(size=len(data)) for data in (x, x_val))
    hessian = x.T @ x / len(x) + np.diag(GROUPS @ weights)
    w = np.linalg.solve(hessian, x.T @ y / len(x))
    slope = 2 * x_val.T @ (x_val @ w - y_val) / len(x_val)
    gradient = -(np.linalg.solve(hessian, slope) * w) @ GROUPS
    return float(np.mean((x_val @ w - y_val) ** 2)), [np.mean((x @ w - y) ** 2), *(w**2 @ GROUPS)], list(gradient)


def train_once(config: dict[str, Any]) -> None:
    e, phi, gradient = ridge(np.array([config["first"], config["second"]]))
    terms = dict(zip(("fit", *RANGES), phi, strict=True))
    tune.report({"accuracy": 1 - e, "terms": terms, "gradient": [-slope for slope in gradient]})


def train_in_steps(config: dict[str, Any]) -> None:
    """Snapshots on a path to the trained model, each with a checkpoint; the file ``pace`` has the seconds between."""
    checkpoint, start = tune.get_checkpoint(), 0
    if checkpoint:
        with checkpoint.as_directory() as folder:
            start = json.loads((Path(folder) / "step.json").read_text())
    folder = Path(tune.get_context().get_trial_dir()) / "own"
    folder.mkdir(exist_ok=True)
    for step in range(start + 1, STEPS + 1):
        strength = 2.0 ** (STEPS - step)
        e, phi, _ = ridge(strength * np.array([config["first"], config["second"]]))
        (folder / "step.json").write_text(json.dumps(step))
        time.sleep(float(Path(config["pace"]).read_text()) if "pace" in config else 0.0)
        tune.report({"e": e, "phi": phi}, checkpoint=tune.Checkpoint.from_directory(folder))


def no_features(config: dict[str, Any]) -> None:
    tune.report({"e": 1.0, "phi": [1.0]})
