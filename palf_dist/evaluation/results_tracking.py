"""Published results in MLflow: a run of their own, with the headline as metrics and the files as artifacts."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palf_dist.config import TrackingConfig
from palf_dist.config_loading import parse_section
from palf_dist.evaluation.results import PICTURES, Results
from palf_dist.redaction import redact
from palf_dist.sections import Section
from palf_dist.storage import first_line
from palf_dist.tracking import MLflowTracker

logger = logging.getLogger("palf_dist.tracking")

AGAIN = "call palf-dist results again once that is mended"
TIMEOUT = 60.0
"""Seconds to deliver in: MLflow takes ten of them to start, and as long again to make a new database."""


class _Tracking(Section):
    tracking: TrackingConfig = TrackingConfig()


def given_tracking(overrides: Sequence[str]) -> dict[str, Any]:
    """The fields of ``tracking`` that ``--set`` gives. Raises ConfigError for any other."""
    given = parse_section("", "--set", overrides, _Tracking, lambda config: {}).tracking
    return {name: getattr(given, name) for name in given.model_fields_set}


def tracking_of(made: Results, given: Mapping[str, Any]) -> TrackingConfig:
    """That of the first of the runs, but for what is ``given``."""
    return made.config.tracking.model_copy(update=dict(given))


def track_results(made: Results, places: Sequence[str], tracking: TrackingConfig) -> str | None:
    """Log ``made``, of the runs at ``places``; the id of the new MLflow run. None where tracking is off, and with a
    warning where MLflow has not taken all of it in ``TIMEOUT`` seconds or there is no room for a copy of the files:
    these themselves are what counts."""
    if not tracking.enabled:
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="palf-results-") as folder:
            return _track(made, places, tracking, Path(folder))
    except OSError as error:
        logger.warning("MLflow is not given the results (%s); %s", first_line(error), AGAIN)
        return None


def _track(made: Results, places: Sequence[str], tracking: TrackingConfig, folder: Path) -> str | None:
    # From a copy, since what is delivered has to lie beside its records, which are thrown away.
    files = [Path(shutil.copy(path, folder)) for path in (made.markdown, made.json)]
    pictures = folder / PICTURES
    pictures.mkdir()
    for path in made.pictures:
        shutil.copy(path, pictures)
    params = made.config.model_dump(mode="json")
    tracker = MLflowTracker(folder, tracking, f"{made.config.name} results", params, undelivered=AGAIN)
    tracker.set_tags({"palf_dist.run_dir": redact(", ".join(places))})
    tracker.log_metrics(metrics(made.record), 0)
    for path in (*files, pictures):
        tracker.log_artifact(path)
    left = tracker.close(timeout=TIMEOUT)
    return None if left else tracker.run_id


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The headline of results.json, what of it is measured, and how many claims and targets have each verdict."""
    found = {name: float(value) for name, value in record["headline"].items() if value is not None}
    for name in ("claims", "targets"):
        verdicts = Counter(entry["verdict"].replace(" ", "_") for entry in record[name])
        found |= {f"{name}_{verdict}": float(count) for verdict, count in verdicts.items()}
    return found
