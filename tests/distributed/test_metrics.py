"""What a run shows on Ray's Prometheus endpoint, and that the dashboard draws just that."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self

import pytest

from palf_dist.distributed.driver import meta_train
from palf_dist.distributed.metrics import METRICS, STEPS, RunMetrics
from tests.distributed.small import fault, small_config
from tests.processes import ROOT

DASHBOARD = ROOT / "cluster" / "grafana" / "palf_dist.json"
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
SHOWN = {f"ray_{name}{suffix}": name for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]}
"""What Prometheus calls each metric -> what we do."""


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [variable["query"] for variable in dashboard["templating"]["list"]]
    drawn = set(re.findall(r"\bray_palf_dist_\w+", " ".join(expressions)))
    assert drawn <= SHOWN.keys() and {SHOWN[name] for name in drawn} == METRICS.keys()
    assert set(re.findall(r"\bray_palf_dist_\w+", " ".join(queries))) <= SHOWN.keys()
    assert all('{run=~"$run"}' in expression for expression in expressions)
    for name, metric in METRICS.items():
        told_apart = [re.search(r"by \((.*?)\)", expression) for expression in expressions if name in expression]
        assert all(any(by and tag in by[1] for by in told_apart) for tag in metric.tags)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(places)) == len(set(ids)) == len(dashboard["panels"])


def test_the_documentation_names_them_as_prometheus_does() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    named = re.findall(r"^\| `(ray_palf_dist_\w+)` \| (\w+) \|", text, flags=re.MULTILINE)
    suffix = {"Counter": "_total", "Gauge": "", "Histogram": ""}
    assert named == [(f"ray_{name}{suffix[metric.kind]}", metric.kind.lower()) for name, metric in METRICS.items()]


def test_in_process_nothing_is_shown() -> None:
    metrics = RunMetrics()
    metrics.workers()
    metrics.outer_step({"applied": 2, "refused_stale": 1, "seconds": 0.5, "outer_loss": float("nan")}, [0, 1])
    assert not metrics._instruments


class Prometheus:
    """Looks at a node of this machine all the time, as Prometheus does.

    The only one to look: Ray forgets a gauge as soon as it has been read.
    """

    def __init__(self, port: int, run: str) -> None:
        self.names: set[str] = set()
        """Of all that was ever seen of the run."""
        self.newest: dict[str, float] = {}
        """Name -> sum of its values, as last seen."""
        self._address, self._tag = f"http://127.0.0.1:{port}/metrics", f'run="{run}"'
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                urllib.request.urlopen(self._address, timeout=10) as answer,
            ):
                lines = answer.read().decode().splitlines()
                sums: dict[str, float] = {}
                for line in lines:
                    if (match := re.match(r"(ray_palf_dist_\w+)\{(.*)\} (\S+)$", line)) and self._tag in match[2]:
                        sums[match[1]] = sums.get(match[1], 0.0) + float(match[3])
                self.names |= sums.keys()
                self.newest = sums


@pytest.mark.slow
@pytest.mark.usefixtures("share")
def test_a_run_on_ray_is_seen_by_prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("PALF_FAULTS", fault("in_unit", ("meta_gradient", 1, 0), "kill", tmp_path / "once"))
    config = small_config(distributed={"workers": 2}).model_copy(update={"name": "seen-by-prometheus"})
    # seen only where there is something to count
    rare = {"palf_dist_contributions_refused", "palf_dist_units_duplicated", "palf_dist_recovery_seconds"}
    with Prometheus(ray.nodes()[0]["MetricsExportPort"], config.name) as prometheus:
        result = meta_train(config, tmp_path / "run")
        assert result.contributions["reissued"] == 1
        expected = {
            "ray_palf_dist_contributions_applied_total": result.contributions["applied"],
            "ray_palf_dist_outer_steps_total": result.outer_steps,
            "ray_palf_dist_outer_step_seconds_count": result.outer_steps,
            "ray_palf_dist_staleness_count": result.contributions["applied"],
            # in every bucket, as all are 0; sums are useless: Ray makes them from the middles of buckets
            "ray_palf_dist_staleness_bucket": result.contributions["applied"] * (len(STEPS) + 1),
            "ray_palf_dist_units_reissued_total": 1,
        }
        end = time.monotonic() + 60
        while time.monotonic() < end and not (
            expected.items() <= prometheus.newest.items()
            and {SHOWN[name] for name in prometheus.names & SHOWN.keys()} >= METRICS.keys() - rare
        ):
            time.sleep(0.5)
    assert expected.items() <= prometheus.newest.items(), prometheus.newest
    assert prometheus.names <= SHOWN.keys()
    assert {SHOWN[name] for name in prometheus.names} >= METRICS.keys() - rare
    assert prometheus.newest["ray_palf_dist_unit_seconds_sum"] > 0
