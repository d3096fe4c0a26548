from __future__ import annotations

from pathlib import Path

import pytest

from palf_dist.errors import DataError
from palf_dist.tasks.cache import atomic_write, cache_folder


def test_the_folder_is_the_named_one_then_the_variable_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PALF_CACHE", raising=False)
    assert cache_folder(None) == tmp_path / ".palf_cache"
    monkeypatch.setenv("PALF_CACHE", str(tmp_path / "variable"))
    assert cache_folder(None) == tmp_path / "variable"
    assert cache_folder("named") == tmp_path / "named"


def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file"
    with atomic_write(target) as part:
        part.write_text("old")

    def interrupted() -> None:
        with atomic_write(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with (
        pytest.raises(DataError, match=r"cache folder .*cannot be written.*data\.cache"),
        atomic_write(tmp_path / "file" / "x"),
    ):
        pass
