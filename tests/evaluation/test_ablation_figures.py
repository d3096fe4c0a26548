"""What ablations say of claims and targets, from reports that ``palf-dist ablate`` would write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.ablation_figures import (
    AblationRecord,
    losses_left_out,
    more_tasks_figures,
    read_ablations,
    update_frequency,
)


def measured(mean: float, half: float = 0.2, clusters: int = 6) -> dict[str, Any]:
    return {
        "difference": mean,
        "se": half / 2,
        "ci95": [mean - half, mean + half],
        "tasks": 60,
        "clusters": clusters,
        "p": 0.1,  # and what else the report has
    }


def record(
    *variants: tuple[str, dict[str, Any], dict[str, Any]],
    basis: tuple[str, ...] = ("ce", "focal", "info_nce"),
    policy: str = "palf",
    curve: list[dict[str, Any]] | None = None,
    window: int | None = None,
) -> AblationRecord:
    groups = {name: [{"name": name, "set": set_, "against_base": of}] for name, set_, of in variants}
    base = {"name": "base", "digest": "d", "policy": policy, "basis": basis, "window": window}
    return AblationRecord.model_validate_json(json.dumps({"base": base, "groups": groups, "curve": curve or []}))


def without(info_nce: float, focal: float, **more: Any) -> AblationRecord:
    return record(
        ("no-info_nce", {"policy.basis": ["ce"]}, measured(info_nce, **more)),
        ("no-focal", {"policy.basis": ["ce"]}, measured(focal, **more)),
    )


@pytest.mark.parametrize(
    ("info_nce", "focal", "verdict"),
    [
        (-1.4, -1.2, "reproduced"),
        (-1.4, -0.9, "not reproduced"),  # not as much
        (1.0, 1.0, "opposite"),  # better without
        (1.0, -1.2, "not reproduced"),
    ],
)
def test_losses_left_out(info_nce: float, focal: float, verdict: str) -> None:
    finding = losses_left_out([without(info_nce, focal)])
    assert finding.verdict == verdict
    assert finding.measured.startswith(f"without info_nce {-info_nce:+.2f} (.10) points lost, 95 % interval")
    assert f"without focal {-focal:+.2f}" in finding.measured


def test_losses_that_were_not_left_out_say_nothing() -> None:
    other = record(("no-focal", {}, measured(-2.0)), basis=("ce", "focal"))
    alone = record(("no-focal", {}, measured(-2.0)))
    assert losses_left_out([]).verdict == losses_left_out([other, alone]).verdict == "not measured"
    assert losses_left_out([other, without(-1.4, -1.2)]).verdict == "reproduced", "the report that has both"
    assert losses_left_out([without(-1.4, -1.2, clusters=4)]).verdict == "not measured"


def windows(policy: str = "palf", window: int | None = None, **means: float) -> AblationRecord:
    return record(
        *(
            (name, {"estimator.window": int(name[1:]), "meta_learner.outer_steps": 300}, measured(mean))
            for name, mean in means.items()
        ),
        ("other", {"estimator.window": 100, "policy.refresh": 1}, measured(9.0)),  # changes more than that
        policy=policy,
        window=window,
    )


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ({"w100": 0.5, "w25": 0.1}, "reproduced"),
        ({"w100": 0.5, "w25": 0.6}, "not reproduced"),  # another one is ahead
        ({"w100": 0.1, "w25": 0.0}, "not reproduced"),  # nothing is sure
        ({"w100": -0.5, "w25": -0.9}, "opposite"),
        ({"w50": 0.5, "w25": 0.1}, "not measured"),
        ({"w100": 0.5}, "not measured"),  # with nothing else to compare
    ],
)
def test_update_frequency(means: dict[str, float], verdict: str) -> None:
    assert update_frequency([windows(**means)]).verdict == verdict


def test_a_base_that_is_updated_within_a_run_tells_nothing() -> None:
    assert update_frequency([windows(window=50, w100=0.5, w25=0.1)]).verdict == "not measured"


def test_the_papers_policy_comes_first() -> None:
    ours, papers = windows("informed", w100=0.5, w25=0.1), windows("palf", w100=-0.5, w25=0.1)
    finding = update_frequency([ours, papers])
    assert finding.verdict == "opposite" and finding.measured.endswith("every 25 +0.10 (.10) (policy palf)")
    assert update_frequency([ours]).verdict == "reproduced"


def curve(*tasks: int, gain: float = 1.0, fall: float = 1.0) -> list[dict[str, Any]]:
    """Points with so many tasks; the last one ``gain`` above the first, ``fall`` above the others."""
    return [
        {
            "name": f"groups-{own}",
            "tasks": own,
            "gains": {
                f"groups-{before}": measured(gain if before == tasks[0] else fall, clusters=6 + index)
                for before in tasks[:index]
            },
        }
        for index, own in enumerate(tasks)
    ]


def test_more_tasks() -> None:
    found = more_tasks_figures([record(curve=curve(10, 80, 640, gain=2.0, fall=-0.5))], "d")
    gain, falls = found["diff_more_tasks"], found["falls_with_more_tasks"]
    assert gain.value == -0.5 and gain.estimate is not None and gain.estimate.high == pytest.approx(-0.3)
    assert gain.meaning == "640 meta-training tasks against 80", "the nearest that has eight times fewer"
    assert falls.value == 1 and falls.clusters == 7, "640 below 80; of the fewest datasets"
    nearer = more_tasks_figures([record(curve=curve(10, 90, 640, gain=2.0, fall=-0.5))], "d")
    assert nearer["diff_more_tasks"].value == 2.0, "90 are not eight times fewer"
    assert more_tasks_figures([record(curve=curve(10, 80))], "d")["falls_with_more_tasks"].value == 0


@pytest.mark.parametrize("records", [[], [record()], [record(curve=curve(10, 79))]])
def test_a_curve_that_is_missing_or_short_is_no_figure(records: list[AblationRecord]) -> None:
    found = more_tasks_figures(records, "d")
    assert all(figure.value is None and "palf-dist ablate" in figure.meaning for figure in found.values())


def test_a_curve_of_another_design_is_none_of_this_one() -> None:
    assert more_tasks_figures([record(curve=curve(10, 80))], "e")["diff_more_tasks"].value is None


def test_what_has_no_error_has_no_interval() -> None:
    (variant,) = record(("a", {}, measured(1.0) | {"se": None, "ci95": None})).variants
    estimate = variant.against_base.estimate
    assert estimate.mean == 1.0 and math.isnan(estimate.se) and math.isnan(estimate.high)


def test_reports_are_read_from_the_folder(tmp_path: Path) -> None:
    assert read_ablations(tmp_path) == read_ablations(tmp_path / "nowhere") == []
    (tmp_path / "ablations-palf.json").write_text(without(-1.0, -1.0).model_dump_json())
    assert [found.base.policy for found in read_ablations(tmp_path)] == ["palf"]
    (tmp_path / "ablations.json").write_text('{"designs": []}')
    with pytest.raises(RunDirectoryError, match=r"ablations\.json: is no file of this version of palf-dist ablate"):
        read_ablations(tmp_path)
