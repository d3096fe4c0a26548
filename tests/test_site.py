"""`make docs`: the site is built without a warning, holds every page and name, and asks no other host for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import palf_dist
from palf_dist import learnloss, search
from palf_dist.config import RunConfig
from tests.processes import ROOT

LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does, by this Python."""
    folder = tmp_path_factory.mktemp("site")
    variables = [f"BIN={Path(sys.executable).parent}", f"SITE={folder}"]
    ended = subprocess.run(
        ["make", "-o", ".venv/.installed", "docs", *variables], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.mark.slow
def test_every_page_is_there_and_says_what_the_code_does(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    reference = (site / "reference.html").read_text()
    for module in (palf_dist, learnloss, search):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in reference, name
    types = reference.count(">Type<")
    assert types == 0, "made of what stands before a colon in an attribute's docstring"
    configuration, commands = ((site / f"{page}.html").read_text() for page in ("configuration", "commands"))
    assert all(f">{name}<" in configuration for name in RunConfig.model_fields)
    assert "--max-restarts" in commands and "palf-dist policy compare" in commands


@pytest.mark.slow
def test_it_is_read_without_a_network(site: Path) -> None:
    loaded = {(page.name, target) for page in site.rglob("*.html") for target in LOADED.findall(page.read_text())}
    assert len(loaded) > 100
    assert {each for each in loaded if "//" in each[1]} == set()
    for page, target in loaded:
        assert (site / re.sub(r"[?#].*", "", target)).exists(), (page, target)
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?https?:|@import", styles)
