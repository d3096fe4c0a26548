"""The runs of ablations: what they share, and that they go on where they were stopped."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from palf_dist.ablations import runs
from palf_dist.ablations.config import Ablations, Design, designs_of
from palf_dist.ablations.report import make_ablations_report
from palf_dist.ablations.runs import run_designs
from palf_dist.config import RunConfig
from palf_dist.distributed.driver import meta_train
from palf_dist.errors import ConfigError, RunDirectoryError
from palf_dist.progress import Progress
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config
from tests.distributed.test_driver import stop_after

pytestmark = pytest.mark.slow

ABLATIONS = Ablations.model_validate(
    {
        "variants": [
            {"name": "narrow", "group": "size", "set": {"policy.hidden": 3}},
            {"name": "groups-2", "group": "tasks", "set": {"tasks.pool": 2}},
            {"name": "groups-1", "group": "tasks", "set": {"tasks.pool": 1}},
        ],
    }
)


def designs(**sections: dict[str, Any]) -> list[Design]:
    return designs_of(ABLATIONS, {"": small_config(**sections)})


def run(run_dir: Path, *only: str, of: list[Design] | None = None, **arguments: Any) -> tuple[bool, str]:
    """Whether all are finished, and what the screen showed."""
    screen = io.StringIO()
    progress = Progress(Console(file=screen, width=200))
    return run_designs(of or designs(), run_dir, only or None, progress=progress, **arguments), screen.getvalue()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ablations")
    finished, screen = run(run_dir)
    assert finished and "run 4 of 4: groups-1 (tasks.pool=1)" in screen
    assert screen.count("tuning 8/8") == 1, "for the base"
    return run_dir


def test_a_variant_is_the_run_that_meta_train_gives(undisturbed: Path, tmp_path: Path) -> None:
    """Tuned values are the base's, which are those that it would find itself."""
    fewest = designs()[-1]
    meta_train(fewest.configs[""], tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(undisturbed / fewest.name)


def test_what_is_finished_is_left(undisturbed: Path) -> None:
    before = contents(undisturbed)
    finished, screen = run(undisturbed)
    assert finished and screen == "" and contents(undisturbed) == before


def test_stopped_ones_go_on_as_if_they_had_not_been(undisturbed: Path, tmp_path: Path) -> None:
    """The first time in the base; then only one variant, which is stopped as well."""
    finished, _ = run(tmp_path, **stop_after(("tune", 0, 3)))
    assert not finished and not (tmp_path / "narrow").exists()
    finished, _ = run(tmp_path, "base")
    assert finished
    finished, _ = run(tmp_path, "groups-2", **stop_after(("meta_gradient", 2, 1)))
    assert not finished
    finished, screen = run(tmp_path, "groups-2")
    assert finished and "run 1 of 1: groups-2" in screen and "tuning" not in screen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "groups-2"]
    for name in ("base", "groups-2"):
        assert fingerprint(tmp_path / name) == fingerprint(undisturbed / name)


def test_another_configuration_in_the_folder_is_refused_before_any_run(undisturbed: Path) -> None:
    before = contents(undisturbed)
    with pytest.raises(ConfigError, match=r"base: began with another configuration; .*\n.*hidden: 16 in the run, 4"):
        run(undisturbed, of=designs(policy={"hidden": 4}))
    with pytest.raises(ConfigError, match=r"--only: there is no narow; there are groups-1, groups-2, narrow"):
        run(undisturbed, "narow")
    assert contents(undisturbed) == before


def never(*_: object) -> Any:
    raise AssertionError("a run has begun")


class Narrow:
    """In the place of the memory plan: what is wider than 100 units does not fit."""

    def __init__(self, config: RunConfig, *_: object) -> None:
        self.hidden = config.policy.hidden

    def check(self) -> None:
        if self.hidden > 100:
            raise ConfigError(f"{self.hidden} units do not fit")


def test_variants_that_a_later_run_would_refuse_are_told_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "Plan", Narrow)
    sizes = {"good": 8, "large": 101, "larger": 102}
    made = Ablations.model_validate(
        {"variants": [{"name": name, "group": "g", "set": {"policy.hidden": size}} for name, size in sizes.items()]}
    )
    found = designs_of(made, {"": small_config()})
    with pytest.raises(ConfigError, match=r"^large: 101 units do not fit\nlarger: 102 units do not fit$"):
        run(tmp_path / "runs", of=found, make_runner=never)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(AssertionError, match="a run has begun"):  # what nobody asked for bars nothing
        run(tmp_path / "runs", "good", of=found, make_runner=never)


def test_tasks_of_every_fold_are_looked_at_before_the_first_run(tmp_path: Path) -> None:
    conv = {"architectures": [{"kind": "conv"}]}
    folds = {
        "fold-0": small_config(data={"held_out": ["iris"]}),
        "fold-1": small_config(data={"held_out": ["digits"]}, tasks=conv),
    }
    with pytest.raises(ConfigError, match=r"^fold-1/base: tasks\.architectures\.0: conv can read none of the training"):
        run(tmp_path / "runs", of=designs_of(ABLATIONS, folds), make_runner=never)
    assert not (tmp_path / "runs").exists()


def test_all_runs_have_one_ray(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = ray.init, []

    def counted(**settings: Any) -> Any:
        begun.append(settings)
        return begin(**settings)

    monkeypatch.setattr(ray, "init", counted)
    finished, _ = run(tmp_path, "groups-2", of=designs(distributed={"workers": 2}))
    assert finished and fingerprint(tmp_path / "groups-2") == fingerprint(undisturbed / "groups-2")
    assert len(begun) == 1 and not ray.is_initialized()


def test_the_report_has_what_is_finished_and_counts_it(undisturbed: Path, tmp_path: Path) -> None:
    made = make_ablations_report(designs(), undisturbed, tmp_path)
    assert {group: [each["name"] for each in of] for group, of in made.record["groups"].items()} == {
        "size": ["narrow"],
        "tasks": ["groups-2", "groups-1"],
    }
    assert [(point["name"], point["tasks"]) for point in made.record["curve"]] == [
        ("groups-1", 2),
        ("groups-2", 4),
        ("base", 16),
    ]
    assert made.record["curve_factor"] == 8 and made.record["held_out_designs"] == 4
    assert json.loads((tmp_path / "ablations.json").read_text()) == made.record
    assert {path.name for path in made.files} == {"ablations.md", "ablations.json", "ablations_tasks.png"}
    again = make_ablations_report([designs()[0], designs()[1]], undisturbed, tmp_path)
    assert again.record["held_out_designs"] == 4, "none is dropped"
    assert again.record["curve"] == [] and again.record["curve_monotone"] is None
    assert len(again.files) == 2


def test_results_of_other_tasks_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "runs")
    place = tmp_path / "runs" / "narrow" / "results.parquet"
    table = pq.read_table(place)
    rows = table.to_pylist()
    accuracy = [row["accuracy"] - 0.01 * (row["method"] == "ce") for row in rows]
    pq.write_table(table.set_column(table.schema.get_field_index("accuracy"), "accuracy", [accuracy]), place)
    with pytest.raises(RunDirectoryError, match="narrow: ce has other results there than in base"):
        make_ablations_report(designs(), tmp_path / "runs", tmp_path / "docs")
