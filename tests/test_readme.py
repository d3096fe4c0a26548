"""The README's own snippet trains, and every command that the README and docs/ name is one that works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from typer.core import TyperGroup
from typer.main import get_command

from benchmarks import readme
from palf_dist import AdaptiveLoss
from palf_dist.cli import app
from palf_dist.cli_shared import load_run_config, overrides_of_suite
from palf_dist.config import PolicyConfig
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.policies.named import NAMED
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from tests.adaptive_cases import untrained
from tests.command import SMOKE, Command
from tests.pages import TYPED

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = ROOT / "docs"
POLICY = "runs/first/best"
TORCHRUN = "torch.distributed.run"


def blocks(language: str, pages: Sequence[Path] = PAGES) -> list[str]:
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


def test_the_table_of_the_readme_is_that_of_the_published_results() -> None:
    """Before there are any the README says so."""
    published = ROOT / readme.PAGE
    wanted = readme.block_of(published.read_text()) if published.exists() else "\nNot measured yet.\n"
    assert readme.block_of((ROOT / readme.README).read_text()) == wanted


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    spec = policy_spec(PolicyConfig())
    size = len(spec.features)
    blank = PolicyArtefact(spec, np.zeros(0, np.float32), np.zeros(size, np.float32), np.ones(size, np.float32))
    phi = LearnedPolicy(spec, blank.mean, blank.std).initial()
    return save_policy(tmp_path / "policy", replace(blank, phi=phi)).parent


def digits_to_train() -> dict[str, Any]:
    """What the snippets find there: digits with 30 % of the labels resampled, a model and an optimiser."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.where(torch.rand(1200, generator=draw) < 0.3, torch.randint(0, 10, (1200,), generator=draw), y[:1200])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "loader": DataLoader(TensorDataset(x[:1200], noisy, torch.arange(1200)), 64, shuffle=True, generator=draw),
        "epochs": 15,
        "accuracy": lambda: (model(x[1200:]).argmax(1) == y[1200:]).float().mean().item(),
    }


def run_snippet(snippet: str, policy: Path, names: dict[str, Any]) -> None:
    """As it stands on its page."""
    exec(compile(snippet.replace(POLICY, str(policy)), "a page", "exec"), names)


def test_the_snippet_trains(policy: Path) -> None:
    (snippet,) = blocks("python", [ROOT / "README.md"])
    assert POLICY in snippet
    names = digits_to_train()
    run_snippet(snippet, policy, names)
    assert names["accuracy"]() > 0.85


def test_the_drop_in_page_tells_all_names() -> None:
    page = (DOCS / "drop_in.md").read_text()
    table = page[page.index("| name |") :].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == [*NAMED]


def test_the_snippets_of_the_drop_in_page_train(policy: Path, tmp_path: Path) -> None:
    """The loop before the change and the one after it, each on its own model; and all the arguments."""
    before, after, named, objects, arguments, shown = blocks("python", [DOCS / "drop_in.md"])
    own_policy, own_loss = blocks("python", [DOCS / "own_policy.md", DOCS / "own_loss.md"])
    for snippet in (before, after, named):
        names = digits_to_train() | {"AdaptiveLoss": AdaptiveLoss}
        run_snippet(snippet, policy, names)
        assert names["accuracy"]() > (0.5 if snippet == before else 0.85)  # one epoch before, fifteen after
    names = {"AdaptiveLoss": AdaptiveLoss}
    run_snippet(objects, policy, names)
    assert names["criterion"].refresh_every == 50
    run_snippet(own_policy, policy, names)
    assert names["criterion"].refresh_every == 20
    run_snippet(own_loss, policy, names)
    loss = names["criterion"](torch.zeros(2, 4), torch.tensor([0, 3]))
    torch.testing.assert_close(loss, (torch.tensor(4.0).log() + 0.5) / 2)
    save_policy(tmp_path / "informed", untrained(kind="informed"))
    for snippet, file in ((arguments, policy), (shown.replace("runs/informed/best", POLICY), tmp_path / "informed")):
        names = digits_to_train() | {"AdaptiveLoss": AdaptiveLoss}
        x, y, index = next(iter(names["loader"]))
        names |= {"x_validation": x[:20], "y_validation": y[:20], "x_train": x[20:], "y_train": y[20:]}
        run_snippet(snippet, file, names)
        assert names["criterion"](names["model"](x), y, index=index).isfinite()


def test_the_snippets_of_the_policies_page_train_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    train, explain = blocks("python", [DOCS / "policies.md"])
    names = digits_to_train() | {"AdaptiveLoss": AdaptiveLoss}
    with pytest.warns(UserWarning, match=r"no (validation|training_rows): the policy reads"):
        exec(compile(train, "policies.md", "exec"), names)
    assert names["accuracy"]() > 0.85
    exec(compile(explain, "policies.md", "exec"), names)
    assert "validation_loss" in capsys.readouterr().out


