"""The command behind ``make bench-tuneloss``: run what is missing, then print and save tables and the anytime plot."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.tuneloss.methods import METHODS
from benchmarks.tuneloss.plot import plot_anytime
from benchmarks.tuneloss.problems import CASES
from benchmarks.tuneloss.results import Run, best_found, load_curve, run_all
from benchmarks.tuneloss.summary import cost_on_the_fly, summarise
from benchmarks.tuneloss.tables import Sheet, comparison_sheets, problem_sheet
from palf_dist.atomic import write_atomic
from palf_dist.errors import ConfigError, PalfError
from palf_dist.evaluation.plots import to_png

DOCS = Path("docs")
PICTURE = "images/tuneloss_anytime.png"
WIDTH = 170
"""Of what is printed into a file."""
GROUPS = {
    "reported": "Reported problems (no design was tuned on them)",
    "tuning": "Tuning problems (designs may have been tuned on these: not to be quoted)",
    "control": "Control: noisy-label MLP, where nothing is expected",
}

INTRODUCTION = """\
# TuneLoss against searchers

Written by `make bench-tuneloss ARGS=--write-docs`. Each method gets a budget of trainings of each problem and seed (the
column *budget*: the TuneLoss tiers with derivatives and Optuna's GP get fewer, as they are slow themselves or need no
more), and starts at the centre of the box where it allows that. A case counts as solved when the best model so far is
within 1, 2 or 5 % of the lowest validation error that any method found for that problem and seed; unsolved cases count
as infinite in the medians. In the ratios a case that Optuna TPE did not solve counts with all that TPE spent: they
understate. *Paired* is the median over cases of the ratio of that case, of those that either of the two solved.

Gradient evaluations are those of the trainings, of the implicit derivatives where a method uses them (a
Hessian-vector product counts as two), and of the snapshots that a method looks at: the validation error of each counts
as a third of the gradient evaluations that as many rows make. A training on the fly counts as one training, though it
is longer than another: its gradient evaluations, its looks included, are told below in those of a median training of
TPE on the same case. So read the second table of each set first. Trainings end after 250 iterations of L-BFGS, at weak
penalties before they have converged.

How the problems were chosen: by random search and TPE alone, so that neither the centre of the box nor the best of 20
random points is near the best found, and the best is in no corner. Left out for that: fashion with 500 rows, satimage,
credit, german, fine_foods, contraceptive, and most others with two weights. An earlier study of such methods, whose
results this design rests on, had looked at wine and fashion; splice, vehicle, vowel and newsgroups are new.

TPE, GP and CMA-ES are Optuna's, at their defaults (GP knows that the problems are not noisy). HOAG is after Pedregosa
(2016): its step-size rule without the tolerance schedule, each model trained from scratch, and random restarts.
"""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    problems: Annotated[str, typer.Option(help="comma-separated; default: all of --set")] = "",
    methods: Annotated[str, typer.Option(help="comma-separated; default: all")] = "",
    which: Annotated[str, typer.Option("--set", help="tuning | reported | control | all")] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="seeds 0 .. n - 1 of each problem")] = 5,
    trainings: Annotated[int, typer.Option(min=1, help="budget of each method")] = 100,
    processes: Annotated[
        int, typer.Option(min=0, help="runs at a time, one thread each; 0: only report")
    ] = os.cpu_count() or 1,
    folder: Annotated[
        Path, typer.Option(help="where results are kept; delete FOLDER/runs/METHOD to run it again")
    ] = Path("bench_results/tuneloss"),
    write_docs: Annotated[bool, typer.Option(help="write docs/results_tuneloss.md and its picture")] = False,
) -> None:
    """Trainings and gradient evaluations that TuneLoss and common searchers need until their best model is within 1, 2
    and 5 % of the best that anyone found. Interrupt it at will: the same command goes on."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        runs = _runs(problems, methods, which, seeds, trainings)
        if processes:
            _do(console, [run for run in runs if not run.is_done(folder)], folder, processes)
    except PalfError as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(f"interrupted: what is done is in {folder}; the same command goes on")
        raise typer.Exit(130) from None
    _report(console, [run for run in runs if run.is_done(folder)], folder, write_docs)


