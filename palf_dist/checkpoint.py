"""Atomic, versioned, pickle-free checkpoints: checkpoints/step-000123/{policy,learner}.safetensors and state.json.

state.json holds the format version and the SHA-256 of every file, itself included, so that a torn or altered
checkpoint is noticed, reported and passed over for the newest valid one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from palf_dist.atomic import replacing_folder
from palf_dist.errors import CheckpointError
from palf_dist.faults import fault_point
from palf_dist.run_directory import CHECKPOINTS
from palf_dist.types import Unit

FORMAT_VERSION = 1
POLICY = "policy.safetensors"
LEARNER = "learner.safetensors"
CARRIED = "carried.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What ``save_checkpoint`` was given, read back and verified."""

    step: int
    folder: Path
    learner: dict[str, np.ndarray]  # of MetaLearner.state(), the policy included
    state: dict[str, Any]
    carried: dict[str, dict[str, np.ndarray]]  # unit key -> inner state of the windowed estimators; {} without
    skipped: tuple[str, ...]  # one sentence for every newer checkpoint that could not be used


def save_checkpoint(
    run_dir: Path,
    step: int,
    learner_arrays: dict[str, np.ndarray],
    state: dict[str, Any],
    carried: dict[str, dict[str, np.ndarray]] | None = None,
) -> Path:
    """Write the checkpoint of outer step ``step`` and return its folder. A crash leaves the earlier ones as they were.

    ``learner_arrays`` is MetaLearner.state(); its "policy" goes into a file of its own. ``state`` is plain JSON.
    """
    learner = dict(learner_arrays)
    files = {POLICY: _pack({"policy": learner.pop("policy")}), LEARNER: _pack(learner)}
    if carried:
        flat = {json.dumps([key, name]): array for key, arrays in carried.items() for name, array in arrays.items()}
        files[CARRIED] = _pack(flat)
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: _digest(data) for name, data in files.items()},
        "state": state,
    }
    content = json.loads(json.dumps(content))  # as it will be read: the digest must not depend on key types
    document = {"sha256": _digest(_canonical(content)), "content": content}
    files[STATE] = json.dumps(document, indent=1).encode()
    folder = _folder(run_dir, step)
    with replacing_folder(folder) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
            fault_point("driver_in_checkpoint", Unit("driver", step, 0))
    return folder


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest valid checkpoint, or None when the run has none yet.

    Newer ones that are torn or corrupt are named in ``skipped``. Raises CheckpointError when none of them is valid.
    """
    skipped: list[str] = []
    for folder in _folders(run_dir):
        try:
            content, files = _verified(folder)
        except _InvalidCheckpoint as reason:
            skipped.append(f"checkpoint {folder} was skipped: {reason}")
            continue
        learner = {**safetensors.numpy.load(files[POLICY]), **safetensors.numpy.load(files[LEARNER])}
        carried: dict[str, dict[str, np.ndarray]] = {}
        for flat_name, array in safetensors.numpy.load(files[CARRIED]).items() if CARRIED in files else ():
            key, name = json.loads(flat_name)
            carried.setdefault(key, {})[name] = array
        return Checkpoint(content["step"], folder, learner, content["state"], carried, tuple(skipped))
    if skipped:
        raise CheckpointError(
            "no valid checkpoint is left in this run directory; start a new run with another --run-dir. "
            + "; ".join(skipped)
        )
    return None


def copy_checkpoint(folder: Path, run_dir: Path) -> None:
    """Give a run directory the checkpoint in ``folder``, whatever run it is of. Raises CheckpointError when it is not
    valid."""
    try:
        content, files = _verified(folder)
    except _InvalidCheckpoint as reason:
        raise CheckpointError(f"checkpoint {folder} cannot be used: {reason}") from None
    with replacing_folder(_folder(run_dir, content["step"])) as temporary:
        for name in (STATE, *files):
            shutil.copy(folder / name, temporary / name)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` (at least 1) valid checkpoints, torn ones and leftovers of killed writers."""
    assert keep >= 1
    for folder in _folders(run_dir):
        if keep > 0:
            try:
                _verified(folder)
                keep -= 1
                continue
            except _InvalidCheckpoint:
                pass
        shutil.rmtree(folder)
    for leftover in (run_dir / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(leftover)


class _InvalidCheckpoint(Exception):
    """Why a checkpoint folder cannot be used."""


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / CHECKPOINTS / f"step-{step:06d}"


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, newest step first; of one step, the one that replaces before the one it replaces."""
    found = []
    for folder in (run_dir / CHECKPOINTS).glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)(\.old)?", folder.name):
            found.append((-int(match[1]), match[2] is not None, folder))
    return [folder for _, _, folder in sorted(found)]


def _verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of state.json and the bytes of the files it names. Raises _InvalidCheckpoint."""
    try:
        document = json.loads((folder / STATE).read_bytes())
        content = document["content"]
        if document["sha256"] != _digest(_canonical(content)):
            raise _InvalidCheckpoint(f"{STATE} does not match its digest")
        if content["format_version"] != FORMAT_VERSION:
            version = content["format_version"]
            raise _InvalidCheckpoint(f"its format version is {version}, this program reads {FORMAT_VERSION}")
        if not {POLICY, LEARNER} <= set(content["files"]) <= {POLICY, LEARNER, CARRIED}:  # other names could lead out
            raise _InvalidCheckpoint(f"it names the files {', '.join(map(repr, content['files']))}")
        if type(content["step"]) is not int or content["step"] < 0:
            raise _InvalidCheckpoint(f"it is of step {content['step']!r}")
        files = {name: (folder / name).read_bytes() for name in content["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _InvalidCheckpoint(f"{type(error).__name__}: {error}") from error
    for name, data in files.items():
        if _digest(data) != content["files"][name]:
            raise _InvalidCheckpoint(f"{name} does not match its digest")
    return content, files


def _pack(arrays: dict[str, np.ndarray]) -> bytes:
    # not ascontiguousarray, which makes 0-d arrays 1-d
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
