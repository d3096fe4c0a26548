from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray.tune
from ray.tune import PlacementGroupFactory

from palf_dist.config import DistributedConfig, RunConfig
from palf_dist.config_loading import load_config
from palf_dist.distributed.cluster import changed_environment, connect, connected
from palf_dist.distributed.driver import meta_train
from palf_dist.errors import ClusterError, DataError
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.table import to_records
from palf_dist.search.driver import TUNE_SETTINGS
from palf_dist.search.targets import MetaTrainingConfig, make_target
from palf_dist.search.targets.meta_training import MetaTrainingTarget
from palf_dist.search.trial import Report, TrialContext
from tests.distributed.small import small_config

PARAMETERS = {"meta_learner.learning_rate": 0.02, "policy.refresh": 3}
SPACE = {
    "meta_learner.learning_rate": {"kind": "log", "low": 0.001, "high": 0.1},
    "policy.refresh": {"kind": "integer", "low": 2, "high": 6},
}


def config(base: RunConfig, space: dict[str, Any] = SPACE) -> MetaTrainingConfig:
    return MetaTrainingConfig.model_validate({"base": base.model_dump(mode="json"), "space": space})


def run_of(trial: Path) -> dict[str, bytes]:
    """What two trials that are the same have in common: policies, learner, trajectories."""
    newest = max((trial / "run" / "checkpoints").glob("step-*"))
    files = [
        *(trial / "policy").iterdir(),
        newest / "policy.safetensors",
        newest / "learner.safetensors",
        *(trial / "run" / "trajectories").rglob("*.parquet"),
    ]
    return {str(file.relative_to(trial)): file.read_bytes() for file in files}


def comparable(reports: list[Report]) -> list[tuple[Any, ...]]:
    return [(report.step, report.error, report.metrics["outer_loss"], report.done) for report in reports]


def context(folder: Path, **settings: Any) -> TrialContext:
    folder.mkdir()
    return TrialContext(folder, **settings)


def test_the_placement_group_has_a_bundle_for_each_worker() -> None:
    def bundles(**distributed: Any) -> list[dict[str, float]]:
        return MetaTrainingTarget(config(small_config(distributed=distributed))).bundles()

    assert bundles(workers=0, threads=2) == [{"CPU": 2.0}]
    assert bundles(workers=2, threads=3) == [{"CPU": 1.0}, {"CPU": 3.0}, {"CPU": 3.0}]
    assert bundles(workers=1, gpus_per_worker=0.5) == [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}]


def test_too_many_workers_are_named_as_in_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("palf_dist.distributed.cluster.nodes", lambda: [{"CPU": 4.0}])
    target = MetaTrainingTarget(config(small_config(distributed={"workers": 9})))
    with pytest.raises(ClusterError, match=r"^target\.base\.distributed\.workers: 9 workers .* room for 4"):
        target.bundles()


