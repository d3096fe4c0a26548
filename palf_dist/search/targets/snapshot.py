"""What one training of a loss-weights search shows on its way, and the artefact that is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from palf_dist.atomic import replacing_folder
from palf_dist.errors import CheckpointError

FORMAT_VERSION = 1
CARD, ARRAYS = "weights.json", "model.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A model on its way."""

    number: int  # of its report, from 1 on
    last: bool  # it is the trained model
    features: np.ndarray  # phi [K], the reference first
    error: float  # e on the validation rows
    model: dict[str, np.ndarray]  # what is needed to use it, or to train on
    misclassified: float  # share of the validation rows
    cost: float  # gradient evaluations so far
    details: dict[str, Any] = field(default_factory=dict)  # further fields of its Report

    @property
    def metrics(self) -> dict[str, float]:
        """Those of its Report."""
        return {"validation_misclassified": self.misclassified, "cost": self.cost}


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> Path:
    """Make ``folder`` hold the arrays and the card, in one step."""
    with replacing_folder(folder) as temporary:
        packed = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        (temporary / ARRAYS).write_bytes(safetensors.numpy.save(packed))
        content = {"format_version": FORMAT_VERSION, **card}
        (temporary / CARD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def load_arrays(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What ``save_arrays`` was given. Raises CheckpointError where it cannot be read."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it was written by another version of palf_dist")
        return safetensors.numpy.load((folder / ARRAYS).read_bytes()), card
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); search again in another run directory") from error
