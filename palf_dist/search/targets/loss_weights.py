"""Target: the loss weights of one dataset and model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palf_dist.learnloss.space import WeightSpace
from palf_dist.search.domains import Domain, LogRange
from palf_dist.search.targets.config import REFERENCE, LossWeightsConfig
from palf_dist.search.targets.networks import NetworkTrainer
from palf_dist.search.targets.rows import SplitRows, load_rows
from palf_dist.search.targets.snapshot import CARD, Snapshot, load_arrays, save_arrays
from palf_dist.search.targets.softmax import SoftmaxTrainer
from palf_dist.search.trial import ON_THE_FLY, Parameters, Report, TrialContext
from palf_dist.tasks.encoded import fingerprints

BEST, CHECKPOINT = "best", "checkpoint"
"""Folders in that of a trial: its best model so far, and the newest state of a network's training."""


class LossWeightsTarget:
    """A trial is one training with the weights that it is given. The best artefact is the best snapshot: its weights,
    what they led to (weights.json) and the model itself (model.safetensors)."""

    error_name = "validation_error"

    def __init__(self, config: LossWeightsConfig) -> None:
        self.config = config
        self.fingerprints: dict[str, str] = {}
        self._space = WeightSpace.of(config.ranges, REFERENCE)

    def check(self) -> None:
        """Raises the DataError or ConfigError that a trial would."""
        data = load_rows(self.config)
        self._trainer(data)
        self.fingerprints = fingerprints({self.config.dataset.name: data.dataset})

    def space(self) -> dict[str, Domain]:
        return {name: LogRange(low=low, high=high) for name, (low, high) in self.config.ranges.items()}

    def weight_space(self) -> WeightSpace:
        return self._space

    def reports(self) -> int:
        return self.config.reports

    def bundles(self) -> list[dict[str, float]]:
        return [{"CPU": 1.0}]

    def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
        """A training that fails (e is no longer finite) ends there."""
        weights = np.array([parameters[name] for name in self._space.names], float)
        best, own = context.folder / BEST, context.folder / CHECKPOINT
        with one_thread():
            for snapshot in self._snapshots(weights, parameters, context.start_from or own):
                if context.stop.is_set():
                    return
                error = snapshot.error if np.isfinite([snapshot.error, *snapshot.features]).all() else float("nan")
                yield Report(
                    step=snapshot.number,
                    error=error,
                    phi=snapshot.features.tolist(),
                    metrics=snapshot.metrics,
                    artefact=self._keep_best(best, weights, snapshot),
                    checkpoint=None if self.config.is_softmax else save_arrays(own, snapshot.model, {}),
                    done=snapshot.last or np.isnan(error),
                    **snapshot.details,
                )
                if np.isnan(error):
                    return

    def finish(self, best: Path) -> dict[str, Any]:
        """The share of test rows that the best model gets wrong, beside what is known of it from the validation rows,
        the weights that it was trained with, and a certificate where there can be one. Raises CheckpointError where
        ``best`` cannot be read."""
        model, card = load_arrays(best)
        with one_thread():
            trainer = self._trainer(load_rows(self.config))
            final = {name: card[name] for name in ("validation_error", "validation_misclassified")}
            final |= {"best_parameters": card["weights"], "test_error": trainer.misclassified(model, "test")}
            if isinstance(trainer, SoftmaxTrainer):
                proven = trainer.certificate(np.array(list(card["weights"].values())), model)
                if proven is not None:
                    final |= {"certificate": {**asdict(proven), "gap": proven.gap}, "why_no_certificate": None}
            return final

    def _snapshots(self, weights: np.ndarray, parameters: Parameters, source: Path) -> Iterator[Snapshot]:
        trainer = self._trainer(load_rows(self.config))
        if isinstance(trainer, SoftmaxTrainer):
            return trainer.train(weights, bool(parameters.get(ON_THE_FLY, False)))
        return trainer.train(weights, load_arrays(source)[0] if (source / CARD).exists() else None)

    def _keep_best(self, folder: Path, weights: np.ndarray, snapshot: Snapshot) -> Path | None:
        """The folder that holds the trial's best: the snapshot, unless what is there is better, which the search may
        never have heard of. None where the training has failed."""
        if not np.isfinite(snapshot.error):
            return None
        if (folder / CARD).exists() and load_arrays(folder)[1]["validation_error"] < snapshot.error:
            return folder
        used = np.array(snapshot.details.get("weights", weights))
        card = {
            "weights": self._space.named(used),
            "features": dict(zip((REFERENCE, *self._space.names), snapshot.features.tolist(), strict=True)),
            "validation_error": snapshot.error,
            "validation_misclassified": snapshot.misclassified,
            "report": snapshot.number,
            "trained_to_the_end": snapshot.last,
            "target": self.config.model_dump(mode="json"),
        }
        return save_arrays(folder, snapshot.model, card)

    def _trainer(self, data: SplitRows) -> SoftmaxTrainer | NetworkTrainer:
        return (SoftmaxTrainer if self.config.is_softmax else NetworkTrainer)(self.config, data)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A network's numbers depend on how many threads torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
