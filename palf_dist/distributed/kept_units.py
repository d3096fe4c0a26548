"""What the units of the phases around the outer steps came to, kept in the run directory until the phase's own result
is: a run that is stopped or killed in such a phase then does only what is left of it.

A folder is named by all that its contributions depend on, so that what is found there is right, and what another
policy, configuration, version or other data came to is not looked at. Each line has its own digest: what is damaged is
done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from palf_dist.atomic import json_lines, write_atomic
from palf_dist.config import RunConfig
from palf_dist.config_loading import decisive
from palf_dist.distributed.pool import Broadcast
from palf_dist.preparation import canonical
from palf_dist.run_directory import UNITS
from palf_dist.tasks.encoded import EncodedDataset, fingerprints
from palf_dist.types import Contribution, Unit
from palf_dist.workplace import Workplace

WRITE_SECONDS = 20.0
"""How much work a killed run may lose: one file for so long a time keeps their number small."""

FORMAT_VERSION = 1


class KeptUnits:
    """Of all phases of a run."""

    def __init__(self, place: Workplace, config: RunConfig, datasets: Mapping[str, EncodedDataset]) -> None:
        self._place = place
        self._key = {
            "format": FORMAT_VERSION,
            "palf_dist": _version(),
            "config": decisive(config),
            "datasets": fingerprints(datasets),
        }

    def under(self, broadcast: Broadcast) -> KeptPhase:
        """Those of one phase."""
        key = canonical({**self._key, "prepared": broadcast.prepared, "version": broadcast.version})
        digest = hashlib.sha256(key.encode() + broadcast.policy.tobytes()).hexdigest()
        return KeptPhase(self._place, self._place.folder / UNITS / digest[:16])


def discard(place: Workplace) -> None:
    """Once what they came to is written."""
    shutil.rmtree(place.folder / UNITS, ignore_errors=True)


class KeptPhase:
    """Contributions under one policy and one preparation."""

    def __init__(self, place: Workplace, folder: Path) -> None:
        self._place, self._folder = place, folder
        self._unwritten: list[Contribution] = []
        self._next_write = monotonic() + WRITE_SECONDS

    def found(self, work: Collection[Unit]) -> list[Contribution]:
        """Those of ``work`` that are there."""
        found = {}
        for path in self._files():
            with contextlib.suppress(OSError):
                for line in json_lines(path.read_bytes()):
                    if line.get("sha256") == _digest(text := str(line.get("contribution"))):
                        contribution = _contribution(json.loads(text))
                        found[contribution.unit] = contribution
        return [found[unit] for unit in work if unit in found]

    def keep(self, contribution: Contribution) -> None:
        """To be written soon."""
        self._unwritten.append(contribution)
        self.write_when_due()

    def write_when_due(self) -> None:
        """To be called every now and then while nothing arrives."""
        if monotonic() >= self._next_write:
            self.write()

    def write(self) -> None:
        """Have all on the disk; what it does not take waits for the next time."""
        if self._unwritten:
            if self._place.attempt(self._write, whole=True):
                self._unwritten.clear()
                self._place.publish()
            self._next_write = monotonic() + WRITE_SECONDS

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem.removeprefix("part-")) for path in self._files()), default=-1) + 1
        texts = [json.dumps(_record(contribution)) for contribution in self._unwritten]
        lines = [json.dumps({"sha256": _digest(text), "contribution": text}) + "\n" for text in texts]
        write_atomic(self._folder / f"part-{number:04d}.jsonl", "".join(lines).encode())

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("part-[0-9]*[0-9].jsonl"))


def _record(contribution: Contribution) -> dict[str, Any]:
    """As JSON, which keeps every float as it is."""
    assert contribution.gradient is None and contribution.carried is None, "these are of the outer steps"
    unit = contribution.unit
    return {
        "unit": [unit.kind, unit.outer_step, unit.group, unit.settings],
        "arrays": {name: array.tolist() for name, array in contribution.arrays.items()},
        **{name: getattr(contribution, name) for name in ("policy_version", "metrics", "rows", "halvings", "seconds")},
    }


def _contribution(record: dict[str, Any]) -> Contribution:
    arrays = {name: np.array(values) for name, values in record.pop("arrays").items()}
    return Contribution(Unit(*record.pop("unit")), arrays=arrays, **record)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version() -> str:
    try:
        return version("palf-dist")
    except PackageNotFoundError:  # only on the path
        return ""
