from __future__ import annotations

import dataclasses
import io
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from palf_dist import faults
from palf_dist.config import RunConfig
from palf_dist.config_loading import load_config
from palf_dist.distributed import driver
from palf_dist.distributed.cluster import Share
from palf_dist.distributed.driver import RunResult, _at_use, evaluate_policy, meta_train
from palf_dist.errors import ConfigError, DataError, PolicyFileError, RunDirectoryError
from palf_dist.evaluation.runs import read_run
from palf_dist.memory import Plan
from palf_dist.policies.policy_file import load_policy, save_policy
from palf_dist.progress import Progress
from palf_dist.tasks.datasets import load_all
from palf_dist.types import Contribution, Unit
from palf_dist.units import Runner
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import fault, small_config


class StoppingRunner(Runner):
    """Asks for the end of the run, as Ctrl-C does, when a given unit is done. In process only."""

    stop = threading.Event()
    at = ("meta_gradient", 0, 0)

    def run(self, unit: Unit, *arguments: Any) -> Contribution:
        contribution = super().run(unit, *arguments)
        if (unit.kind, unit.outer_step, unit.group) == self.at:
            self.stop.set()
        return contribution


def train(config: RunConfig, run_dir: Path, **arguments: Any) -> tuple[RunResult, str]:
    """The result and what the screen showed."""
    screen = io.StringIO()
    progress = Progress(Console(file=screen, width=200))
    return meta_train(config, run_dir, progress=progress, **arguments), screen.getvalue()


def stop_after(unit: tuple[str, int, int]) -> dict[str, Any]:
    """Arguments of a run that is stopped right after ``unit``."""
    stop = threading.Event()
    return {"make_runner": type("RunnerStoppingHere", (StoppingRunner,), {"stop": stop, "at": unit}), "stop": stop}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of small_config in process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    meta_train(small_config(), run_dir)
    return run_dir


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    config = small_config()
    result, screen = train(config, tmp_path / "run")
    run_dir = tmp_path / "run"
    assert result.run_dir == run_dir and result.outer_steps == 4 and not result.interrupted
    assert result.contributions["applied"] == 8 and result.contributions["reissued"] == 0
    assert sum(result.contributions["refused"].values()) == 0
    assert load_config(run_dir / "config.yaml") == config
    assert result.policy == run_dir / "best" / "policy.safetensors"
    assert pq.read_table(run_dir / "results.parquet").to_pylist() == result.rows
    assert {row["method"] for row in result.rows} == {"policy", "ce"}
    assert result.report is not None and result.report.page.is_file()
    metrics = pq.read_table(run_dir / "metrics.parquet").to_pylist()
    assert [row["outer_step"] for row in metrics] == [0, 1, 2, 3]
    assert sum(row["applied"] for row in metrics) == 8
    assert [row["selection_score"] is None for row in metrics] == [True, False, True, False]
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [f"step-{i:06d}" for i in (2, 3, 4)]
    for phase in ("tuning 8/8", "calibrating 2/2", "meta-training 4/4 · outer loss", "evaluating 2/2"):
        assert phase in screen


def test_the_best_policy_is_the_one_that_is_kept(undisturbed: Path) -> None:
    card = load_policy(undisturbed / "best").card
    metrics = pq.read_table(undisturbed / "metrics.parquet").to_pylist()
    scores = {row["outer_step"] + 1: row["selection_score"] for row in metrics if row["selection_score"] is not None}
    assert card["selection_score"] >= max(scores.values())
    assert card["outer_step"] == 0 or scores[card["outer_step"]] == card["selection_score"]


def test_a_second_run_may_not_take_the_folder_of_a_first(undisturbed: Path) -> None:
    before = fingerprint(undisturbed)
    with pytest.raises(RunDirectoryError, match="not empty"):
        meta_train(small_config(), undisturbed)
    assert fingerprint(undisturbed) == before


