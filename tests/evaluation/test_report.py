"""A report of real files, written by the code that writes them in a run: complete, partial and damaged."""

from __future__ import annotations

import base64
import json
import re

import pytest
from markupsafe import escape

from palf_dist.config_loading import dump_config, load_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.derived import PICKS
from palf_dist.evaluation.methods import METHODS
from palf_dist.evaluation.report import RESULTS, make_report
from palf_dist.run_directory import CONFIG, METRICS
from palf_dist.usage import usage
from tests.evaluation.synthetic import few_rows, result_rows, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "full", results=result_rows())


@pytest.fixture(scope="module")
def report(run_dir):
    return make_report(run_dir)


def test_a_finished_run_gives_every_file(run_dir, report):
    assert report.folder == run_dir / "report"
    names = {"alpha.png", "outer_loss.png", "held_out.png", "noise.png", "table.md", "table.json", "index.html"}
    names |= {"controls.png", "phases.png"}  # for the importance of features these trajectories lack the states
    assert {path.name for path in report.folder.iterdir()} == names
    assert {path.name for path in (report.page, *report.pictures, *report.tables)} == names
    records = json.loads((report.folder / "table.json").read_text())["held_out"]
    assert [record["method"] for record in records] == [item.method for item in report.comparisons]


def test_the_page_is_self_contained_and_holds_all_parts(report):
    page = report.page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "<script" not in page and "@import" not in page
    embedded = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)}
    assert embedded == {path.read_bytes() for path in report.pictures}
    for method in (*METHODS.values(), *PICKS.values()):
        assert page.count(f"<td>{method.label}</td>") == (2 if method.name == "policy" else 3)
    policy = next(item for item in report.comparisons if item.method == "policy")
    assert f"{policy.overall.difference.mean:+.2f} points against tuned CE" in page
    assert "100 of 100" in page
    assert "200 applied, 1 reissued, 1 refused (1 outlier)" in page
    assert "taken after 80 outer steps, +3.75 points against tuned CE on fresh training tasks" in page
    assert "4.2 minutes" in page
    assert escape(usage(report.folder.parent / "best" / "policy.safetensors")) in page
    assert "outer_steps: 100" in page  # the configuration
    assert "sha256" in page  # the policy's card
    assert re.search(r"torch \d", page)


def test_the_page_says_what_the_policy_does(report):
    page = report.page.read_text()
    assert "<h2>What the policy sets</h2>" in page and "<h2>Phases of the run</h2>" in page
    assert "<td>noise above 0.3</td>" in page and "<td>image</td>" in page
    assert "Not measured: importance (the trajectories do not hold what the policy reads: entropy" in page


@pytest.mark.parametrize("setting", ["shield=0.5", "kind=maml"])
def test_a_policy_that_no_loop_takes_is_shown_without_one(setting, tmp_path):
    run = write_run(tmp_path / "run", outer_steps=1, trajectories=0, results=few_rows())
    assert "AdaptiveLoss" in make_report(run).page.read_text()
    (run / CONFIG).write_text(dump_config(load_config(run / CONFIG, [f"policy.{setting}"])))
    assert "AdaptiveLoss" not in make_report(run).page.read_text()


def test_text_of_the_run_is_escaped(tmp_path):
    run = write_run(tmp_path / "<b>run", outer_steps=1, trajectories=0, results=few_rows())
    page = make_report(run).page.read_text()
    assert "<b>run" not in page and "&lt;b&gt;run" in page


def test_a_partial_run_says_what_is_not_there_yet(tmp_path):
    run = write_run(tmp_path / "partial", outer_steps=3)
    report = make_report(run)
    pictures = {"alpha.png", "controls.png", "phases.png", "outer_loss.png"}
    assert {path.name for path in report.folder.iterdir()} == pictures | {"index.html"}
    assert report.tables == () and report.comparisons == ()
    page = report.page.read_text()
    assert "no held-out results yet" in page and "No policy has been selected yet" in page and "3 of 100" in page
    assert "6 applied, 0 reissued, 0 refused<" in page


def test_a_policy_that_does_nothing_is_said_to(tmp_path):
    run = write_run(tmp_path / "run", outer_steps=1, trajectories=1)
    (run / CONFIG).write_text(dump_config(load_config(run / CONFIG, ["inner.steps=300"])))
    page = make_report(run).page.read_text()
    assert "not measured: no inner run of the trajectories is whole and finite (40 are not)" in page


def test_a_run_that_has_only_begun(tmp_path, run_dir):
    (tmp_path / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    (tmp_path / "trajectories" / "step=000000").mkdir(parents=True)
    report = make_report(tmp_path)
    assert [path.name for path in report.folder.iterdir()] == ["index.html"]
    assert "0 of 100" in report.page.read_text()


def test_a_new_report_replaces_the_old_one_as_a_whole(tmp_path):
    run = write_run(tmp_path / "run", outer_steps=1, trajectories=0)
    (run / "report").mkdir()
    (run / "report" / "noise.png").write_bytes(b"of an earlier evaluation")
    assert {path.name for path in make_report(run).folder.iterdir()} == {"outer_loss.png", "index.html"}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([row for row in few_rows() if row["method"] != "policy"], "policy was not among"),
        ([row | ({"accuracy": None} if row["method"] == "policy" else {}) for row in few_rows()], "no finite result"),
        ([row for row in few_rows() if row["dataset"] == "iris"], "no interval with one dataset"),
    ],
)
def test_the_headline_says_why_there_is_no_difference_or_interval(tmp_path, rows, words):
    run = write_run(tmp_path / "run", outer_steps=0, trajectories=0, results=rows)
    assert words in make_report(run).page.read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is missing"):
        make_report(tmp_path)
    with pytest.raises(RunDirectoryError):
        make_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [METRICS, RESULTS, "best/policy.json"])
def test_a_damaged_file_is_named_and_the_old_report_stays(tmp_path, name):
    run = write_run(tmp_path / "run", outer_steps=1, trajectories=0, results=few_rows())
    (run / "report").mkdir()
    (run / "report" / "index.html").write_text("old")
    (run / name).write_bytes(b"PAR1 torn")
    with pytest.raises(RunDirectoryError, match=f"{name} .*restore or remove"):
        make_report(run)
    assert (run / "report" / "index.html").read_text() == "old"
