"""The report of ablations: figures that scipy finds as well, on runs that never took place."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from palf_dist.ablations.config import Ablations, Design, designs_of
from palf_dist.ablations.report import _monotone, make_ablations_report, report_name
from palf_dist.config_loading import parse_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.ablation_figures import more_tasks_figures, read_ablations
from palf_dist.evaluation.inference import Estimate
from palf_dist.evaluation.results import make_results
from tests.evaluation.judged import judged_run, rows_of
from tests.evaluation.synthetic import TRAINING

ABLATIONS = Ablations.model_validate(
    {
        "variants": [
            {"name": "better", "group": "size", "set": {"policy.hidden": 17}},
            {"name": "worse", "group": "size", "set": {"policy.hidden": 3}},
            {"name": "luck", "group": "another seed", "set": {"seed": 1}},
            {"name": "groups-4", "group": "tasks", "set": {"tasks.pool": 4}},
            {"name": "groups-1", "group": "tasks", "set": {"tasks.pool": 1}},
        ]
    }
)
GAINS = {"base": 0.0, "better": 0.02, "worse": -0.004, "luck": 0.001, "groups-4": -0.01, "groups-1": -0.03}
FOLDS = (("fashion_mnist", "german_credit", "forest"), ("iris", "wine", "reviews"))
DATASETS = [name for fold in FOLDS for name in fold]


def designs() -> list[Design]:
    def base(held_out: tuple[str, ...]) -> Any:
        return parse_config(f"data: {{train: [{', '.join(TRAINING)}], held_out: [{', '.join(held_out)}]}}", "a")

    return designs_of(ABLATIONS, {f"fold-{index}": base(datasets) for index, datasets in enumerate(FOLDS)})


def shift(name: str, dataset: str) -> float:
    """A variant's gain differs by dataset."""
    return GAINS[name] * (0.6 + 0.3 * DATASETS.index(dataset)) if name != "base" else 0.0


