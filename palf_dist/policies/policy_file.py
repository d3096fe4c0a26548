"""A policy as two files: tensors in safetensors, everything else in a JSON card that holds the tensors' digest.
Nothing in here ever reads pickle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from palf_dist.atomic import write_atomic
from palf_dist.policies.meta_learned import LearnedPolicy, PolicySpec
from palf_dist.types import PolicyFileError

FORMAT_VERSION = 1
TENSORS = "policy.safetensors"
CARD = "policy.json"


@dataclass(frozen=True)
class PolicyArtefact:
    """A learned policy with all that is needed to use it."""

    spec: PolicySpec
    phi: np.ndarray  # float32 [number of parameters]
    mean: np.ndarray  # float32 [S] frozen feature means
    std: np.ndarray  # float32 [S]
    card: dict[str, Any] = field(default_factory=dict)  # what it was trained on and what it measured

    def policy(self) -> LearnedPolicy:
        import torch

        return LearnedPolicy(self.spec, torch.from_numpy(self.mean.copy()), torch.from_numpy(self.std.copy()))


def policy_bytes(artefact: PolicyArtefact) -> tuple[bytes, bytes]:
    """The contents of policy.safetensors and policy.json; equal policies give equal bytes."""
    arrays = {"phi": artefact.phi, "feature_mean": artefact.mean, "feature_std": artefact.std}
    tensors = safetensors.numpy.save({name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()})
    card = {
        "format": "palf_dist policy",
        "format_version": FORMAT_VERSION,
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "policy": asdict(artefact.spec),
        "card": artefact.card,
    }
    return tensors, (json.dumps(card, indent=2, sort_keys=True) + "\n").encode()


def load_policy(path: str | Path) -> PolicyArtefact:
    """Read a policy from its folder or from its policy.safetensors, beside which policy.json must stand.

    Raises:
        PolicyFileError: a file is missing, not a policy, of a newer format, or its tensors are not those that were
            saved.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tensors_file, card_file = folder / TENSORS, folder / CARD
    for file in (tensors_file, card_file):
        if not file.is_file():
            raise PolicyFileError(f"{path}: there is no {file.name} in {folder}; name a folder with both policy files")
    try:
        card = json.loads(card_file.read_bytes())
        if card["format"] != "palf_dist policy":
            raise KeyError("format")
        version = int(card["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyFileError(f"{card_file}: not a palf_dist policy card; restore the file or train anew") from error
    if version > FORMAT_VERSION:
        raise PolicyFileError(
            f"{card_file}: format_version {version} is newer than {FORMAT_VERSION}, the newest that this palf_dist "
            "reads; upgrade palf_dist"
        )
    data = tensors_file.read_bytes()
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise PolicyFileError(f"{tensors_file}: the tensors are not those that {CARD} was written for; restore both")
    try:
        arrays = safetensors.numpy.load(data)
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in card["policy"].items()}
        artefact = PolicyArtefact(
            PolicySpec(**fields), arrays["phi"], arrays["feature_mean"], arrays["feature_std"], card.get("card", {})
        )
        expected = artefact.policy().num_parameters
    except (safetensors.SafetensorError, KeyError, TypeError, AssertionError) as error:
        raise PolicyFileError(f"{folder}: the policy card and its tensors do not fit together; restore both") from error
    if artefact.phi.shape != (expected,) or not np.isfinite(artefact.phi).all():
        raise PolicyFileError(f"{tensors_file}: phi must be {expected} finite numbers; restore the file")
    return artefact


def save_policy(folder: str | Path, artefact: PolicyArtefact) -> Path:
    """Write both files into ``folder``, each atomically; returns the path of policy.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, card = policy_bytes(artefact)
    write_atomic(folder / TENSORS, tensors)
    write_atomic(folder / CARD, card)
    return folder / TENSORS
