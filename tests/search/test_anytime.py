from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palf_dist.atomic import superseded
from palf_dist.run_directory import BEST
from palf_dist.search.anytime import ANYTIME, Anytime, Best, parameters_used, read_best
from palf_dist.search.ledger import Heard
from palf_dist.search.trial import ON_THE_FLY, Report


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    (folder / "inside").mkdir(parents=True)
    (folder / "model").write_text("good")
    (folder / "inside" / "more").write_text("still good")
    return folder


def test_only_what_is_better_takes_the_place_of_the_best(tmp_path: Path, artefact: Path) -> None:
    anytime = Anytime(tmp_path)
    assert read_best(tmp_path) is None
    assert not anytime.offer(Report(1, math.nan, artefact=artefact), 1, {}, 1, 0.1)
    assert anytime.offer(Report(1, 2.0, artefact=artefact), 1, {"x": 1.0}, 1, 0.2)
    (artefact / "model").write_text("better")
    assert anytime.offer(Report(4, 1.0, artefact=artefact), 2, {"x": 3.0}, 2, 0.5)
    (artefact / "model").write_text("worse")
    assert not anytime.offer(Report(5, 1.0, artefact=artefact), 2, {"x": 3.0}, 2, 0.6)
    assert not anytime.offer(Report(6, math.inf, artefact=artefact), 2, {"x": 3.0}, 2, 0.7)
    assert read_best(tmp_path) == anytime.best == Best(2, 4, 1.0, {"x": 3.0}, 2, 0.5)
    assert (tmp_path / BEST / "model").read_text() == "better"
    assert (tmp_path / BEST / "inside" / "more").read_text() == "still good"
    resumed = Anytime(tmp_path)
    assert resumed.best == anytime.best
    assert not resumed.offer(Report(7, 1.5, artefact=artefact), 3, {}, 3, 0.9)


def test_a_search_killed_in_the_instant_of_the_exchange_keeps_its_best(tmp_path: Path, artefact: Path) -> None:
    Anytime(tmp_path).offer(Report(1, 2.0, artefact=artefact), 1, {}, 1, 0.2)
    (tmp_path / BEST).rename(superseded(tmp_path / BEST))
    found = read_best(tmp_path)
    assert found is not None and found.error == 2.0
    assert Anytime(tmp_path).best == found
    assert (tmp_path / BEST / "model").read_text() == "good"


def test_the_curve_holds_every_report_and_the_best_so_far(tmp_path: Path) -> None:
    errors = [math.nan, 3.0, 4.0, math.inf, 2.0]
    history = [Heard(0.5 * index, 1 + index // 2, 1 + index // 2, 1 + index % 2, e) for index, e in enumerate(errors)]
    Anytime(tmp_path).write_curve(history)
    table = pq.read_table(tmp_path / ANYTIME)
    assert table["best"].to_pylist() == [None, 3.0, 3.0, 3.0, 2.0]
    assert table["error"].to_pylist() == [None, 3.0, 4.0, None, 2.0]
    assert table["trainings"].to_pylist() == [1, 1, 2, 2, 3]
    assert table["seconds"].to_pylist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    Anytime(tmp_path).write_curve([])
    assert pq.read_table(tmp_path / ANYTIME).num_rows == 0


def test_weights_learned_on_the_fly_are_the_best_ones_parameters(tmp_path: Path) -> None:
    parameters = {"l1": 0.1, "l2": 0.2, ON_THE_FLY: True}
    assert parameters_used(parameters, Report(1, 1.0)) == {"l1": 0.1, "l2": 0.2}
    assert parameters_used(parameters, Report(1, 1.0, weights=[0.3, 0.4])) == {"l1": 0.3, "l2": 0.4}
    Anytime(tmp_path).offer(Report(1, 2.0, weights=[0.3, 0.4]), 1, parameters, 1, 0.2)
    assert json.loads((tmp_path / BEST / "best.json").read_text())["parameters"] == {"l1": 0.3, "l2": 0.4}


def test_no_report_takes_the_model_out_of_best(tmp_path: Path, artefact: Path) -> None:
    """Once a target has given an artefact, a lower error without one is no improvement, also after a restart."""
    anytime = Anytime(tmp_path)
    assert anytime.offer(Report(1, 2.0, artefact=artefact), 1, {}, 1, 0.2)
    for again in (anytime, Anytime(tmp_path)):
        assert not again.offer(Report(2, 1.0), 2, {}, 2, 0.5)
        assert (tmp_path / BEST / "model").read_text() == "good" and again.best == read_best(tmp_path)
    assert again.offer(Report(3, 1.0, artefact=artefact), 2, {}, 2, 0.5)
