"""Bring the table of docs/results.md over to README.md, in the working folder. ``python -m benchmarks.readme``"""

from __future__ import annotations

import sys
from pathlib import Path

from palf_dist.atomic import write_atomic
from palf_dist.evaluation.results import BLOCK, RESULTS_MARKDOWN

README, PAGE = Path("README.md"), Path("docs", RESULTS_MARKDOWN)


def block_of(page: str) -> str:
    """What stands between the two marks of ``BLOCK``. Raises ValueError for a page that does not have them once each,
    in order."""
    before, mark, rest = page.partition(BLOCK[0])
    block, end, after = rest.partition(BLOCK[1])
    if not (mark and end) or any(each in before + block + after for each in BLOCK):
        raise ValueError(f"does not have {BLOCK[0]} and below it {BLOCK[1]}, once each")
    return block


def with_block(page: str, block: str) -> str:
    """The page with another block. Raises as ``block_of``."""
    return page.replace(BLOCK[0] + block_of(page) + BLOCK[1], BLOCK[0] + block + BLOCK[1])


def main() -> None:
    text = {}
    for path in (README, PAGE):
        try:
            text[path] = path.read_text()
            block_of(text[path])
        except (OSError, ValueError) as error:
            sys.exit(f"error: {path}: {error}")
    write_atomic(README, with_block(text[README], block_of(text[PAGE])).encode())


if __name__ == "__main__":
    main()