@pytest.mark.parametrize(
    "unit",
    [
        ("tune", 0, 1),
        ("select", 0, 0),
        ("meta_gradient", 1, 0),
        ("select", 2, 0),
        ("evaluate", 0, 0),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    unit: tuple[str, int, int], undisturbed: Path, tmp_path: Path
) -> None:
    result, _ = train(small_config(), tmp_path / "run", **stop_after(unit))
    assert result.interrupted and result.rows == [] and result.report is None
    result, _ = train(small_config(), tmp_path / "run", resume=True)
    assert not result.interrupted and result.outer_steps == 4 and result.contributions["applied"] == 8
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


def test_a_finished_run_can_be_resumed(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    result, _ = train(small_config(), tmp_path / "run", resume=True)
    assert result.outer_steps == 4 and len(result.rows) > 0
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


def test_a_torn_checkpoint_is_told_and_skipped(undisturbed: Path, tmp_path: Path) -> None:
    train(small_config(), tmp_path / "run", **stop_after(("meta_gradient", 3, 0)))
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    content = (newest / "learner.safetensors").read_bytes()
    (newest / "learner.safetensors").write_bytes(content[: len(content) // 2])
    _, screen = train(small_config(), tmp_path / "run", resume=True)
    assert f"checkpoint {newest} was skipped" in screen
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)


def test_a_gradient_that_is_not_finite_is_refused_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, fault("after_unit", ("meta_gradient", 1, 1), "nan"))
    result, screen = train(small_config(), tmp_path / "run")
    assert result.contributions["refused"]["non_finite"] == 1 and result.contributions["applied"] == 7
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [row["refused_non_finite"] for row in metrics] == [0, 1, 0, 0]
    assert "refused 1 non_finite" in screen
    assert np.isfinite(load_policy(tmp_path / "run" / "best").phi).all()


@pytest.mark.parametrize(
    ("window", "policy"), [(4, {"refresh": 4}), (5, {"refresh": 3, "kind": "recurrent", "shield": 1.0})]
)
def test_windows_carry_the_inner_state_through_a_stop(window: int, policy: dict[str, Any], tmp_path: Path) -> None:
    """The second goes on between two refreshes, from what was seen before and what the shield made of it."""
    config = small_config(estimator={"window": window}, policy=policy, meta_learner={"outer_steps": 7})
    meta_train(config, tmp_path / "whole")
    train(config, tmp_path / "run", **stop_after(("meta_gradient", 4, 1)))
    state = json.loads((max((tmp_path / "run" / "checkpoints").iterdir()) / "state.json").read_bytes())
    assert "carried.safetensors" in state["content"]["files"]
    if "shield" in policy:
        carried = load_file(max((tmp_path / "run" / "checkpoints").iterdir()) / "carried.safetensors")
        kept = {json.loads(name)[1].removeprefix("state/"): array for name, array in carried.items()}
        assert kept["features"].ndim == 3 and (kept["mixing"] > 0).any() and (kept["shielded"] > 0).any()
    train(config, tmp_path / "run", resume=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_asynchronous_steps_in_process(tmp_path: Path) -> None:
    config = small_config(distributed={"mode": "async"}, meta_learner={"outer_steps": 5})
    meta_train(config, tmp_path / "whole")
    train(config, tmp_path / "run", **stop_after(("meta_gradient", 1, 0)))
    result, _ = train(config, tmp_path / "run", resume=True)
    assert result.outer_steps == 5 and result.contributions["applied"] == 5
    files = sorted((tmp_path / "run" / "trajectories").glob("*/*"))
    assert [f"{path.parent.name}/{path.stem}" for path in files] == [
        f"step={step:06d}/group-{group:04d}" for step, group in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    ]


def test_evaluate_policy_gives_the_rows_of_the_run(undisturbed: Path) -> None:
    rows = evaluate_policy(small_config(), undisturbed / "best", progress=Progress(Console(file=io.StringIO())))
    kept = pq.read_table(undisturbed / "results.parquet").to_pylist()
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in kept]
    with pytest.raises(PolicyFileError, match="policy section"):
        evaluate_policy(small_config(policy={"hidden": 3}), undisturbed / "best")


def test_a_policy_is_judged_on_another_architecture_and_horizon(undisturbed: Path, tmp_path: Path) -> None:
    """Tuned anew there, and asked as often as in its training: every 4 of 12 steps, every 10 of 30."""
    card = load_policy(undisturbed / "best").card
    assert card["inner_steps"] == 12 and [item["kind"] for item in card["architectures"]] == ["mlp"]
    wide = {"architectures": [{"kind": "mlp", "hidden": [16]}]}
    found = {}
    for name, sections in {"longer": {"inner": {"steps": 30}}, "wider": {"tasks": wide}}.items():
        config, screen = small_config(**sections), io.StringIO()
        found[name] = evaluate_policy(
            config, undisturbed / "best", run_dir=tmp_path / name, progress=Progress(Console(file=screen, width=200))
        )
        assert "tuning 8/8" in screen.getvalue()
        kept = read_run(str(tmp_path / name))
        assert kept.rows == found[name] and kept.config == config
        alone = read_run(str(tmp_path / name / "results.parquet"))
        assert alone == dataclasses.replace(kept, place=alone.place, alone=True)
        assert kept.transfer == {"longer": "horizon", "wider": "architecture"}[name]
        for file in ("policy.safetensors", "policy.json"):
            assert (tmp_path / name / "best" / file).read_bytes() == (undisturbed / "best" / file).read_bytes()
    asked = small_config(inner={"steps": 30}, policy={"refresh": 10})
    artefact = load_policy(undisturbed / "best")
    scaled = dataclasses.replace(
        artefact,
        spec=dataclasses.replace(artefact.spec, refresh=10),
        card={name: value for name, value in artefact.card.items() if name != "inner_steps"},
    )
    save_policy(tmp_path / "scaled", scaled)
    rows = evaluate_policy(asked, tmp_path / "scaled", progress=Progress(Console(file=io.StringIO())))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in found["longer"]]


def test_the_results_of_a_run_say_what_they_are_of(undisturbed: Path) -> None:
    run, alone = (read_run(str(place)) for place in (undisturbed, undisturbed / "results.parquet"))
    assert alone == dataclasses.replace(run, place=alone.place, alone=True)


def test_what_evaluate_keeps_goes_into_a_new_folder(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not empty"):
        evaluate_policy(small_config(), undisturbed / "best", run_dir=undisturbed)
    trained_on_it = small_config(data={"train": ["digits"], "held_out": ["wine"]})
    with pytest.raises(DataError, match="trained on rows of wine"):
        evaluate_policy(trained_on_it, undisturbed / "best", run_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_an_evaluation_that_is_kept_is_no_run_to_resume(undisturbed: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(undisturbed / "best", kept / "best")
    for name in ("config.yaml", "results.parquet"):
        shutil.copy(undisturbed / name, kept)
    before = contents(kept)
    with pytest.raises(RunDirectoryError, match=r"keeps an evaluation .* palf-dist evaluate --resume"):
        meta_train(small_config(), kept, resume=True)
    assert {path: content for path, content in contents(kept).items() if path.name != ".lock"} == before


def test_an_evaluation_without_its_rows_is_no_result(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "results_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_policy(small_config(), undisturbed / "best", run_dir=tmp_path / "kept")
    with pytest.raises(RunDirectoryError, match="keeps an evaluation"):
        meta_train(small_config(), tmp_path / "kept", resume=True)
    with pytest.raises(RunDirectoryError, match="has not been evaluated"):
        read_run(str(tmp_path / "kept"))


def test_no_memory_is_asked_for_a_meta_gradient_that_is_not_taken() -> None:
    """What the exact gradient of so long a run would keep is more than one worker may take."""
    config = small_config(inner={"steps": 3000}, distributed={"workers": 0, "memory_per_worker": 0.005})
    with pytest.raises(ConfigError, match="meta_gradient"):
        Plan(config, load_all(config.data)).check()
    Plan(_at_use(config, refresh=1000), load_all(config.data)).check()


def test_evaluate_policy_refuses_what_the_policy_was_trained_on(undisturbed: Path, tmp_path: Path) -> None:
    def named(held_out: list[Any]) -> RunConfig:
        return small_config(data={"train": ["digits"], "held_out": held_out})

    card = load_policy(undisturbed / "best").card
    assert card["origins"] == ["breast_cancer", "wine"]
    for held_out in ("wine", {"name": "wine", "path": table(tmp_path / "own.parquet")}):
        with pytest.raises(DataError, match=r"trained on rows of wine .*trained on breast_cancer, wine\); name a"):
            evaluate_policy(named(["iris", held_out]), undisturbed / "best")
    folder = tmp_path / "policy"
    save_policy(folder, dataclasses.replace(load_policy(undisturbed / "best"), card=card | {"origins": ["iris"]}))
    with pytest.raises(DataError, match="trained on rows of iris"):
        evaluate_policy(named(["iris"]), folder)


def table(path: Path, start: int = 0) -> str:
    pq.write_table(pa.table({"x": np.arange(start, start + 120), "label": np.arange(120) % 2}), path)
    return str(path)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dataset_that_changed_is_noticed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    own = {"name": "own", "path": table(path)}
    config = small_config(data={"train": ["breast_cancer", own], "held_out": ["iris"]})
    train(config, tmp_path / "run", **stop_after(("meta_gradient", 1, 0)))
    before = contents(tmp_path / "run")
    table(path, start=1)
    with pytest.raises(DataError, match=r"^own: the dataset has changed since the run began .* restore its file, or"):
        train(config, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    table(path)
    assert not train(config, tmp_path / "run", resume=True)[0].interrupted


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3, "auto"])
def test_the_number_of_workers_changes_nothing(
    share: Share, workers: int | str, undisturbed: Path, tmp_path: Path
) -> None:
    result, _ = train(small_config(distributed={"workers": workers}), tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)
    assert result.contributions["reissued"] == 0


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(
    share: Share, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "killed"
    monkeypatch.setenv(faults.VARIABLE, fault("in_unit", ("meta_gradient", 2, 1), "kill", mark))
    result, screen = train(small_config(distributed={"workers": 2}), tmp_path / "run")
    assert mark.exists() and result.contributions["reissued"] == 1
    assert "died; it is replaced, and unit meta_gradient 2/1 is issued again" in screen
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed)
    reissued = pq.read_table(tmp_path / "run" / "metrics.parquet")["reissued"].to_pylist()
    assert reissued == [0, 0, 1, 0]


@pytest.mark.slow
def test_windows_do_not_depend_on_the_workers(share: Share, tmp_path: Path) -> None:
    settings = {"estimator": {"window": 4}, "meta_learner": {"outer_steps": 5}}
    meta_train(small_config(**settings), tmp_path / "whole")
    meta_train(small_config(**settings, distributed={"workers": 2}), tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
def test_asynchronous_mode_refuses_what_is_stale(share: Share, tmp_path: Path) -> None:
    """With two workers and no staleness allowed, whatever was computed beside an applied contribution is late."""
    distributed = {"mode": "async", "workers": 2, "max_staleness": 0}
    config = small_config(distributed=distributed, meta_learner={"outer_steps": 6})
    result, _ = train(config, tmp_path / "run")
    refused = result.contributions["refused"]
    assert result.outer_steps == result.contributions["applied"] == 6
    assert refused["stale"] >= 1 and sum(refused.values()) == refused["stale"]
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    assert [row["outer_step"] for row in metrics] == list(range(6))
    assert sum(row["refused_stale"] for row in metrics) == refused["stale"]
