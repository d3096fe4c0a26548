"""A suite of one's own for the tests of suites, and where they are at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from palf_dist.tasks.suites import Suite, load_suite

PAGE = Path(__file__).parents[2] / "docs" / "suites.md"

OWN: dict[str, Any] = {
    "name": "own",
    "datasets": ["digits", "wine", "iris", {"name": "mine", "family": "text", "path": "mine.parquet"}],
    "train_only": ["breast_cancer"],
    "folds": [["digits", "wine"], ["iris", "mine"]],
    "conditions": [{"name": "as-is"}, {"name": "noisy", "noise_rate": 0.4}],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache, no package registry, and an empty folder to work in."""
    monkeypatch.setenv("PALF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def own(**changes: Any) -> Suite:
    Path("own.yaml").write_text(yaml.safe_dump(OWN | changes))
    return load_suite("own.yaml")


def names(sources: Any) -> list[str]:
    return [source.name for source in sources]
