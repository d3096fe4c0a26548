"""Softmax regression on the rows of one dataset: convex, with exact derivatives of e in the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from palf_dist.errors import ConfigError
from palf_dist.learnloss.certificates import BallCertificate, Certificate
from palf_dist.learnloss.on_the_fly import OnTheFly
from palf_dist.learnloss.softmax import LabelledRows, SoftmaxRegression
from palf_dist.search.targets.config import L2_PARTS, LossWeightsConfig, SoftmaxConfig
from palf_dist.search.targets.rows import SplitRows
from palf_dist.search.targets.snapshot import Snapshot

COEFFICIENTS = "coefficients"
CERTIFIED_GAP, CERTIFYING_TRAININGS = 0.1, 30
"""What a certificate aims at, relative to the error, and how many trainings it may take."""


class SoftmaxTrainer:
    """Trains to convergence from zero; e is the mean cross-entropy of the validation rows."""

    def __init__(self, config: LossWeightsConfig, data: SplitRows) -> None:
        """Raises ConfigError where an L2 weight has no columns to weigh."""
        assert isinstance(config.model, SoftmaxConfig)
        inputs, categorical = data.design(config.model)
        parts = {"l2_numeric": ~categorical, "l2_categorical": categorical}
        groups = parts if L2_PARTS.keys() & config.ranges.keys() else {"l2": np.ones(len(categorical), bool)}
        for name, columns in groups.items():
            if config.model.intercept:
                columns[-1] = False
            if name in config.ranges and not columns.any():
                raise ConfigError(f"target.weights.{name}: {data.dataset.name} has no such columns; leave it out")
        self._count = config.snapshots
        self._certifiable = set(config.ranges) == {"l2"} and not config.model.intercept
        self._rows = {split: LabelledRows(inputs[split], data.labels[split]) for split in inputs}
        self.regression = SoftmaxRegression(
            self._rows["train"],
            self._rows["validation"],
            data.classes,
            groups,
            config.ranges,
            max_iterations=config.model.max_iterations,
        )

    def train(self, weights: np.ndarray, on_the_fly: bool = False) -> Iterator[Snapshot]:
        """Snapshots of a training with weights [k]; those of ``on_the_fly`` are chosen anew every
        few iterations from what the training itself has shown. The last one is the trained model and has the
        derivatives of e: a trial cannot be asked for them later. All training is done, and counted, before the first
        snapshot."""
        used, waypoints = weights, []
        if on_the_fly:
            guide = OnTheFly(self.regression.space)
            used, outcome = self.regression.train_on_the_fly(guide.choose, guide.refine)
            waypoints = [waypoint.state() for waypoint in guide.waypoints]
        else:
            outcome = self.regression.train(weights)
        assert outcome.models is not None
        models, count = outcome.models, len(outcome.models)
        kept = np.unique(np.geomspace(1, count, min(self._count, count)).round().astype(int))
        for number, index in enumerate(kept - 1, 1):
            details: dict[str, Any] = {"weights": used.tolist()} if on_the_fly else {}
            cost, last = outcome.cost, bool(index == count - 1)
            if last:
                sensitivity = outcome.derivatives()
                assert sensitivity is not None and sensitivity.curvature is not None
                details |= {"gradient": sensitivity.gradient.tolist(), "curvature": sensitivity.curvature.tolist()}
                details |= {"waypoints": waypoints} if on_the_fly else {}
                cost += sensitivity.cost
            model = {COEFFICIENTS: models[index]}
            share = self.misclassified(model, "validation")
            error = float(outcome.errors[index])
            yield Snapshot(number, last, outcome.features[index], error, model, share, float(cost), details)

    def certificate(self, weights: np.ndarray, model: dict[str, np.ndarray]) -> Certificate | None:
        """How far from the best possible the validation error of the best model can be, by further trainings; None
        unless l2 alone is tuned and weighs all coefficients: the loss must be strongly convex, and with more weights no
        useful bound was ever reached."""
        if not self._certifiable:
            return None
        ball = BallCertificate(self.regression, np.array([0.0, 1.0]), CERTIFIED_GAP)
        ball.add(weights, model[COEFFICIENTS])
        for _ in range(CERTIFYING_TRAININGS):
            following = ball.refine()
            if following is None:
                break
            ball.add(following, self.regression.fit(following))
        return ball.certificate()

    def misclassified(self, model: dict[str, np.ndarray], split: str) -> float:
        """Share of the rows of a split that the model of a snapshot gets wrong."""
        rows = self._rows[split]
        return float(((rows.inputs @ model[COEFFICIENTS]).argmax(1) != rows.labels).mean())
