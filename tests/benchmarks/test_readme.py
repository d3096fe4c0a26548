"""What brings the table of docs/results.md over to the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import main, with_block
from palf_dist.evaluation.results import BLOCK

NOT_YET = "\nNot measured yet.\n"


def page(block: str) -> str:
    return f"# Title\n\n{BLOCK[0]}{block}{BLOCK[1]}\n\nThe rest.\n"


def test_the_block_is_brought_over_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/results.md").write_text(page("\n| a |\n").replace("Title", "Results"))
    Path("README.md").write_text(page(NOT_YET))
    main()
    assert Path("README.md").read_text() == page("\n| a |\n")
    main()
    assert Path("README.md").read_text() == page("\n| a |\n")


@pytest.mark.parametrize(
    "text", ["", BLOCK[0], f"{BLOCK[1]}{BLOCK[0]}", page("") + page(""), page("") + BLOCK[1], BLOCK[1] + page("")]
)
def test_a_page_without_its_marks_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_block(text, "new")
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(text)
    with pytest.raises(SystemExit, match=r"^error: README\.md: does not have <!-- results -->"):
        main()
    assert Path("README.md").read_text() == text


def test_a_missing_page_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(page(NOT_YET))
    with pytest.raises(SystemExit, match=r"^error: docs/results\.md: "):
        main()