def judged(run_dir: Path) -> Path:
    """Runs of all designs."""
    for design in designs():
        for fold, datasets in zip(design.configs, FOLDS, strict=True):
            rows = [
                row | {"accuracy": row["accuracy"] + (row["method"] == "policy") * shift(design.name, row["dataset"])}
                for row in rows_of(datasets, ("policy", "ce"))
            ]
            judged_run(design.folder(run_dir, fold), rows)
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return judged(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    return make_ablations_report(designs(), runs, tmp_path_factory.mktemp("docs"))


def test_differences_to_the_base_are_what_scipy_finds(made):
    """With as many tasks of each dataset, the clustered test is the t test of the datasets' means."""
    p_values: dict[str, float] = {}
    for group in made.record["groups"].values():
        for variant in group:
            name, found = variant["name"], variant["against_base"]
            means = 100 * np.array([shift(name, dataset) for dataset in DATASETS])
            test = stats.ttest_1samp(means, 0)
            assert found["difference"] == pytest.approx(means.mean(), abs=1e-4)
            assert found["se"] == pytest.approx(stats.sem(means), abs=1e-4)
            interval = test.confidence_interval()
            assert found["ci95"] == pytest.approx([interval.low, interval.high], abs=1e-4)
            assert found["p"] == pytest.approx(test.pvalue, abs=1e-8)
            p_values[name] = test.pvalue
    size = {variant["name"]: variant["against_base"]["p_holm"] for variant in made.record["groups"]["size"]}
    low, high = sorted(size, key=p_values.__getitem__)
    assert size[low] == pytest.approx(2 * p_values[low], abs=1e-8)
    assert size[high] == pytest.approx(max(2 * p_values[low], p_values[high]), abs=1e-8)
    (luck,) = made.record["groups"]["another seed"]
    assert luck["against_base"]["p_holm"] == pytest.approx(p_values["luck"], abs=1e-8), "alone in its group"


def test_the_curve_goes_by_the_number_of_tasks_up_to_the_base(made):
    frame = pd.DataFrame([row for fold in FOLDS for row in rows_of(fold, ("policy", "ce"))])
    wide = frame.pivot(index=["dataset", "noise_rate", "condition", "seed"], columns="method", values="accuracy")
    ahead = 100 * (wide["policy"] - wide["ce"]).mean()
    curve = made.record["curve"]
    assert [(point["name"], point["tasks"]) for point in curve] == [
        ("groups-1", 24),
        ("groups-4", 96),
        ("base", 200 * 24),
    ]
    assert made.record["curve_factor"] == 200
    for point in curve:
        mean = 100 * np.mean([shift(point["name"], dataset) for dataset in DATASETS])
        assert point["diff_vs_tuned_ce"]["difference"] == pytest.approx(ahead + mean, abs=1e-4)
    assert [list(point["gains"]) for point in curve] == [[], ["groups-1"], ["groups-1", "groups-4"]]
    for point in curve:
        for before, gain in point["gains"].items():
            wanted = 100 * np.mean([shift(point["name"], name) - shift(before, name) for name in DATASETS])
            assert gain["difference"] == pytest.approx(wanted, abs=1e-4)
    assert made.record["curve_monotone"] is True
    page = made.files[0].read_text()
    assert "Over a factor of 200 the gain is monotone within error" in page
    last = curve[-1]["gains"]["groups-4"]["difference"]
    assert (
        f"| base | 4,800 | {curve[-1]['diff_vs_tuned_ce']['difference']:+.2f} (" in page and f"| {last:+.2f} (" in page
    )
    assert "fresh tasks of the training datasets, which no pool holds: 48 to pick its best policy" in page


def test_the_results_read_what_was_written(made):
    (found,) = read_ablations(made.files[0].parent)
    assert found.base.digest == made.record["designs"][0]["digest"]
    assert {variant.name for variant in found.variants} == {"better", "worse", "luck", "groups-4", "groups-1"}
    gain = more_tasks_figures([found], found.base.digest)["diff_more_tasks"]
    written = made.record["curve"][-1]["gains"]["groups-4"]
    assert gain.meaning == "4,800 meta-training tasks against 96" and gain.value == written["difference"]
    assert gain.estimate is not None and gain.estimate.clusters == len(DATASETS)


def test_fewer_tasks_that_do_better_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(GAINS, "groups-1", 0.03)
    upside_down = make_ablations_report(designs(), judged(tmp_path / "runs"), tmp_path / "docs")
    assert upside_down.record["curve_monotone"] is False
    assert "the gain is not monotone" in upside_down.files[0].read_text()


def estimate(mean: float, low: float, high: float, clusters: int = 6) -> Any:
    return SimpleNamespace(overall=SimpleNamespace(difference=Estimate(mean, 0.1, low, high, 0.5, 60, clusters)))


def curve_of(*gains: list[Any]) -> list[Any]:
    return [SimpleNamespace(gains=each) for each in ([], *gains)]


@pytest.mark.parametrize(
    ("curve", "monotone"),
    [
        (curve_of([estimate(0.5, 0.1, 0.9)]), True),
        (curve_of([estimate(-0.5, -0.9, -0.1)]), False),
        (curve_of([estimate(-0.3, -0.7, 0.1)], [estimate(-0.6, -1.0, -0.2), estimate(-0.3, -0.7, 0.1)]), False),
        (curve_of([estimate(-0.3, -0.7, 0.1)], [estimate(-0.3, -0.7, 0.1), estimate(0.0, -0.4, 0.4)]), True),
        (curve_of([estimate(0.5, 0.1, 0.9, clusters=4)]), None),
        (curve_of([estimate(0.5, math.nan, math.nan)]), None),
        (curve_of(), None),
    ],
    ids=["up", "down", "slowly down", "within error", "four datasets", "no error", "one point"],
)
def test_monotone_is_no_point_significantly_below_any_before_it(curve: list[Any], monotone: bool | None) -> None:
    assert _monotone(curve) is monotone


def test_the_page_names_changes_and_looks(made):
    page = made.files[0].read_text()
    for words in (
        "## Size",
        "| worse | policy.hidden=3 | -0.54 (",
        "## Another seed",
        "of these among them: 6",
    ):
        assert words in page
    assert page.count("](ablations_tasks.png)") == 1


@pytest.mark.slow
def test_variants_count_as_designs_of_the_published_results_whichever_comes_first(runs, tmp_path):
    folds = [
        judged_run(tmp_path / f"fold-{index}", rows_of(datasets), "name=run") for index, datasets in enumerate(FOLDS)
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    assert make_ablations_report(designs(), runs, first).record["held_out_designs"] == 6
    results = make_results(folds, first)
    assert results.record["headline"]["held_out_designs"] == 6, "the base is the published design"
    assert {each["name"] for each in results.record["designs"]} >= {"run", "run.worse", "run.groups-1"}
    assert "published here so far, this one among them: 6" in results.markdown.read_text()
    assert make_results(folds, second).record["headline"]["held_out_designs"] == 1
    assert make_ablations_report(designs(), runs, second).record["held_out_designs"] == 6
    assert make_results(folds, second).record["headline"]["held_out_designs"] == 6


def test_reports_of_several_files_lie_in_one_folder_and_count_each_others_designs(made, runs, tmp_path):
    first, second = designs()[:2], [designs()[0], *designs()[2:4]]
    assert make_ablations_report(first, runs, tmp_path).record["held_out_designs"] == 2
    other = make_ablations_report(second, runs, tmp_path, report_name(Path("configs/mine.yaml")))
    assert other.record["held_out_designs"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("ablations", "ablations-mine") for ending in ("md", "json")
    }
    assert "[ablations-mine.json](ablations-mine.json)" in other.files[0].read_text()
    assert (
        report_name(Path("ablations-palf.yaml")) == "ablations-palf"
        and report_name(Path("ablations.yaml")) == "ablations"
    )
    assert make_ablations_report(first, runs, tmp_path).record["held_out_designs"] == 4


def test_an_output_that_cannot_be_written_is_named(runs, tmp_path):
    (tmp_path / "docs").write_text("a file")
    with pytest.raises(RunDirectoryError, match=r"--output .*docs: cannot be written"):
        make_ablations_report(designs(), runs, tmp_path / "docs")
