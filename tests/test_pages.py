"""Every code block of the README and the documentation is run by a test, or listed here with the reason why not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from palf_dist.ablations.config import load_ablations
from palf_dist.cli import app
from palf_dist.config_loading import load_config
from palf_dist.search.config import load_search_config
from tests.pages import PAGES, ROOT, TYPED, blocks, parse, type_page
from tests.tracking_server import Server

SHELL = "tests/test_readme.py::test_every_command_of_the_pages_works"
RUN_BY = {
    ("README.md", "sh"): SHELL,
    ("README.md", "python"): "tests/test_readme.py::test_the_snippet_trains",
    ("docs/drop_in.md", "sh"): SHELL,
    ("docs/drop_in.md", "python"): "tests/test_readme.py::test_the_snippets_of_the_drop_in_page_train",
    ("docs/own_loss.md", "python"): "tests/test_readme.py::test_the_snippets_of_the_drop_in_page_train",
    ("docs/own_policy.md", "python"): "tests/test_readme.py::test_the_snippets_of_the_drop_in_page_train",
    ("docs/evaluation.md", "sh"): SHELL,
    ("docs/evaluation.md", "sh results"): "tests/test_cli_results.py::test_the_published_table_and_the_quick_look",
    ("docs/evaluation.md", "yaml"): "tests/test_pages.py::test_the_configurations_of_the_pages_are_read",
    ("docs/learnloss.md", "py"): "tests/test_pages.py::test_the_classifier_of_the_learnloss_page_fits",
    ("docs/method.md", "sh"): SHELL,
    ("docs/operations.md", "sh cluster"): "tests/cluster/test_operations.py::test_the_page_can_be_typed",
    ("docs/operations.md", "sh hosts"): "tests/cluster/test_operations.py::test_what_the_hosts_are_told_can_be_typed",
    ("docs/policies.md", "python"): "tests/test_readme.py::test_the_snippets_of_the_policies_page_train_and_explain",
    ("docs/policies.md", "ini"): "tests/test_model_registry.py::server",
    ("docs/policies.md", "sh"): SHELL,
    ("docs/policies.md", "sh server"): "tests/test_model_registry.py::server",
    ("docs/suites.md", "sh"): SHELL,
    ("docs/suites.md", "sh network"): "tests/tasks/test_suites.py::test_palf12_as_the_page_fetches_it",
    ("docs/suites.md", "sh suite"): "tests/tasks/test_suite_runs.py::"
    "test_a_fold_is_trained_and_judged_from_the_command_line",
    ("docs/suites.md", "yaml"): "tests/tasks/test_suites.py::test_the_pages_own_suite_is_one",
    ("docs/tune_searcher.md", "py"): "tests/search/test_searcher_on_ray.py::test_the_example_in_the_documentation_runs",
    ("docs/tuning.md", "sh"): SHELL,
    ("docs/tuning.md", "yaml"): "tests/test_pages.py::test_the_configurations_of_the_pages_are_read",
}
"""Of the other pages, by page and language: the test that runs them."""

NOT_RUN = {
    ("CONTRIBUTING.md", "sh checkout"): "the tests and checks themselves; what they name has to be there",
    ("docs/evaluation.md", "sh ablations"): "nearly fifty meta-training runs of palf12",
    ("docs/evaluation.md", "sh transfer"): "hours, on the policies of the published table",
    ("docs/learnloss.md", "text"): "ten minutes on two cores, on the downloaded suite",
    ("docs/mlflow_server.md", "sh server"): "stays in the foreground; the same server is started on a free port",
    ("docs/operations.md", "sh cloud"): "needs an account at a cloud, or a Kubernetes cluster",
    ("docs/policies.md", "text"): "how the published policy was made: hours",
    ("docs/tutorial.md", "sh install"): "makes an environment of 2 GB; the Makefile and tests/test_packaging.py do it",
}
"""Blocks that no test runs, and why. The options of their commands of palf-dist are checked all the same."""

SHOWN = {("docs/run_directory.md", "")}
"""No code: a listing of files."""


def test_every_block_is_run_or_says_why_not() -> None:
    found = {(block.page, block.info) for block in blocks()}
    typed = {(page, info) for page, info in found if page in TYPED} - NOT_RUN.keys()
    listed = [*typed, *RUN_BY, *NOT_RUN, *SHOWN]
    assert len(listed) == len({*listed}), "each in one list"
    assert {*listed} == found
    assert {page for page, _ in typed} == {*TYPED}
    assert {(page, info) for page, infos in TYPED.items() for info in infos} <= NOT_RUN.keys()


def test_the_tests_that_run_them_are_there() -> None:
    for test in {*RUN_BY.values(), *(f"tests/test_pages.py::test_the_{Path(page).stem}" for page in TYPED)}:
        path, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(), test


def test_every_command_has_the_options_that_the_pages_give_it() -> None:
    command, seen = get_command(app), set()
    for block in blocks():
        if block.language not in ("sh", "text"):
            continue
        for words in block.commands():
            if words[0] == "palf-dist":
                if words != ["palf-dist", "--version"]:
                    parse(command, words)
                if "--" in words:
                    parse(command, ["palf-dist", *words[words.index("--") + 1 :]])
                seen.add(words[1])
    assert {"meta-train", "evaluate", "report", "results", "ablate", "tune", "submit", "policy"} <= seen


def test_an_option_that_is_not_there_is_found() -> None:
    for words in (["report", "runs/a", "--nothing"], ["policy", "show", "default", "--nothing"]):
        with pytest.raises(Exception, match="No such option"):
            parse(get_command(app), ["palf-dist", *words])


def test_links_lead_to_files() -> None:
    """The site's builder looks at those to pages and headings of docs/; here are all others as well."""
    for page in PAGES:
        targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", page.read_text())
        assert [target for target in targets if not (page.parent / target).exists()] == [], page.name


