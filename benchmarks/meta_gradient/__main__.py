"""The command behind ``make bench-meta-gradient``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

from rich.console import Console

from benchmarks.meta_gradient import measure
from benchmarks.meta_gradient.contenders import missing
from benchmarks.meta_gradient.page import JSON, PAGE, compiled_summary, page, summary, table, title
from benchmarks.meta_gradient.workloads import CASES, WORKLOADS
from benchmarks.screen import shown
from palf_dist.atomic import write_atomic

DOCS = measure.ROOT / "docs"
ROUNDS = 5
WIDTH = 170


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.meta_gradient", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="default: all")
    parser.add_argument("--write-docs", action="store_true", help=f"also write docs/{PAGE} and docs/{JSON}")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    if options.write_docs and len(options.workloads) < len(WORKLOADS):
        parser.error("--write-docs writes the page of all workloads; leave --workloads out")
    console = Console(width=WIDTH)
    cases = [case for case in CASES if case.letter in options.workloads]
    with console.status("") as status:
        tell = status.update if console.is_terminal else console.print
        found = measure.performance(cases, missing(), options.rounds, tell)
    for case in found.cases:
        console.print(shown(table(case, found), title(case)))
    console.print(shown(summary(found), "CPU time, in times palf_dist's"))
    if (compiled := compiled_summary(found))[1]:
        console.print(shown(compiled, "CPU time, in times that of palf_dist, compiled; medians"))
    if options.write_docs:
        write_atomic(DOCS / JSON, (found.model_dump_json(indent=1) + "\n").encode())
        write_atomic(DOCS / PAGE, page(found).encode())


if __name__ == "__main__":
    main()
