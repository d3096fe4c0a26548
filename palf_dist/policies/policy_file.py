"""A policy as two files: tensors in safetensors, everything else in a JSON card that holds the digest of both.
Nothing in here ever reads pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from palf_dist.atomic import write_atomic
from palf_dist.config import PolicyConfig
from palf_dist.errors import ConfigError, PolicyFileError
from palf_dist.model_registry import fetch, is_registered
from palf_dist.policies.meta_learned import LearnedPolicy, PolicySpec, make_policy, start_values
from palf_dist.storage import first_line, is_uri, join, read_file, split
from palf_dist.types import FIRST_CONTROLS

# 2 added policy.start, 3 policy.shield and kinds of policies other than OLD_KINDS, 4 other controls than FIRST_CONTROLS
FORMAT_VERSION = 4
OLD_KINDS = ("robust", "palf")
TENSORS = "policy.safetensors"
CARD = "policy.json"
DEFAULT = "default"
"""What ``load_policy`` takes for the policy that comes with palf_dist."""
PRETRAINED = Path(__file__).parent.parent / "pretrained"


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

        return make_policy(self.spec, torch.from_numpy(self.mean.copy()), torch.from_numpy(self.std.copy()))

    def refresh_in(self, steps: int) -> int:
        """Steps between two refreshes in a run of ``steps`` steps: as many refreshes as the policy had in
        meta-training, however long the run."""
        return max(1, round(self.spec.refresh * steps / self.card.get("inner_steps", steps)))


def policy_bytes(artefact: PolicyArtefact) -> tuple[bytes, bytes]:
    """The contents of policy.safetensors and policy.json; equal policies give equal bytes."""
    arrays = {"phi": artefact.phi, "feature_mean": artefact.mean, "feature_std": artefact.std}
    tensors = safetensors.numpy.save({name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()})
    policy = asdict(artefact.spec)
    version = _oldest_format(artefact.spec)
    # What a policy does not have is left out: it is written as older releases wrote it, so that they read it too.
    if policy["shield"] is None:
        policy.pop("shield")
    if not policy["start"]:
        policy.pop("start")
    card = {"format": "palf_dist policy", "format_version": version, "policy": policy, "card": artefact.card}
    card["sha256"] = digest(tensors, card)
    return tensors, (json.dumps(card, indent=2, sort_keys=True) + "\n").encode()


def _oldest_format(spec: PolicySpec) -> int:
    """The format of the oldest releases that can read the policy."""
    if not {*spec.basis, *spec.hyperparameters, *spec.start} <= {*FIRST_CONTROLS}:
        return 4
    if spec.shield is not None or spec.kind not in OLD_KINDS:
        return 3
    return 2 if spec.start else 1


def digest(tensors: bytes, card: dict[str, Any]) -> str:
    """SHA-256 of the tensors' file and of all that the card says but the digest itself."""
    content = {name: value for name, value in card.items() if name != "sha256"}
    return hashlib.sha256(tensors + json.dumps(content, sort_keys=True).encode()).hexdigest()


def card_digest(artefact: PolicyArtefact) -> str:
    """The ``digest`` that the policy's card has in its file."""
    return str(json.loads(policy_bytes(artefact)[1])["sha256"])


def load_policy(path: str | Path, *, tracking_uri: str | None = None) -> PolicyArtefact:
    """Read a policy from its folder or from its policy.safetensors, beside which policy.json must stand; the path may
    be a URI (s3://, gs://, file://), the address of a registered one (models:/palf@champion), or "default": the one
    that comes with palf_dist (a folder of that name is "./default", or a ``Path``).

    ``tracking_uri``: of the MLflow server whose registry it is; else MLFLOW_TRACKING_URI, else mlflow.db here.

    Raises:
        PolicyFileError: a file is missing, not a policy, of a newer format, or not what was saved or registered.
        RegistryError: the registry cannot be reached, or does not have it.
    """
    registered = None
    if is_registered(path):
        held, contents = fetch(str(path), (TENSORS, CARD), tracking_uri)
        folder, registered = held.address, held.digest
    else:
        folder = str(policy_folder(path))
        contents = _read(path, folder)
    card_file = join(folder, CARD)
    try:
        card = json.loads(contents[CARD])
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
    data = contents[TENSORS]
    if digest(data, card) != card.get("sha256"):
        raise PolicyFileError(f"{folder}: {TENSORS} and {CARD} are not as they were saved together; restore both")
    if registered not in (None, card["sha256"]):
        raise PolicyFileError(f"{folder}: holds another policy than the one that was registered; register it again")
    try:
        return _artefact(data, card)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, ConfigError) as error:
        raise PolicyFileError(
            f"{folder}: not a policy that works ({error}); restore both files or train anew"
        ) from error


def _read(path: str | Path, folder: str) -> dict[str, bytes]:
    """The contents of both files; ``path`` is what the user called the folder."""
    contents = {}
    for name in (TENSORS, CARD):
        try:
            contents[name] = read_file(join(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            raise PolicyFileError(
                f"{path}: there is no {name} in {folder}; name a folder with both policy files"
            ) from None
        except OSError as error:
            raise PolicyFileError(f"{path}: {name} cannot be read ({first_line(error)})") from error
    return contents


def trained_on(card: Mapping[str, Any], name: str, origins: Collection[str]) -> bool:
    """Whether the policy of this card (``PolicyArtefact.card``) has seen rows of a dataset of that name and origins."""
    return name in card["trained_on"] or not set(origins).isdisjoint(card["origins"])


def policy_folder(path: str | Path) -> str | Path:
    """The folder of a policy: ``path``, a path or a URI, or where it is policy.safetensors what that lies in."""
    if path == DEFAULT:  # Path("./default") is Path("default"), and a folder
        return PRETRAINED
    if is_uri(path):
        folder, name = split(path)
        return folder if name == TENSORS else str(path)
    return path if Path(path).is_dir() else Path(path).parent


def _artefact(tensors: bytes, card: dict[str, Any]) -> PolicyArtefact:
    """The policy that an undamaged card describes; raises what ``load_policy`` catches where it describes none."""
    fields, about = card["policy"], card["card"]
    if not isinstance(fields, dict) or not isinstance(about, dict):
        raise ValueError("policy and card must be JSON objects")
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    weights = np.array(settings["initial_weights"], np.float64)
    if weights.shape != (len(settings["basis"]),) or not (weights >= 0).all() or not math.isclose(weights.sum(), 1):
        raise ValueError(f"initial_weights {fields['initial_weights']} must be one share per basis loss with sum 1")
    try:  # what a configuration may say of a policy, a policy file may
        config = PolicyConfig.model_validate({n: value for n, value in settings.items() if n != "initial_weights"})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(", ".join(problems)) from error
    settings["start"] = start_values(config.start)
    spec, arrays = PolicySpec(**settings), safetensors.numpy.load(tensors)
    for name in ("feature_mean", "feature_std"):
        _check_array(name, arrays[name], len(spec.features))
    artefact = PolicyArtefact(spec, arrays["phi"], arrays["feature_mean"], arrays["feature_std"], about)
    _check_array("phi", artefact.phi, artefact.policy().num_parameters)
    return artefact


def _check_array(name: str, array: np.ndarray, size: int) -> None:
    if array.shape != (size,) or array.dtype != np.float32 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be {size} finite float32 numbers")


def save_policy(folder: str | Path, artefact: PolicyArtefact) -> Path:
    """Write both files into ``folder``, each atomically; returns the path of policy.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, card = policy_bytes(artefact)
    write_atomic(folder / TENSORS, tensors)
    write_atomic(folder / CARD, card)
    return folder / TENSORS
