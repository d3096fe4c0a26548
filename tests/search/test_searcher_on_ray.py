"""Ray Tune itself with the searcher: alone, with a limiter and ASHA, with mistakes, and killed half way."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import tune
from ray.tune import TuneError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter

import palf_dist
from palf_dist.config import DistributedConfig
from palf_dist.distributed.cluster import connect
from palf_dist.learnloss.records import Outcome
from palf_dist.learnloss.tuning import TuneLoss
from palf_dist.search import TuneLossSearcher
from tests.search.ridge import RANGES, STEPS, no_features, ridge, train_in_steps, train_once

pytestmark = pytest.mark.slow

ROOT = Path(palf_dist.__file__).parent.parent
TRIALS = 8


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One private Ray, for the subprocesses too."""
    with connect(DistributedConfig(workers=2)), pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """(identifier, snapshots, complete) of what TuneLoss is told in this process."""
    record: list[tuple[int, int, bool]] = []
    tell = TuneLoss.tell

    def telling(self: TuneLoss, identifier: int, outcome: Outcome, *, complete: bool = True) -> None:
        record.append((identifier, len(outcome.errors), complete))
        tell(self, identifier, outcome, complete=complete)

    monkeypatch.setattr(TuneLoss, "tell", telling)
    return record


def fit(trainable: Any, folder: Path, search: Any, param_space: dict[str, Any] | None = None, **more: Any) -> Any:
    tuner = tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(search_alg=search, **{"num_samples": TRIALS, "reuse_actors": True, **more}),
        run_config=tune.RunConfig(name="search", storage_path=str(folder), verbose=0),
    )
    return tuner.fit()


def test_the_optimum_is_reached_through_a_param_space_in_max_mode(
    tmp_path: Path, told: list[tuple[int, int, bool]]
) -> None:
    grid = np.exp(np.linspace(np.log(1e-4), np.log(1e2), 40))
    optimum = min(ridge(np.array([a, b]))[0] for a in grid for b in grid)
    results = fit(
        train_once,
        tmp_path,
        TuneLossSearcher(reference="fit", features="terms"),
        {name: tune.loguniform(*bounds) for name, bounds in RANGES.items()} | {"fixed": 7},
        metric="accuracy",
        mode="max",
        num_samples=12,
        max_concurrent_trials=1,
    )
    best = results.get_best_result()
    assert 1 - best.metrics["accuracy"] < 1.01 * optimum and best.config["fixed"] == 7
    assert [(snapshots, complete) for _, snapshots, complete in told] == [(1, True)] * 12
    restored = TuneLossSearcher(features="terms")
    restored.restore_from_dir(results.experiment_path)
    assert restored.tune_loss.best is not None
    assert restored.tune_loss.best.error == pytest.approx(-best.metrics["accuracy"], abs=1e-15)


def test_limited_concurrency_with_asha_on_top(tmp_path: Path, told: list[tuple[int, int, bool]]) -> None:
    search = ConcurrencyLimiter(TuneLossSearcher(RANGES), max_concurrent=2)
    asha = ASHAScheduler(metric="e", mode="min", max_t=10, grace_period=1, reduction_factor=2)
    results = fit(train_in_steps, tmp_path, search, scheduler=asha)
    assert not results.errors and len(results) == len(told) == len({identifier for identifier, _, _ in told}) == TRIALS
    ran = Counter(result.metrics["training_iteration"] for result in results)
    assert Counter(snapshots for _, snapshots, _ in told) == ran and len(ran) > 1, "ASHA stopped some, but not all"
    assert all(complete == (snapshots == STEPS) for _, snapshots, complete in told)


def test_a_malformed_report_ends_the_experiment_with_one_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(TuneError) as caught:
        fit(no_features, tmp_path, TuneLossSearcher(RANGES))
    told_last = str(caught.value).strip().splitlines()[-1]
    assert re.search(r"ConfigError: phi: trial \w+ reported \[1\.0\]; report 3 numbers in the order", told_last)


def drive(folder: str) -> None:
    """What the killed driver does."""
    logging.disable()
    fit(train_in_steps, Path(folder), TuneLossSearcher(RANGES), {"pace": f"{folder}/pace"}, max_concurrent_trials=2)


def told_so_far(experiment: Path) -> list[int]:
    """Identifiers of the trainings that the newest saved state says were told."""
    state = json.loads(max(experiment.glob("searcher-state-*.json")).read_text())
    return [identifier for trial, (identifier, _) in state["trials"].items() if trial not in state["reports"]]


def is_half_way(experiment: Path) -> bool:
    """Whether two trainings were told, and Ray, which copies the files of its state one by one and in place, has not
    touched them for a while: killed in between it would leave files of different moments."""

    def times() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in experiment.glob("*.json")}

    before = times()
    time.sleep(0.6)
    return bool(before) and times() == before and len(told_so_far(experiment)) >= 2


def test_a_killed_driver_is_restored(tmp_path: Path, told: list[tuple[int, int, bool]]) -> None:
    """Killed once two trainings were told: the others are trained and told once each, with every snapshot once."""
    code = f"from tests.search.test_searcher_on_ray import drive; drive({str(tmp_path)!r})"
    (tmp_path / "pace").write_text("1.0")
    environment = os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "2"}
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True)
    try:
        limit = time.monotonic() + 120
        while not is_half_way(tmp_path / "search"):
            assert driver.poll() is None and time.monotonic() < limit
    finally:
        driver.kill()
        driver.wait()
    (tmp_path / "pace").write_text("0.0")
    before = told_so_far(tmp_path / "search")
    results = tune.Tuner.restore(str(tmp_path / "search"), train_in_steps, resume_errored=True).fit()
    assert len(results) == TRIALS and not results.errors and told
    assert sorted([*before, *(identifier for identifier, _, _ in told)]) == list(range(TRIALS))
    assert all((snapshots, complete) == (STEPS, True) for _, snapshots, complete in told)


def test_the_example_in_the_documentation_runs(tmp_path: Path) -> None:
    """The very block, run by somebody outside the repository."""
    page = (ROOT / "docs" / "tune_searcher.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 30
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    weights, e = re.search(r"^({.*}) ([\d.]+)$", done.stdout, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert set(json.loads(weights.replace("'", '"'))) == {"body", "blood"} and float(e) < 0.5125, e
