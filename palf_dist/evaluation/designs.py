"""Designs whose results on held-out data were seen. They are counted, for whoever looks often enough finds a design
that does well there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from palf_dist.config import RunConfig
from palf_dist.config_loading import leaves
from palf_dist.errors import RunDirectoryError

NOT_OF_A_DESIGN: dict[str, Any] = {
    "name": True,
    "seed": True,
    "data": True,
    "policy": {"seed"},
    "evaluation": {"methods", "noise_rates", "conditions", "suite_conditions", "imbalance", "seeds"},
    "distributed": {"workers", "address", "gpus_per_worker", "unit_timeout", "max_attempts"},
    "checkpoint": True,
    "tracking": True,
}
"""Fields that do not make another design: what is learned from and judged on, seeds, and execution settings that do not
touch a result."""

RESULTS_JSON, ABLATIONS = "results.json", "ablations"
"""The files that list designs, those of ablations by the beginning of their names: each command lists those of all, so
that what one has judged counts in the others."""

Look = Mapping[str, Any]
"""One look at held-out data: name, digest, seed, datasets and the policy's difference to tuned CE in points."""


def design_of(config: RunConfig) -> str:
    """Digest of all that makes a design of a configuration. Fields at their default are left out, so that a design
    stays the same when a later version has more fields."""
    fields = leaves(config.model_dump(mode="json", exclude=NOT_OF_A_DESIGN, exclude_defaults=True))
    # The kinds of architectures tell them apart, also the one that is the default of its own section.
    fields["tasks.architectures"] = [item.model_dump(mode="json") for item in config.tasks.architectures]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def look(config: RunConfig, datasets: Collection[str], difference: float | None) -> Look:
    """The entry of a configuration that was judged on these held-out datasets."""
    return {
        "name": config.name,
        "digest": design_of(config),
        "seed": config.seed,
        "datasets": sorted(datasets),
        "diff_vs_tuned_ce": difference,
    }


def with_look(designs: Sequence[Look], own: Look) -> list[Look]:
    """The designs so far and this one, last where it is new. An entry stays unless all but its name is the same: to
    judge a design again, with another seed or on other datasets, is another look at held-out data."""
    found = [own if {**design, "name": None} == {**own, "name": None} else design for design in designs]
    return found if own in found else [*found, own]


def other_looks(designs: Sequence[Look], own: Look) -> list[float]:
    """What other looks at the design of ``own`` on the same datasets found: of policies trained again, with whatever
    seed, and of the same ones judged again."""
    same = [design for design in designs if all(design.get(name) == own[name] for name in ("digest", "datasets"))]
    return [each["diff_vs_tuned_ce"] for each in same if each != own and each["diff_vs_tuned_ce"] is not None]


def published_designs(folder: Path) -> list[Look]:
    """The designs that the files of earlier commands in ``folder`` list; none where there are no such files. Raises
    RunDirectoryError for a file that is none of theirs."""
    designs: list[Look] = []
    for path in (folder / RESULTS_JSON, *sorted(folder.glob(f"{ABLATIONS}*.json"))):
        for design in _read(path):
            designs = with_look(designs, design)
    return designs


def _read(path: Path) -> list[Look]:
    try:
        designs = json.loads(path.read_bytes())["designs"]
        if all({"digest", "name"} <= design.keys() for design in designs):
            return designs
        problem = "its designs have no digest and name"
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise RunDirectoryError(
        f"{path}: is no file of this command ({problem}), and the designs that it counts would be lost; restore it, or "
        "name another --output"
    )