def _runs(problems: str, methods: str, which: str, seeds: int, trainings: int) -> list[Run]:
    """What is asked for, seed by seed, so that an interrupted benchmark has whole seeds. Raises ConfigError."""
    if which not in {"all", *GROUPS}:
        raise ConfigError(f"--set: {which} is none of all, {', '.join(GROUPS)}")
    of_set = [name for name, case in CASES.items() if which in {"all", case.set}]
    return [
        Run(problem, seed, method, trainings)
        for seed in range(seeds)
        for problem in _names("--problems", problems, CASES) or of_set
        for method in _names("--methods", methods, METHODS) or METHODS
        if CASES[problem].has_derivatives or METHODS[method].derivatives == "none"
    ]


def _names(option: str, given: str, known: Iterable[str]) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name} is none of {', '.join(known)}")
    return names


def _do(console: Console, runs: list[Run], folder: Path, processes: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("runs", total=len(runs))
        for number, line in enumerate(run_all(runs, folder, processes), 1):
            progress.console.print(f"{number}/{len(runs)} {line}", highlight=False)
            progress.advance(task)


def _report(console: Console, runs: list[Run], folder: Path, write_docs: bool) -> None:
    """Print the tables; save them, the plot and results.parquet (all trainings of the runs, one row each)."""
    best = best_found(folder)
    curves = [load_curve(run, folder) for run in runs]
    parts = []
    for group, title in GROUPS.items():
        there = [curve for curve in curves if CASES[curve.problem].set == group]
        if not there:
            continue
        names = [name for name in CASES if any(curve.problem == name for curve in there)]
        by_problem = {name: summarise([curve for curve in there if curve.problem == name], best) for name in names}
        ratios = group != "control"  # there all are noise, and ratios would measure luck
        sheets = comparison_sheets("all together", summarise(there, best), ratios=ratios)
        sheets.append(problem_sheet("by problem", by_problem))
        console.rule(title)
        for sheet in sheets:
            console.print(sheet.to_rich())
        share = cost_on_the_fly(there)
        costs = "" if np.isnan(share) else f"A training on the fly costs as much as {share:.1f} of TPE's (median).\n"
        console.print(costs)
        parts.append("\n".join([f"## {title}", "", costs, *[sheet.to_markdown() for sheet in sheets]]))
        picture = to_png(plot_anytime(there, best, title))
        write_atomic(folder / f"anytime_{group}.png", picture)
        if write_docs and group == "reported":
            write_atomic(DOCS / PICTURE, picture)
            parts.append(f"![distance to the best against trainings and gradient evaluations]({PICTURE})\n")
    pq.write_table(pa.concat_tables(pq.read_table(run.path(folder)) for run in runs), folder / "results.parquet")
    markdown = "\n".join([INTRODUCTION, _problems(), *parts])
    write_atomic(folder / "results.md", markdown.encode())
    if write_docs:
        write_atomic(DOCS / "results_tuneloss.md", markdown.encode())
    console.print(f"saved: results.parquet, results.md and the plots in {folder}", soft_wrap=True)


def _problems() -> str:
    """What the problems are, as Markdown."""
    header = ["problem", "set", "dataset", "rows to train / validate", "redrawn labels", "groups of columns", "weights"]
    lines = []
    for case in CASES.values():
        rows = " / ".join(map(str, case.rows))
        columns = " ".join((case.columns.__doc__ or "").split()).rstrip(".")
        lines.append([case.name, case.set, case.dataset, rows, f"{case.noise:.0%}", columns, str(len(case.ranges))])
    return Sheet("The problems", header, lines).to_markdown()


if __name__ == "__main__":
    app()