@pytest.mark.parametrize(("steps", "every", "reports"), [(4, 2, 2), (5, 2, 3), (3, 20, 1)])
def test_a_report_for_each_selection(steps: int, every: int, reports: int) -> None:
    base = small_config(meta_learner={"outer_steps": steps}, evaluation={"select_every": every})
    assert MetaTrainingTarget(config(base)).reports() == reports
    windowed = base.model_copy(update={"estimator": base.estimator.model_copy(update={"window": 5})})  # of 12 steps
    assert MetaTrainingTarget(config(windowed)).reports() == -(-reports // 3)


def test_datasets_are_checked_before_any_work(tmp_path: Path) -> None:
    base = small_config(data={"train": ["iris"], "held_out": [{"name": "own", "path": "nowhere.parquet"}]})
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        make_target(config(base))


def test_values_that_only_together_are_wrong_fail_the_trial_alone(tmp_path: Path) -> None:
    window = {"kind": "integer", "low": 4, "high": 12}
    steps = {"kind": "integer", "low": 6, "high": 12}
    target = MetaTrainingTarget(config(small_config(), {"estimator.window": window, "inner.steps": steps}))
    with pytest.raises(ValueError, match=r"space.estimator.window: must be at most inner.steps \(6\), not 12"):
        next(target.run({"estimator.window": 12, "inner.steps": 6}, context(tmp_path / "trial")))


@pytest.mark.slow
def test_a_trial_is_a_meta_training_and_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    target = make_target(config(small_config()))
    whole = list(target.run(PARAMETERS, context(tmp_path / "whole")))
    assert [report.step for report in whole] == [1, 2] and [report.done for report in whole] == [False, True]
    trial = load_config(tmp_path / "whole" / "policy" / "config.yaml")
    assert trial.policy.refresh == 3 and trial.meta_learner.learning_rate == 0.02

    told = context(tmp_path / "ended")
    reports = target.run(PARAMETERS, told)
    first = next(reports)
    assert first.checkpoint is not None and first.checkpoint.name == "step-000002"
    shutil.copytree(first.checkpoint, tmp_path / "handed over")
    reports.close()  # type: ignore[attr-defined]
    after = list(target.run(PARAMETERS, told))
    assert comparable(after) == comparable(whole)  # the first one comes again
    assert run_of(tmp_path / "ended") == run_of(tmp_path / "whole")

    stopped = context(tmp_path / "stopped")
    stopped.stop.set()
    assert list(target.run(PARAMETERS, stopped)) == []

    taken = context(tmp_path / "taken", start_from=tmp_path / "handed over")
    assert comparable(list(target.run(PARAMETERS, taken))) == comparable(whole)[1:]
    other = context(tmp_path / "other", start_from=tmp_path / "handed over")
    (report,) = target.run({**PARAMETERS, "meta_learner.learning_rate": 0.1}, other)
    assert report.step == 2 and run_of(tmp_path / "other") != run_of(tmp_path / "taken")

    alone = meta_train(trial, tmp_path / "alone")
    best = whole[-1].artefact
    assert best is not None and alone.policy is not None
    assert (best / alone.policy.name).read_bytes() == alone.policy.read_bytes()
    assert target.finish(best) == {"held_out": to_records(held_out(alone.rows)[0])}


def in_tune(parameters: dict[str, Any], target: MetaTrainingTarget, folder: Path) -> None:
    """What Ray Tune runs: reports all at once, and what is said of more workers than the placement group has."""
    reports = list(target.run(parameters, TrialContext(folder)))
    refusal = ""
    try:
        with connect(DistributedConfig(workers=3)):
            pass
    except ClusterError as error:
        refusal = str(error)
    alive = max(report.metrics["workers_alive"] for report in reports)
    ray.tune.report({"seen": comparable(reports), "alive": alive, "refusal": refusal})


@pytest.mark.slow
def test_the_workers_of_a_trial_are_in_its_placement_group(tmp_path: Path) -> None:
    """Ray has no CPU beside those of the group, so workers outside of it would never start."""
    alone = MetaTrainingTarget(config(small_config()))
    expected = comparable(list(alone.run(PARAMETERS, context(tmp_path / "alone"))))
    target = MetaTrainingTarget(config(small_config(distributed={"workers": 2})))
    folder = tmp_path / "trial"
    folder.mkdir()
    with changed_environment(TUNE_SETTINGS), connected(None, 3):
        analysis = ray.tune.run(
            ray.tune.with_parameters(in_tune, target=target, folder=folder),
            config=PARAMETERS,
            resources_per_trial=PlacementGroupFactory(target.bundles()),
            storage_path=str(tmp_path / "tune"),
            verbose=0,
        )
    (trial,) = analysis.trials
    assert trial.last_result["seen"] == expected and trial.last_result["alive"] == 2
    assert "room for 2" in trial.last_result["refusal"]
    assert run_of(folder).keys() == run_of(tmp_path / "alone").keys()
    policies = [(path / "run" / "best" / "policy.safetensors").read_bytes() for path in (folder, tmp_path / "alone")]
    assert policies[0] == policies[1]
