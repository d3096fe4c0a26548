"""A report of a search that never took place, written by the code that writes one: complete, partial and damaged."""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from palf_dist.config_loading import dump_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.plots import VERMILION
from palf_dist.randomness import random_generator
from palf_dist.search.anytime import ANYTIME, Anytime
from palf_dist.search.config import SearchConfig
from palf_dist.search.domains import Choice, Domain, IntegerRange, LogRange, UniformRange
from palf_dist.search.ledger import Ledger
from palf_dist.search.pictures import Tried, plot_anytime, plot_parallel
from palf_dist.search.report import make_search_report
from palf_dist.search.trial import Report
from tests.command import Command

WEIGHTS = {"l1": (1e-6, 1e-1), "l2": (1e-5, 10.0)}
SPACE: dict[str, Domain] = {
    "rate": LogRange(low=1e-4, high=1.0),
    "outer_loss.gamma": UniformRange(low=0, high=2),
    "refresh": IntegerRange(low=1, high=50),
    "kind": Choice(values=("robust", "palf", "none")),
}
NAN = math.nan


def write_search(run_dir: Path, errors: list[list[float]], name: str = "weights") -> Path:
    """A search whose trials gave these errors, one list a trial; those of an even number are finished."""
    run_dir.mkdir()
    target = {"kind": "loss_weights", "dataset": "wine", "weights": WEIGHTS}
    config = SearchConfig.model_validate({"name": name, "target": target, "searcher": "random", "trials": 9})
    (run_dir / "config.yaml").write_text(dump_config(config))
    generator = random_generator("search report")
    anytime = Anytime(run_dir)
    with contextlib.closing(Ledger(run_dir)) as ledger:
        for reported in errors:
            parameters = {name: math.exp(generator.uniform(*np.log(ends))) for name, ends in WEIGHTS.items()}
            number = ledger.create(parameters).number
            for step, error in enumerate(reported, 1):
                report = Report(step, error, metrics={"cost": 100.0 * step})
                anytime.offer(report, number, parameters, number, ledger.seconds)
                ledger.report(number, report)
            if number % 2 == 0:
                ledger.end(number, "finished")
        if ledger.history:
            anytime.write_curve(ledger.history)
    return run_dir


def curve(errors: list[float]) -> pa.Table:
    best = np.fmin.accumulate(np.array(errors, float))
    columns = {"trainings": np.arange(len(errors)) // 2 + 1, "seconds": np.arange(len(errors)) * 1.5}
    return pa.table({**columns, "error": errors, "best": pa.array(best, from_pandas=True)})


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.get_axes() for text in axis.texts]


def lines(figure: Figure, points: int) -> list[Any]:
    return [line for line in figure.get_axes()[0].lines if len(line.get_xdata()) == points]


def test_a_search_gives_its_pictures_and_a_page_that_is_self_contained(tmp_path: Path) -> None:
    run = write_search(tmp_path / "run", [[0.5, 0.3], [0.4, 0.2, 0.25], [NAN], []])
    report = make_search_report(run)
    names = {"anytime.png", "parallel.png", "index.html"}
    assert {path.name for path in report.folder.iterdir()} == names
    assert {path.name for path in (report.page, *report.pictures)} == names and report.folder == run / "report"
    assert report.best is not None and (report.best.trial, report.best.error) == (2, 0.2)
    page = report.page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "<script" not in page
    embedded = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)}
    assert embedded == {path.read_bytes() for path in report.pictures}
    assert "The lowest error is 0.2, of trial 00002, found with 2 trainings" in page
    assert "<dd>4 of 9</dd>" in page and "<dd>2 unfinished, 2 finished</dd>" in page and "<dd>600</dd>" in page
    rows = re.findall(r'<tr class="(.*?)"><td>(\d+)</td><td>(.*?)</td><td>(.*?)</td>', page)
    assert rows == [("policy", "00002", "0.2", "finished"), ("", "00001", "0.3", "unfinished")]
    assert "searcher: random" in page, "the configuration"


@pytest.mark.parametrize(
    ("errors", "pictures"), [([], set()), ([[]], set()), ([[NAN]], {"anytime.png", "parallel.png"})]
)
def test_a_search_without_an_answer_says_so(tmp_path: Path, errors: list[list[float]], pictures: set[str]) -> None:
    report = make_search_report(write_search(tmp_path / "run", errors))
    assert {path.name for path in report.pictures} == pictures and report.best is None
    assert "No trial has reported a finite error yet" in report.page.read_text()


