"""docs/operations.md: what it says to type works on a real cluster, and what it quotes is said."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from cluster.hosts import HEAD, LAPTOP, HostsError, check
from palf_dist.cli import app
from palf_dist.jobs.client import authorisation
from tests.command import SMOKE, Command
from tests.jobs.head import started
from tests.pages import parse

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "operations.md"
BUCKET, ADDRESS, CONFIG, GPUS = "s3://my-bucket", "http://127.0.0.1:8265", "configs/quick.yaml", "gpus_per_worker=1"
OURS = {"palf-dist": get_command(app), "ray": ray_cli}
OTHERS = ("chmod", "docker", "helm", "kubectl")


def blocks() -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^```(.*?)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def commands(language: str) -> list[list[str]]:
    return [shlex.split(line) for found, text in blocks() if found == language for line in text.splitlines()]


def test_every_block_says_whether_a_test_runs_it() -> None:
    assert {language for language, _ in blocks()} == {"sh cluster", "sh cloud", "sh hosts"}


def test_what_needs_a_cloud_is_at_least_a_command() -> None:
    programs = set()
    for program, *arguments in commands("sh cloud"):
        programs.add(program)
        words = arguments[: arguments.index(">")] if ">" in arguments else arguments
        if program in OURS:
            parse(OURS[program], [program, *words])
        for word in words:
            if word.endswith(".yaml") or word.endswith("Dockerfile"):
                assert (ROOT / word).exists(), word
    assert programs == {"ray", *OTHERS}


def test_what_the_hosts_are_told_is_a_command() -> None:
    up, run, down = commands("sh hosts")
    start = ["sudo", ".venv/bin/python", "cluster/hosts.py"]
    assert up == [*start, "up", "--hosts", "3"] and down == [*start, "down"]
    assert run[:6] == [*start, "exec", LAPTOP, "--"]
    words = run[6:]
    assert f"http://{HEAD}:8265" in words
    parse(OURS["palf-dist"], words)
    submitted = words[words.index("--") + 1 :]
    parse(OURS["palf-dist"], ["palf-dist", *submitted])
    assert (ROOT / submitted[submitted.index("--config") + 1]).exists()


def test_links_and_named_files_are_there() -> None:
    text = PAGE.read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(targets) > 5
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []
    assert all((ROOT / name).exists() for name in re.findall(r"\bcluster/[\w/]+\.\w+", text))


def test_the_messages_that_are_quoted_are_said() -> None:
    """Piece by piece, as what varies is written as dots or a number; the source has names there, and breaks lines."""
    strings = re.compile(r'"\s*\n\s*f?"|\{[^{}]*\}')
    source = "\n".join(strings.sub("", path.read_text()) for path in (ROOT / "palf_dist").rglob("*.py"))
    table = PAGE.read_text().split("## What each failure looks like")[1]
    quoted = [
        quote for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for quote in re.findall("`(.*?)`", row)
    ]
    assert len(quoted) > 10
    missing = []
    for quote in quoted:
        pieces = (piece.strip(" ;,()") for piece in re.split(r"\.\.\.|;|\d+|SIGKILL|^(?:.* )?worker 3", quote))
        missing += [piece for piece in pieces if len(piece) > 2 and piece not in source]
    assert missing == []


@pytest.mark.slow
@pytest.mark.alone
def test_what_the_hosts_are_told_can_be_typed(tmp_path: Path) -> None:
    """By root, who needs no sudo, with hosts of this test's own."""
    try:
        check()
    except HostsError as error:
        pytest.skip(str(error))
    here = [sys.executable, str(ROOT / "cluster" / "hosts.py"), "--name", f"typed-{os.getpid()}"]
    *lines, last = commands("sh hosts")
    try:
        for _, _, _, *words in lines:
            typed = [word.replace("/tmp/run", str(tmp_path / "run")) for word in words]
            ended = subprocess.run(
                [*here, *typed],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=400,
                stdin=subprocess.DEVNULL,
                check=False,
            )
            assert ended.returncode == 0, f"{typed}\n{ended.stdout}\n{ended.stderr}"
    finally:
        assert subprocess.run([*here, *last[3:]], timeout=60, check=False).returncode == 0
    assert (tmp_path / "run" / "best" / "policy.safetensors").exists()


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the dashboard of a Ray head, whose token this process has too."""
    with started(tmp_path / "cache") as head:
        for name, value in head.environment.items():
            monkeypatch.setenv(name, value)
        wait_until_jobs_are_taken(head.url)
        yield head.url


def wait_until_jobs_are_taken(url: str) -> None:
    """A head answers before the agent is there that starts its jobs."""
    deadline = time.monotonic() + 120
    while True:
        try:
            JobSubmissionClient(url, headers=authorisation()).submit_job(entrypoint="true")
        except RuntimeError as error:
            assert "No available agent" in str(error) and time.monotonic() < deadline, error
            time.sleep(1)
        else:
            return


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:ssl=None is deprecated:DeprecationWarning")  # Ray's
@pytest.mark.slow
@pytest.mark.alone
def test_the_page_can_be_typed(dashboard: str, cli: Command, tmp_path: Path) -> None:
    """In order, with the smoke configuration, a folder for the bucket, and no GPUs."""
    bucket = f"file://{tmp_path}/bucket"
    job = ""
    for program, *words in commands("sh cluster"):
        assert program == "palf-dist"
        for there, here in ((BUCKET, bucket), (ADDRESS, dashboard), (CONFIG, SMOKE), (GPUS, "gpus_per_worker=0")):
            words = [word.replace(there, here) for word in words]
        ended = cli(*(job if word == "JOB" else word for word in words))
        assert ended.code == 0, f"{words}\n{ended.out}\n{ended.err}"
        if words[0] == "submit":
            (job,) = re.findall(r"^job +(\S+)$", ended.out, re.MULTILINE)
        if words[:2] == ["jobs", "list"]:
            assert job[:20] in ended.out
    assert (tmp_path / "bucket/runs/first/best/policy.safetensors").exists()
