"""Ablations and transfer from the command line: every command of the page, with a small suite for palf12."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from palf_dist.config_loading import load_config
from tests.command import SMOKE, Command
from tests.test_cli_results import PAGE, SUITE

OTHER_NETWORKS = "[{kind: conv}, {kind: transformer, vocabulary: 512, length: 16}]"
KNOWN = {
    "palf12": "own.yaml",
    "groups-6": "groups-4",
    "groups-24": "no-state",
    "groups-96": "no-state",
    f"tasks.architectures={OTHER_NETWORKS}": "tasks.architectures=[{kind: mlp, hidden: [4]}]",
    "data.held_out=[fashion-mnist, digits, newsgroups, snippets]": "data.held_out=[digits]",
    "data.held_out=[crawl_tiles, crawl_tiles_fine, reuters-r52, fine_foods]": "data.held_out=[iris]",
    "inner.steps=2000": "inner.steps=30",
}
"""What the small suite has in the place of words of the page."""

ABLATIONS = {
    "variants": [
        {"name": "groups-4", "group": "tasks", "set": {"tasks.pool": 4}},
        {"name": "no-state", "group": "policy", "set": {"policy.kind": "constant"}},
    ],
}


K_META = {"name": "k-meta-6", "group": "frequency", "set": {"estimator.window": 6}}


@pytest.fixture
def small(cli: Command) -> Command:
    """A folder with a small suite for palf12 and few variants."""
    Path("own.yaml").write_text(yaml.safe_dump(SUITE))
    Path("configs").mkdir()
    shutil.copy(SMOKE, "configs/palf12.yaml")
    Path("configs/ablations.yaml").write_text(yaml.safe_dump(ABLATIONS))
    Path("configs/ablations-palf.yaml").write_text(yaml.safe_dump({"variants": [K_META]}))
    return cli


def typed(cli: Command, name: str) -> list[str]:
    """Types the commands of a block of the page; what they printed."""
    (commands,) = re.findall(rf"```sh {name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    printed = []
    for line in commands.splitlines():
        program, command, *rest = [KNOWN.get(word, word) for word in shlex.split(line)]
        assert program == ".venv/bin/palf-dist"
        own = () if command == "results" else ("--workers", "0", "--set", "tracking.enabled=false")
        ended = cli(command, *rest, *own)
        assert ended.code == 0, (line, ended.err)
        printed.append(ended.out)
    return printed


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_ablations_of_the_page(small: Command) -> None:
    printed = typed(small, "ablations")
    for said, page, looks in zip(printed, ("ablations", "ablations", "ablations-palf"), (3, 3, 5), strict=True):
        assert f"written docs/{page}.md" in said and f"held-out designs so far: {looks}" in said, "all are counted"
    record = json.loads(Path("docs/ablations.json").read_text())
    assert set(record["groups"]) == {"tasks", "policy"}
    (fewer,) = record["groups"]["tasks"]
    assert fewer["against_base"]["tasks"] == 4 * 3 and len(fewer["diff_vs_tuned_ce"]["ci95"]) == 2
    assert fewer["diff_vs_tuned_ce"]["clusters"] == 4, "of both folds"
    for fold in ("fold-0", "fold-1"):
        assert {path.name for path in Path("runs/ablations", fold).iterdir()} == {"base", "groups-4", "no-state"}
    assert Path("docs/ablations_tasks.png").exists() and not list(Path("runs").rglob("ablations*.json"))
    palf = json.loads(Path("docs/ablations-palf.json").read_text())
    assert [each["name"] for each in palf["groups"]["frequency"]] == ["k-meta-6"] and palf["curve"] == []
    assert load_config("runs/ablations-palf/fold-0/base/config.yaml").policy.kind == "palf"


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_the_transfers_of_the_page(small: Command) -> None:
    for fold in ("0", "1"):
        run_dir = f"runs/palf12/fold-{fold}"
        options = ("--suite", "own.yaml", "--fold", fold, "--run-dir", run_dir, "--workers", "0")
        assert small("meta-train", "--config", SMOKE, *options, "--set", "tracking.enabled=false").code == 0
    printed = typed(small, "transfer")
    record = json.loads(Path("docs/results.json").read_text())
    for kind in ("architecture", "horizon"):
        policy = next(each for each in record["transfers"][kind] if each["method"] == "policy")
        assert record["headline"][f"diff_{kind}_transfer"] == policy["diff_vs_ce"]
        assert f"diff_{kind}_transfer" in printed[-1]
    assert record["headline"]["held_out_designs"] == 3
    assert small("report", "runs/palf12/horizon-0").code == 0, "it is a run directory"
    message = small.refused("evaluate", "runs/palf12/fold-0/best", "--quick", "--run-dir", "kept")
    assert "--quick gives no results to keep" in message and not Path("kept").exists()


def test_a_stop_is_told_with_how_to_go_on(small: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from palf_dist.ablations import runs

    monkeypatch.setattr(runs, "run_designs", lambda *arguments: False)
    ended = small("ablate", "--config", SMOKE, "--run-dir", "runs", "--ablations", "configs/ablations.yaml", "--json")
    assert ended.code == 130 and "the same command goes on" in ended.err and ended.out == ""


def test_mistakes_are_told_before_any_run(small: Command) -> None:
    start = ("ablate", "--config", SMOKE, "--run-dir", "runs", "--workers", "0", "--ablations")
    assert "cannot be read" in small.refused(*start, "nowhere.yaml")
    assert "there is no no-cee" in small.refused(*start, "configs/ablations.yaml", "--only", "no-cee")
    assert "--suite and --fold go together" in small.refused(*start, "configs/ablations.yaml", "--fold", "0")
    assert "this needs a local" in small.refused(*start, "configs/ablations.yaml", "--output", "s3://bucket/docs")
    twice = ("--suite", "own.yaml", "--fold", "0", "--fold", "image")
    assert "digits is held out in more than one" in small.refused(*start, "configs/ablations.yaml", *twice)
    Path("docs").mkdir()
    Path("docs/results.json").write_text("{torn")
    assert "is no file of this command" in small.refused(*start, "configs/ablations.yaml", "--output", "docs")
    assert not Path("runs").exists()
