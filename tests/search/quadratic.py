"""A target that costs nothing: the quadratic (x - 0.3)^2 + (y - 0.7)^2, which a trial comes nearer to by each report.

``delay`` seconds pass before a report; every one of them is written down in the trial's folder, beside its state.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palf_dist.errors import DataError
from palf_dist.search.config import SearchConfig
from palf_dist.search.domains import Domain, UniformRange
from palf_dist.search.trial import Parameters, Report, TrialContext

WORK, STATE = "work.jsonl", "state"


@dataclass(frozen=True)
class Quadratic:
    """``troubles``: what x is at least -> what happens to a trial then."""

    steps: int = 3
    delay: float = 0.0
    cpus: float = 1.0
    troubles: dict[float, str] = field(default_factory=dict)

    @property
    def error_name(self) -> str:
        return "error"

    @property
    def fingerprints(self) -> dict[str, str]:
        return {}

    def space(self) -> dict[str, Domain]:
        return {name: UniformRange(low=0.0, high=1.0) for name in "xy"}

    def weight_space(self) -> None:
        return None

    def reports(self) -> int:
        return self.steps

    def bundles(self) -> list[dict[str, float]]:
        return [{"CPU": self.cpus}]

    def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
        trouble = next((what for least, what in self.troubles.items() if parameters["x"] >= least), None)
        if trouble == "unfit":
            raise DataError("the quadratic is unfit")
        state = context.folder / STATE
        state.mkdir(exist_ok=True)
        done = _step(context.start_from or state)
        if done:
            yield self._report(done, parameters, state)
        for step in range(done + 1, self.steps + 1):
            if context.stop.wait(self.delay):
                return
            if trouble == "raises" and step == 2:
                raise ValueError("raised on purpose")
            (state / "step.tmp").write_text(json.dumps(step))
            (state / "step.tmp").replace(state / "step.json")
            with (context.folder / WORK).open("a") as work:
                work.write(json.dumps({"step": step, "time": time.time(), **parameters}) + "\n")
            yield self._report(step, parameters, state, math.nan if trouble == "diverges" else 0.0)

    def _report(self, step: int, parameters: Parameters, state: Path, extra: float = 0.0) -> Report:
        error = (parameters["x"] - 0.3) ** 2 + (parameters["y"] - 0.7) ** 2 + 1.0 / step + extra
        return Report(
            step, error, metrics={"cost": 10.0 * step}, artefact=state, checkpoint=state, done=step == self.steps
        )

    def finish(self, best: Path) -> dict[str, Any]:
        return {"test_error": 0.5, "found_after": _step(best)}


def _step(folder: Path) -> int:
    path = folder / "step.json"
    return int(json.loads(path.read_text())) if path.exists() else 0


def search_config(**fields: Any) -> SearchConfig:
    """A search over the quadratic; the target that it names is never made."""
    fields = {"searcher": "random", "trials": 4, "tracking": {"enabled": False}, **fields}
    return SearchConfig.model_validate({"target": {"kind": "loss_weights", "dataset": "unused"}, **fields})
