"""What the policy adds to the time of a training, as ``python -m benchmarks.overhead`` has measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.headline import Figure
from palf_dist.sections import Count, Section

OVERHEAD_JSON = "results_overhead.json"
"""Beside results.json."""


class Cell(Section):
    """Of one model: the median over rounds of the ratio of a step with a policy to one with plain cross-entropy, less
    1, in percent."""

    model: str
    batch: Count
    policy: str
    refresh: Count  # steps between two refreshes
    percent: FiniteFloat
    ci95: tuple[FiniteFloat, FiniteFloat]  # of the median, by the order of the rounds
    plain: FiniteFloat  # microseconds of CPU time of a step with plain cross-entropy, median


class Overheads(Section):
    """The file ``OVERHEAD_JSON``."""

    rounds: Count
    policy: str  # the kind that ``judged`` is of
    refresh: Count
    digest: str  # of that policy
    threads: Count
    torch: str  # version
    cells: Annotated[tuple[Cell, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _some_judged(self) -> Overheads:
        if not self.judged:
            raise ValueError(f"no cell is of the policy {self.policy} at refresh {self.refresh}")
        return self

    @property
    def judged(self) -> dict[str, Cell]:
        """What the paper's claim is held to, by model and batch: its refresh interval, and the published kind of policy
        or the one that was given."""
        return {
            f"{each.model}, batch {each.batch}": each
            for each in self.cells
            if (each.policy, each.refresh) == (self.policy, self.refresh)
        }

    @property
    def measured_with(self) -> str:
        """In words, what was timed with what."""
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        return f"a policy of kind {self.policy} ({self.digest[:12]}), {threads}, torch {self.torch}"


def read_overheads(folder: Path) -> Overheads | None:
    """None where the folder has no such file. Raises RunDirectoryError for one that the benchmark did not write."""
    path = folder / OVERHEAD_JSON
    try:
        return Overheads.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        raise RunDirectoryError(
            f"{path}: is no file of python -m benchmarks.overhead ({type(error).__name__}); write it again with "
            "--write-docs, or remove it"
        ) from error


def overhead_figure(overheads: Overheads | None) -> Figure:
    """That of the model and batch with the most."""
    if overheads is None:
        return Figure(
            "overhead_percent",
            "the seconds of an evaluation are those of a busy machine; python -m benchmarks.overhead --write-docs "
            f"writes {OVERHEAD_JSON}",
        )
    judged = overheads.judged
    model, most = max(judged.items(), key=lambda item: item[1].percent)
    others = ", ".join(f"{name} {each.percent:.1f}" for name, each in judged.items() if name != model)
    meaning = (
        f"percent of additional training time, {model} (95 % interval {most.ci95[0]:.1f} to {most.ci95[1]:.1f}), which "
        f"has the most{f' (others: {others})' if others else ''}"
    )
    upper = max(each.ci95[1] for each in judged.values())
    asked = f"{overheads.measured_with}, asked every {overheads.refresh} steps"
    return Figure("overhead_percent", f"{meaning}; {asked}", most.percent, upper=upper)
