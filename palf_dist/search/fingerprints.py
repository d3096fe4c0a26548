"""What the datasets of a search held when it began: errors on other rows have no place in its ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from palf_dist.atomic import write_atomic
from palf_dist.errors import DataError

FINGERPRINTS = "datasets.json"


def check_unchanged(run_dir: Path, fingerprints: Mapping[str, str]) -> None:
    """Raises DataError for a dataset that is not as it was when the search in ``run_dir`` began."""
    path = run_dir / FINGERPRINTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, now in fingerprints.items():
        if now != before.get(name, now):
            raise DataError(
                f"{name}: the dataset has changed since the search began (then {before[name]}, now {now}); restore its "
                "file, or start a new search with another --run-dir"
            )


def keep(run_dir: Path, fingerprints: Mapping[str, str]) -> None:
    """Note what the datasets hold now."""
    write_atomic(run_dir / FINGERPRINTS, json.dumps(dict(fingerprints), indent=1).encode())
