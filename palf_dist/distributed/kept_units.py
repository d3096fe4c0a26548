"""What the units of the phases around the outer steps came to, kept in the run directory until the phase's own result
is: a run that is stopped or killed in such a phase then does only what is left of it.

A folder is named by all that its contributions depend on besides the configuration, which a resumed run shares. So
what is found there is right, and what another policy or other data came to is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from palf_dist.atomic import json_lines, write_atomic
from palf_dist.distributed.pool import Broadcast
from palf_dist.preparation import canonical
from palf_dist.run_directory import UNITS
from palf_dist.tasks.encoded import EncodedDataset, fingerprints
from palf_dist.types import Contribution, Unit
from palf_dist.workplace import Workplace

WRITE_SECONDS = 20.0
"""How much work a killed run may lose: one file for so long a time keeps their number small."""


class KeptUnits:
    """Of all phases of a run."""

    def __init__(self, place: Workplace, datasets: Mapping[str, EncodedDataset]) -> None:
        self._place = place
        self._datasets = fingerprints(datasets)

    def under(self, broadcast: Broadcast) -> KeptPhase:
        """Those of one phase."""
        key = canonical({"datasets": self._datasets, "prepared": broadcast.prepared, "version": broadcast.version})
        digest = hashlib.sha256(key.encode() + broadcast.policy.tobytes()).hexdigest()
        return KeptPhase(self._place, self._place.folder / UNITS / digest[:16])

    def discard(self) -> None:
        """Once what they came to is written."""
        shutil.rmtree(self._place.folder / UNITS, ignore_errors=True)


class KeptPhase:
    """Contributions under one policy and one preparation."""

    def __init__(self, place: Workplace, folder: Path) -> None:
        self._place, self._folder = place, folder
        self._unwritten: list[Contribution] = []
        self._next_write = time.monotonic() + WRITE_SECONDS

    def found(self, work: Collection[Unit]) -> list[Contribution]:
        """Those of ``work`` that are there."""
        found = {}
        for path in self._files():
            for record in json_lines(path.read_bytes()):
                contribution = _read(record)
                found[contribution.unit] = contribution
        return [found[unit] for unit in work if unit in found]

    def keep(self, contribution: Contribution) -> None:
        """To be written soon."""
        self._unwritten.append(contribution)
        if time.monotonic() >= self._next_write:
            self.write()

    def write(self) -> None:
        """Have all on the disk; what it does not take waits for the next time."""
        if self._unwritten and self._place.attempt(self._write, whole=True):
            self._unwritten.clear()
            self._place.publish()
        self._next_write = time.monotonic() + WRITE_SECONDS

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(_record(contribution)) + "\n" for contribution in self._unwritten)
        write_atomic(self._folder / f"part-{len(self._files()):04d}.jsonl", lines.encode())

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.jsonl"))


def _record(contribution: Contribution) -> dict[str, object]:
    """As JSON, which keeps every float as it is."""
    assert contribution.gradient is None and contribution.carried is None, "these are of the outer steps"
    kept = {name: getattr(contribution, name) for name in ("policy_version", "metrics", "rows", "halvings", "seconds")}
    unit = contribution.unit
    arrays = {name: array.tolist() for name, array in contribution.arrays.items()}
    return {"unit": [unit.kind, unit.outer_step, unit.group, unit.settings], "arrays": arrays, **kept}


def _read(record: dict[str, object]) -> Contribution:
    unit, arrays = record.pop("unit"), record.pop("arrays")
    assert isinstance(unit, list) and isinstance(arrays, dict)
    return Contribution(Unit(*unit), arrays={name: np.array(values) for name, values in arrays.items()}, **record)  # type: ignore[arg-type]