def test_what_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:palf_dist|tests|docs|benchmarks|cluster|examples|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"`?make ([a-z-]+)", text)} <= {*targets}
    for block in blocks([ROOT / "CONTRIBUTING.md"]):
        for words in block.commands():
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words


def test_the_versions_that_were_tested_are_those_of_the_project() -> None:
    names = ("pyproject.toml", "constraints.txt", "docs/drop_in.md")
    project, locked, page = ((ROOT / name).read_text() for name in names)
    lowest = dict(re.findall(r'^  "(\w+)(?:\[.*\])?>=([\d.]+)",$', project, re.MULTILINE))
    pinned = dict(re.findall(r"^(\w+)==(.+)$", locked, re.MULTILINE))
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert rows == [(name, lowest[name], pinned[name]) for name in ("torch", "ray", "mlflow")]


def test_the_configurations_of_the_pages_are_read(tmp_path: Path) -> None:
    (ablations,) = (block.text for block in blocks([ROOT / "docs/evaluation.md"]) if block.language == "yaml")
    (tmp_path / "ablations.yaml").write_text(ablations)
    assert [each.name for each in load_ablations(tmp_path / "ablations.yaml").variants] == ["window-50"]
    searches = [block.text for block in blocks([ROOT / "docs/tuning.md"]) if block.language == "yaml"]
    shutil.copy(ROOT / "configs/quick.yaml", tmp_path)
    for number, text in enumerate(searches):
        (tmp_path / f"{number}.yaml").write_text(text)
    kinds = [load_search_config(tmp_path / f"{number}.yaml").target.kind for number in range(len(searches))]
    assert kinds == ["loss_weights", "meta_training"]


def test_the_classifier_of_the_learnloss_page_fits(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block.text for block in blocks([ROOT / "docs/learnloss.md"]) if block.language == "py")
    exec(compile(example, "learnloss.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_the_tutorial(tmp_path: Path) -> None:
    ended = type_page("docs/tutorial.md", tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    pairs = re.findall(r"^seed \d: cross-entropy ([\d.]+), AdaptiveLoss ([\d.]+)$", ended.stdout, re.MULTILINE)
    assert len(pairs) == 5 and all(float(ours) > float(plain) + 0.05 for plain, ours in pairs), pairs
    assert (tmp_path / "runs/mine/report/alpha.png").exists()


@pytest.mark.slow
def test_the_own_dataset(tmp_path: Path) -> None:
    ended = type_page("docs/own_dataset.md", tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "'rows': 400" in ended.stdout
    (source,) = (each for each in load_config(tmp_path / "claims.yaml").data.train if each.path)
    assert (tmp_path / source.path).exists() and source.columns.drop == ("id",)


@pytest.mark.slow
def test_the_own_model(tmp_path: Path) -> None:
    ended = type_page("docs/own_model.md", tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "runs/own-model/best/policy.safetensors").exists()


@pytest.mark.slow
def test_the_mlflow_server(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    try:
        ended = type_page("docs/mlflow_server.md", tmp_path, {"http://127.0.0.1:5000": server.uri})
    finally:
        server.kill()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"FINISHED +-?[\d.]+", ended.stdout), ended.stdout
    assert not (tmp_path / "mlflow.db").exists()
