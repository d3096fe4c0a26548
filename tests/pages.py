"""The code blocks of README.md, CONTRIBUTING.md and docs/, and how a page is typed from its first block to its last.

``python -m tests.pages docs/tutorial.md`` types the tutorial in a new folder and keeps the picture that it shows.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.processes import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = {"docs/tutorial.md": {"runs/mine/report/alpha.png": "docs/images/tutorial_alpha.png"}}
"""By page: what its run leaves behind, and where the page shows it."""

TYPED: dict[str, tuple[str, ...]] = {
    "docs/tutorial.md": ("sh install",),
    "docs/own_dataset.md": (),
    "docs/own_model.md": (),
    "docs/mlflow_server.md": ("sh server",),
}
"""Pages that are typed from the first block to the last, and which of their blocks are not."""

DIRECTIVES = ("{toctree}", "{eval-rst}", "{config-fields}", "{commands}")
"""Of Sphinx, fenced like code."""

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    page: str  # relative to the root
    line: int
    info: str  # what stands behind the fence: language, and perhaps a word on how it is tested
    text: str

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    @property
    def file(self) -> str | None:
        """The name that its first line says to save it under."""
        named = _FILE.match(self.text)
        return named.group(1) if named else None

    def commands(self) -> Iterator[list[str]]:
        """The words of each line, the program without the folder of its environment."""
        for line in self.text.replace("\\\n", "").splitlines():
            if words := shlex.split(line, comments=True):
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def blocks(pages: Sequence[Path] = PAGES) -> list[Block]:
    """In order; what Sphinx is told is none."""
    return [
        Block(str(page.relative_to(ROOT)), text.count("\n", 0, found.start()) + 1, found[2].strip(), found[3])
        for page in pages
        for text in [page.read_text()]
        for found in _FENCE.finditer(text)
        if not found[2].startswith(DIRECTIVES)
    ]


def parse(command: Any, words: Sequence[str]) -> None:
    """Have a command of typer or click refuse what it does not take; nothing is run."""
    name, *arguments = words
    context = command.make_context(name, arguments)
    if hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        parse(command.commands[rest[0]], rest)


def script(page: str) -> str:
    """A page as one bash script: named blocks are saved, commands typed, other Python given to Python."""
    parts = ["set -euo pipefail"]
    for block in blocks([ROOT / page]):
        here = f"echo '== {block.page}:{block.line}'"
        if block.info in TYPED[page]:
            continue
        if block.file is not None:
            parts += [here, f"cat > {block.file} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"]
        elif block.language == "sh":
            parts += [here, block.text]
        elif block.language == "python":
            parts += [here, f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"]
        else:
            raise ValueError(f"{block.page}:{block.line}: nobody knows how to type {block.info!r}")
    return "\n".join(parts)


def type_page(page: str, folder: Path, replaced: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script of a page in ``folder``, in the environment of this Python; ``replaced``: what has to be another
    text here, by the page's."""
    text = script(page)
    for there, here in (replaced or {}).items():
        assert there in text, f"{page} no longer has {there}"
        text = text.replace(there, here)
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PALF_CACHE": str(folder / ".palf_cache"),
    }
    return subprocess.run(
        ["bash", "-c", text],
        cwd=folder,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1000,  # two minutes where nothing else runs
    )


def main() -> None:
    for page in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            ended = type_page(page, Path(folder))
            print(ended.stdout, ended.stderr, sep="\n")
            ended.check_returncode()
            for made, shown in PICTURES.get(page, {}).items():
                shutil.copy(Path(folder, made), ROOT / shown)
                print(f"written {shown}")


if __name__ == "__main__":
    main()