def test_a_new_report_replaces_the_old_one_and_the_ledger_stays(tmp_path: Path) -> None:
    """Also with a space that is not that of the configuration, as a target of one's own has."""
    run = write_search(tmp_path / "run", [[0.5]])
    ledger = (run / "trials.jsonl").read_bytes()
    (run / "report").mkdir()
    (run / "report" / "old.png").write_bytes(b"old")
    report = make_search_report(run, {"l1": LogRange(low=1e-6, high=1e-1)})
    assert "<th>l1</th></tr>" in report.page.read_text()
    assert {path.name for path in report.folder.iterdir()} == {"anytime.png", "parallel.png", "index.html"}
    assert (run / "trials.jsonl").read_bytes() == ledger


def test_the_report_command_knows_a_search(cli: Command) -> None:
    write_search(cli.folder / "run", [[]])
    ended = cli("report", "run", "--json")
    assert ended.code == 0, ended.err
    page = str(cli.folder / "run" / "report" / "index.html")
    assert json.loads(ended.out) == {"page": page, "pictures": [], "best": None, "undelivered": 0}
    ended = cli("report", "run")
    assert ended.out.splitlines() == ["No trial has reported a finite error yet.", "page    run/report/index.html"]


def test_what_is_no_search_or_damaged_is_named(tmp_path: Path) -> None:
    run = write_search(tmp_path / "run", [[0.5]])
    (run / ANYTIME).write_bytes(b"PAR1 torn")
    with pytest.raises(RunDirectoryError, match=f"{ANYTIME} .*restore or remove"):
        make_search_report(run)
    (run / "config.yaml").unlink()
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is missing"):
        make_search_report(run)
    assert not (run / "report").exists()


def test_the_anytime_curve_only_falls_and_its_star_is_the_first_best() -> None:
    errors = [NAN, 0.5, 0.6, 0.2, 0.9, 0.2]
    figure = plot_anytime(curve(errors))
    for axis, column in zip(figure.get_axes(), ("trainings", "seconds"), strict=True):
        reports, best, star = axis.lines
        cost = curve(errors)[column].to_numpy()
        np.testing.assert_array_equal(reports.get_xdata(), cost)
        np.testing.assert_array_equal(reports.get_ydata(), errors)
        np.testing.assert_array_equal(best.get_ydata(), [NAN, 0.5, 0.5, 0.2, 0.2, 0.2])
        assert (star.get_xdata()[0], star.get_ydata()[0]) == (cost[3], 0.2)


def test_outliers_do_not_squeeze_the_curve_and_are_counted() -> None:
    figure = plot_anytime(curve([0.1 + 0.01 * index for index in range(19)] + [1e6]))
    assert figure.get_axes()[0].get_ylim()[1] < 0.4
    assert "reports above the frame: 1" in figure.get_suptitle()


@pytest.mark.parametrize("errors", [[0.5], [NAN, NAN], [0.0, 0.0]])
def test_short_and_flat_curves_can_be_drawn(errors: list[float]) -> None:
    low, high = plot_anytime(curve(errors)).get_axes()[0].get_ylim()
    assert low < high


def test_lines_cross_the_axes_where_their_values_are() -> None:
    tried = [
        Tried({"rate": 1e-2, "outer_loss.gamma": 0.5, "refresh": 50, "kind": "robust"}, 0.1),
        Tried({"rate": 1.0, "outer_loss.gamma": 2.0, "refresh": 1, "kind": "none"}, 0.3),
        Tried({"rate": 1e-4, "outer_loss.gamma": 0.0, "refresh": 1, "kind": "palf"}, NAN),
    ]
    figure = plot_parallel(SPACE, tried, tried[0])
    worst, _, best = lines(figure, 5)
    np.testing.assert_allclose(best.get_ydata(), [0.5, 0.25, 1, 1 / 6, 0])
    np.testing.assert_allclose(worst.get_ydata(), [1, 1, 0, 5 / 6, 1])
    assert to_hex(best.get_color()) == VERMILION.lower(), "drawn last, on top of its own line"
    (failed,) = lines(figure, 4)
    np.testing.assert_allclose(failed.get_ydata(), [0, 0, 0, 0.5])
    shown = texts(figure)
    assert {"outer loss\ngamma", "1", "0.0001", "0.01", "robust", "palf", "none", "error"} <= set(shown)
    assert "0.1" in shown and "50" in shown, "the best values below"


def test_a_best_that_no_trial_shows_any_more_is_on_the_scale() -> None:
    """PBT gives a trial other parameters: the best answer may be of earlier ones."""
    tried = [Tried({"rate": 0.1}, 0.3), Tried({"rate": 0.2}, 0.4)]
    figure = plot_parallel({"rate": SPACE["rate"]}, tried, Tried({"rate": 0.01}, 0.2))
    heights = [line.get_ydata()[-1] for line in lines(figure, 2)[:3]]
    assert sorted(heights) == pytest.approx([0, 0.5, 1])
