"""What a run shows on Ray's Prometheus endpoint (every node's metrics port), from its driver and only while on Ray.

Ray puts ``ray_`` before each name and ``_total`` after that of a counter. docs/metrics.md lists them, and
cluster/grafana/palf_dist.json draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from palf_dist.distributed.dispatcher import Dispatcher
from palf_dist.types import Contribution

SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
STEPS = (0.5, 1.5, 2.5, 4.5, 8.5)


class Metric(NamedTuple):
    kind: str  # Counter | Gauge | Histogram
    description: str
    tags: tuple[str, ...] = ()  # besides ``run``, the configuration's name
    boundaries: tuple[float, ...] = ()


METRICS = {
    "palf_dist_contributions_applied": Metric("Counter", "contributions that an outer step was made of"),
    "palf_dist_contributions_refused": Metric("Counter", "contributions refused", ("cause",)),
    "palf_dist_staleness": Metric("Histogram", "outer steps that an applied contribution lagged", (), STEPS),
    "palf_dist_units_reissued": Metric("Counter", "units issued again after a worker was lost"),
    "palf_dist_units_duplicated": Metric("Counter", "late units issued a second time"),
    "palf_dist_unit_seconds": Metric("Histogram", "seconds of a unit in its worker", ("kind",), SECONDS),
    "palf_dist_workers_alive": Metric("Gauge", "workers at work or ready for it"),
    "palf_dist_recovery_seconds": Metric("Histogram", "from a worker's loss to its successor's start", (), SECONDS),
    "palf_dist_outer_steps": Metric("Counter", "outer steps taken"),
    "palf_dist_outer_step_seconds": Metric("Histogram", "seconds of an outer step", (), SECONDS),
    "palf_dist_outer_loss": Metric("Gauge", "outer loss of the newest outer step"),
    "palf_dist_selection_score": Metric("Gauge", "newest selection score, a fraction"),
}


class RunMetrics:
    """Where a run's figures go. As it is made, nowhere."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}
        self._pool: Dispatcher | None = None
        self._counted: dict[str, int] = {}  # what a counter that we only read stood at

    @classmethod
    def on_ray(cls, run: str, pool: Dispatcher) -> Self:
        """To the Ray that this process is connected to. ``run``: the name of the configuration."""
        from ray.util import metrics as ray_metrics

        shown = cls()
        shown._pool = pool
        for name, metric in METRICS.items():
            more = {"boundaries": list(metric.boundaries)} if metric.boundaries else {}
            instrument = getattr(ray_metrics, metric.kind)(
                name, description=metric.description, tag_keys=("run", *metric.tags), **more
            )
            instrument.set_default_tags({"run": run})
            shown._instruments[name] = instrument
        return shown

    def workers(self) -> None:
        """How the workers are. To be called now and then."""
        pool = self._pool
        if pool is None:
            return
        self._record("workers_alive", pool.alive)
        self._record("units_reissued", self._news("reissued", pool.reissued))
        self._record("units_duplicated", self._news("duplicated", pool.duplicated))
        known = len(pool.recoveries)
        for seconds in pool.recoveries[known - self._news("recoveries", known) :]:
            self._record("recovery_seconds", seconds)

    def contribution(self, contribution: Contribution) -> None:
        """One has arrived."""
        self._record("unit_seconds", contribution.seconds, kind=contribution.unit.kind)

    def outer_step(self, row: Mapping[str, float], staleness: Sequence[int]) -> None:
        """One was taken. ``row``: that of metrics.parquet; ``staleness``: of each contribution applied."""
        self._record("outer_steps", 1)
        self._record("contributions_applied", row["applied"])
        for name, count in row.items():
            if name.startswith("refused_"):
                self._record("contributions_refused", count, cause=name.removeprefix("refused_"))
        for steps in staleness:
            self._record("staleness", steps)
        self._record("outer_step_seconds", row["seconds"])
        for name in ("outer_loss", "selection_score"):
            if name in row:
                self._record(name, row[name])

    def _news(self, name: str, count: int) -> int:
        before, self._counted[name] = self._counted.get(name, 0), count
        return count - before

    def _record(self, name: str, value: float, **tags: str) -> None:
        instrument = self._instruments.get(f"palf_dist_{name}")
        if instrument is None or not math.isfinite(value):
            return
        match METRICS[f"palf_dist_{name}"].kind:
            case "Counter" if value > 0:
                instrument.inc(value, tags)
            case "Gauge":
                instrument.set(value, tags)
            case "Histogram":
                instrument.observe(value, tags)
