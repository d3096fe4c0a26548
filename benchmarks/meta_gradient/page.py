"""docs/performance.md and what is printed: tables of what was found."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.meta_gradient.contenders import COMPILED, OURS, UNROLL
from benchmarks.meta_gradient.record import CaseRecord, Figures, Performance, Spread
from palf_dist.evaluation.table import Cells, markdown_table

COMMAND = "make bench-meta-gradient ARGS=--write-docs"
JSON, PAGE = "performance.json", "performance.md"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.least)}-{_number(spread.most)})"


def _times(spread: Spread) -> str:
    return f"{_number(spread.median)}x ({_number(spread.least)}-{_number(spread.most)})"


def title(case: CaseRecord) -> str:
    tasks = f"{case.tasks} task{'s' * (case.tasks > 1)}"
    return f"{case.letter}: {case.title}, {tasks}, {case.optimiser}"


def compiled_summary(found: Performance) -> Cells:
    """How many times the CPU time of compiled palf_dist the others need, by the medians of each; no rows where it was
    not compiled."""
    header = ["case", "fastest library", "JAX reverse", "JAX adjoint", UNROLL, OURS]

    def ratio(case: CaseRecord, name: str | None) -> str:
        if name is None or name not in case.contenders:
            return "-"
        return f"{_number(case.contenders[name].cpu.median / case.contenders[COMPILED].cpu.median)}x"

    rows = []
    for case in found.cases:
        if COMPILED in case.contenders:
            others = [ratio(case, name) for name in (case.fastest_library, *header[2:])]
            rows.append([f"{case.letter}, {case.tasks}, {case.optimiser}", *others])
    return header, rows


def summary(found: Performance) -> Cells:
    """How many times palf_dist's CPU time the others need, case by case."""
    header = ["case", "fastest library", "which", "JAX reverse", "JAX adjoint", UNROLL, COMPILED]

    def ratio(case: CaseRecord, name: str | None) -> str:
        return "-" if name is None or name not in case.contenders else _times(case.contenders[name].ratio)

    rows = []
    for case in found.cases:
        fastest = case.fastest_library
        others = [ratio(case, name) for name in header[3:]]
        rows.append([f"{case.letter}, {case.tasks}, {case.optimiser}", ratio(case, fastest), fastest or "-", *others])
    return header, rows


def table(case: CaseRecord, found: Performance) -> Cells:
    """All that was measured of a case, a row for each contender; those that are not installed have one too."""
    header = ["", "wall ms", "CPU ms", "CPU time, of palf_dist's", "error", "in float64", "memory MB", "of peak"]

    def row(name: str, figures: Figures) -> list[str]:
        return [
            name,
            _spread(figures.wall),
            _spread(figures.cpu),
            _times(figures.ratio),
            f"{figures.error32:.1e}",
            f"{figures.error64:.1e}" if figures.error64 else "reference",
            "-" if figures.memory is None else _number(figures.memory),
            f"{100 * figures.peak_share:.1f} %",
        ]

    rows = [row(name, figures) for name, figures in case.contenders.items()]
    rows += [[f"{name}: not installed", *["-"] * (len(header) - 1)] for name in found.missing]
    return header, rows


def page(found: Performance) -> str:
    return "\n".join(_page(found))


def _page(found: Performance) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    yield f"""# What a meta-gradient costs

Written by `{COMMAND}`; [{JSON}]({JSON}) has the figures. {found.cpu}, one of {found.cores} cores,
one thread, Python {found.python}, {versions}. Float32.

The exact gradient of the outer loss with respect to the policy's parameters, through every step of the inner run: by
palf_dist's own `adjoint` estimator, as it is and compiled by inductor (`inner.compile`), its `unroll` (autograd through
all tasks at once), and by other libraries, which compute the same quantity. A, B and C take 20 steps under the paper's
five basis losses, whose weights a policy 6-32-5 sets every 10 steps; the outer loss is cross-entropy on clean rows at
the end. D is a unit of meta-training: 150 Adam steps of 48 tasks under the robust policy, the soft error read at six
checkpoints. Data are made up; in D, rows and classes are padded, half of the tasks have a shifted prior.

- All start from the same parameters, minibatches and policy. In A to C the training states that the policy reads are
  computed beforehand and given to all; in D palf_dist reads them itself, and JAX is given them.
- TorchOpt, higher and learn2learn do one task after the other, as they are used; JAX does all at once by vmap, scan and
  jit, compiled beforehand. "JAX adjoint" is palf_dist's method written in JAX. Adam has its epsilon under the root
  everywhere: in higher and learn2learn by an update rule of the benchmark, since theirs have no finite meta-gradient.
- Of learn2learn only `learn2learn.utils` is imported, of which its MAML is made.

{found.rounds} rounds in one process on one core, in each of which every contender computes the gradient once and
another one comes first; medians, with the least and the most in brackets.

## Times palf_dist's CPU time

By how much others need more, compared within each round.

{markdown_table(summary(found), texts=1)}"""
    compiled = compiled_summary(found)
    if compiled[1]:
        yield f"""The same beside palf_dist compiled, by the medians:

{markdown_table(compiled, texts=1)}"""
    for name, reason in found.missing.items():
        yield f"{name} is not installed: {reason}.\n"
    yield f"""## Case by case

*Error*: of the gradient in float32, relative to that of `unroll` in float64; then of the same contender in float64.
Where Adam divides by roots of small second moments, rounding of the inner run alone moves the gradient: compare with
autograd's own error in the row of `unroll`. Why TorchOpt is less exact in float64 than the others was not looked into.
*Memory*: peak resident size during a gradient less that before it, in a fresh process; of the most tasks only.
*Of peak*: floating-point operations of the matrix products in the median CPU time, as a share of the
{found.matmul_gigaflops:,.0f} gigaflops a second that a large product reaches here. They are counted in palf_dist by
torch; a library that works by reverse mode (the adjoint) is taken to make those of `unroll` (of the adjoint).
"""
    for case in found.cases:
        counts = ", ".join(f"{value:,.3g} by {name}" for name, value in case.gigaflops.items())
        yield f"### {title(case)}\n\nGigaflops of matrix products in a gradient: {counts}.\n"
        yield markdown_table(table(case, found))
