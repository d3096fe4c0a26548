"""Published results in MLflow: a real store, and none at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from palf_dist.config import TrackingConfig
from palf_dist.errors import ConfigError
from palf_dist.evaluation import results_tracking
from palf_dist.evaluation.results import Results, make_results
from palf_dist.evaluation.results_tracking import given_tracking, metrics, track_results, tracking_of
from tests.evaluation.judged import judged_run
from tests.evaluation.synthetic import few_rows
from tests.test_tracking import DEAD, client

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("results")
    rows = [{**row, "origin": row["dataset"]} for row in few_rows()]
    run = judged_run(folder / "run", rows, "tracking.experiment=published", f"tracking.uri=sqlite:///{folder}/store.db")
    return make_results([run], folder / "docs")


def small(folder: Path, **record: Any) -> Results:
    for name in ("results.md", "results.json"):
        (folder / name).write_text("{}")
    from palf_dist.config_loading import parse_config

    config = parse_config("data: {train: [digits], held_out: [iris]}", "a")
    whole = {"headline": {}, "claims": [], "targets": [], **record}
    return Results(folder / "results.md", folder / "results.json", (), (), whole, config)


@pytest.mark.slow
def test_headline_verdicts_and_files_arrive_where_the_runs_were_tracked(
    made: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of their own each time: what was published before stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results_tracking, "TIMEOUT", 180.0)
    tracking = tracking_of(made, {})
    run_id = track_results(made, ["runs/a", "s3://bucket/b"], tracking)
    assert run_id is not None and tracking.uri is not None
    store = client(tracking.uri)
    run = store.get_run(run_id)
    assert store.get_experiment(run.info.experiment_id).name == "published"
    assert (run.info.run_name, run.info.status) == ("suite results", "FINISHED")
    assert run.data.tags["palf_dist.run_dir"] == "runs/a, s3://bucket/b"
    assert run.data.params["inner.steps"] == "150"
    assert run.data.metrics == metrics(made.record)
    assert run.data.metrics["diff_vs_tuned_ce"] == made.record["headline"]["diff_vs_tuned_ce"]
    assert {item.path for item in store.list_artifacts(run_id)} == {"results.md", "results.json", "results"}
    pictures = {item.path for item in store.list_artifacts(run_id, "results")}
    assert pictures == {f"results/{path.name}" for path in made.pictures} and pictures
    assert Path(store.download_artifacts(run_id, "results.md")).read_bytes() == made.markdown.read_bytes()
    assert sorted(path.name for path in made.markdown.parent.iterdir()) == ["results", "results.json", "results.md"]
    assert track_results(made, ["runs/a"], tracking) != run_id


def test_without_mlflow_it_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "palf_dist.tracking")
    monkeypatch.setattr(results_tracking, "TIMEOUT", 1.0)
    made = small(tmp_path, headline={"diff_vs_tuned_ce": 1.5})
    assert track_results(made, ["runs/a"], TrackingConfig(uri=DEAD)) is None
    assert "not delivered; call palf-dist results again" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_without_room_for_a_copy_it_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results_tracking.shutil, "copy", full)
    assert track_results(small(tmp_path), ["runs/a"], TrackingConfig(uri=DEAD)) is None
    assert "MLflow is not given the results (No space left on device); call palf-dist" in caplog.text


def test_tracking_that_is_off_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_tracking, "MLflowTracker", None)
    assert track_results(small(tmp_path), ["runs/a"], TrackingConfig(enabled=False)) is None


def test_what_set_takes(tmp_path: Path) -> None:
    made = small(tmp_path)
    tracking = tracking_of(made, given_tracking(["tracking.uri=sqlite:///other.db", "tracking.enabled=false"]))
    assert tracking == TrackingConfig(uri="sqlite:///other.db", enabled=False)
    assert tracking_of(made, given_tracking([])) == made.config.tracking
    with pytest.raises(ConfigError, match=r"^--set: inner: unknown key; known here: tracking$"):
        given_tracking(["inner.steps=3"])
    with pytest.raises(ConfigError, match=r"--set: tracking\.enabled: must be a valid boolean"):
        given_tracking(["tracking.enabled=3"])


def test_metrics_are_what_is_measured_and_how_many_verdicts() -> None:
    verdicts = [{"verdict": verdict} for verdict in ("reproduced", "not measured", "not measured")]
    record = {"headline": {"a": 1.5, "b": None, "held_out_designs": 3}, "claims": verdicts, "targets": verdicts[:1]}
    assert metrics(record) == {
        "a": 1.5,
        "held_out_designs": 3.0,
        "claims_reproduced": 1.0,
        "claims_not_measured": 2.0,
        "targets_reproduced": 1.0,
    }