def test_the_runs_of_the_published_table_have_options_that_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``make`` would begin each of them; the evaluations are also those of the page."""
    make = ["make", "-n", "-f", str(ROOT / "Makefile"), "-o", ".venv/.installed", "results-all", "BIN=.venv/bin"]
    printed = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(ROOT)
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    configs = {}
    for line in re.findall(r"(?:^|else )\.venv/bin/palf-dist (meta-train .*?|evaluate .*?) *(?:; fi)?$", printed, re.M):
        name, *arguments = shlex.split(line)
        given = group.commands[name].make_context(name, arguments).params
        run, policy = Path(given["run_dir"]), Path(given.get("policy") or "")
        fold = given["fold"] if name == "meta-train" else policy.parts[-2].removeprefix("fold-")
        overrides = [*overrides_of_suite("palf12", fold), *(given["overrides"] or ())]
        configs[run.name] = load_run_config(given["config"] or "configs/palf12.yaml", overrides, None, None)
    kinds = {
        name: config.policy.kind for name, config in configs.items() if name.startswith(("schedule", "con", "maml"))
    }
    learned = ("schedule", "constant", "maml")
    assert kinds == {f"{kind}-{fold}": kind for kind in learned for fold in "01"}
    assert {configs[name].evaluation.methods for name in kinds} == {("policy",)}
    others = ("fold-0", "fold-1", "family-image", "family-text", "family-tabular")
    transfers = ("architecture-0", "architecture-1", "horizon-0", "horizon-1")
    assert set(configs) == {*kinds, *others, *transfers}
    held_out = {name: {source.name for source in configs[name].data.held_out} for name in configs}
    assert len(held_out["fold-0"] | held_out["fold-1"]) == 12 and not held_out["fold-0"] & held_out["fold-1"]
    for fold in "01":
        assert held_out[f"architecture-{fold}"] < held_out[f"fold-{fold}"] == held_out[f"schedule-{fold}"]
    (page,) = re.findall(r"```sh transfer\n(.*?)```", (DOCS / "evaluation.md").read_text(), re.DOTALL)
    evaluations = [line for line in page.splitlines() if " evaluate " in line]
    assert len(evaluations) == len(transfers) and set(evaluations) <= {line.rstrip() for line in printed.splitlines()}
    assert "palf-dist results runs/palf12/fold-0 runs/palf12/fold-1 $(ls docs/results/*.parquet" in printed


def test_a_finished_run_is_not_done_again_and_one_that_has_begun_is_resumed(tmp_path: Path) -> None:
    for path in ("fold-0/results.parquet", "fold-1/config.yaml"):
        (tmp_path / "runs/palf12" / path).parent.mkdir(parents=True)
        (tmp_path / "runs/palf12" / path).touch()
    (tmp_path / "bin").mkdir()
    for name in ("palf-dist", "python"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(
            '#!/bin/sh\necho "$@" >> said\ncase "$*" in *--resume*) touch "$3/results.parquet";; esac\n'
        )
        stand_in.chmod(0o755)
    (tmp_path / "runs/palf12/schedule-0").mkdir()
    (tmp_path / "runs/palf12/schedule-0/results.parquet").write_text("new")
    (tmp_path / "docs/results").mkdir(parents=True)
    for name in ("family-image", "schedule-0"):
        (tmp_path / f"docs/results/{name}.parquet").write_text("published before")
    make = ["make", "-f", str(ROOT / "Makefile"), "-o", ".venv/.installed", "results", "BIN=bin"]
    subprocess.run(make, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "said").read_text().splitlines() == [
        "datasets fetch --suite palf12",
        "meta-train --resume runs/palf12/fold-1",
        "results runs/palf12/fold-0 runs/palf12/fold-1 docs/results/family-image.parquet "
        "docs/results/schedule-0.parquet --output docs",
        "-m benchmarks.readme",
    ]
    published = {path.name: path.read_text() for path in (tmp_path / "docs/results").iterdir()}
    assert published == {"family-image.parquet": "published before", "schedule-0.parquet": "new"}


@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mlflow, which policy register imports into this process
def test_every_command_of_the_pages_works(cli: Command) -> None:
    """In order, with the smoke configuration in place of the quick one. ``make`` targets are what CI itself runs."""
    shutil.copytree(Path(SMOKE).parent, "configs")
    shutil.copy(SMOKE, "configs/quick.yaml")
    shutil.copytree(ROOT / "examples", "examples")
    scripts = {".venv/bin/python": [sys.executable], ".venv/bin/torchrun": [sys.executable, "-m", TORCHRUN]}
    ran = []
    pages = [page for page in PAGES if str(page.relative_to(ROOT)) not in TYPED]
    for line in "\n".join(blocks("sh", pages)).splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "make":
            assert arguments[0] + ":" in (ROOT / "Makefile").read_text(), line
        elif program == ".venv/bin/palf-dist":
            ended = cli(*arguments)
            assert ended.code == 0, (line, ended.err)
        elif program in scripts:
            ended_process = subprocess.run([*scripts[program], *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)})
            assert ended_process.returncode == 0, line
        elif program == ".venv/bin/mlflow":
            ended_process = subprocess.run([sys.executable, "-m", "mlflow", *arguments, "--help"], capture_output=True)
            assert ended_process.returncode == 0, line
        else:
            assert program == "", f"no test knows how to run {line!r}"
        ran.append(program)
    assert {"make", ".venv/bin/palf-dist", *scripts} <= {*ran}
