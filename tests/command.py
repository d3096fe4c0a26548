"""The ``palf-dist`` command as tests call it: in process, in a folder of its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from palf_dist.cli import main

SMOKE = str(Path(__file__).parent.parent / "configs" / "smoke.yaml")


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Command:
    """Calls ``palf-dist`` in process, in an empty folder, and knows what lies there."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._capfd, self._monkeypatch = folder, capfd, monkeypatch
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["palf-dist", *arguments])
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *self._capfd.readouterr())

    def refused(self, *arguments: str) -> str:
        """The one message of a user's mistake: exit code 2, no traceback, and no file that was there touched."""
        before = self.files()
        ended = self(*arguments)
        assert ended.code == 2, ended
        assert ended.out == ""
        assert ended.err.count("error: ") == 1 and "Traceback" not in ended.err, ended.err
        after = self.files()
        assert {name: after.get(name) for name in before} == before
        return ended.err[ended.err.index("error: ") :]

    def files(self) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None
            for path in self.folder.rglob("*")
        }
