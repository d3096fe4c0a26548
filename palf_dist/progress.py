"""Live progress of a run: one updating line on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from palf_dist.redaction import redact

PLAIN_SECONDS = 2.0
"""Least time between two plain lines of one phase, so that a log stays readable."""


@dataclass
class Status:
    """What the line shows. ``done`` and ``total`` count outer steps in meta-training, trials in a search and units in
    other phases."""

    phase: str = ""
    done: int = 0
    total: int = 0
    began: float = 0.0  # time.monotonic() when the phase began
    began_at: int = 0  # done at that moment
    contributions: int = 0  # since the phase began
    outer_loss: float | None = None
    selection_score: float | None = None  # accuracy above plain cross-entropy's, a fraction
    workers: int | None = None  # alive; None in process
    reissued: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)  # what else the phase has to say

    def parts(self, now: float) -> list[str]:
        """The facts of the line, as short texts."""
        texts = list(self.facts)
        if self.outer_loss is not None:
            texts.append(f"outer loss {self.outer_loss:.4f}")
        if self.selection_score is not None:
            texts.append(f"selection {100 * self.selection_score:+.2f} points")
        elapsed = max(now - self.began, 1e-9)
        if self.contributions:
            texts.append(f"{self.contributions / elapsed:.1f} contributions/s")
        if self.workers is not None:
            texts.append(f"{self.workers} workers alive")
        refused = {cause: count for cause, count in self.refused.items() if count}
        if refused:
            texts.append("refused " + ", ".join(f"{count} {cause}" for cause, count in refused.items()))
        if self.reissued:
            texts.append(f"{self.reissued} re-issued")
        if self.began_at < self.done < self.total:
            left = elapsed / (self.done - self.began_at) * (self.total - self.done)
            texts.append(f"{_duration(left)} left")
        return texts


class Progress:
    """Shows a ``Status``; a context manager. All methods return at once."""

    def __init__(self, console: Console | None = None) -> None:
        self.status = Status()
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, transient=True, refresh_per_second=4, get_renderable=self._render)
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A phase of ``total`` steps begins, ``done`` of which need not be done again."""
        now = time.monotonic()
        status = self.status
        status.phase, status.total, status.done, status.began, status.began_at = phase, total, done, now, done
        status.contributions, status.outer_loss, status.selection_score, status.facts = 0, None, None, []
        self._plain_line(now)

    def advance(self, done: int) -> None:
        """``done`` steps of the phase are done."""
        self.status.done = done
        now = time.monotonic()
        if done == self.status.total or now - self._last_line >= PLAIN_SECONDS:
            self._plain_line(now)

    def event(self, text: str) -> None:
        """Something happened that deserves a line of its own."""
        self._console.print(f"[yellow]![/] {escape(redact(text))}", highlight=False, soft_wrap=True)

    def _plain_line(self, now: float) -> None:
        if self._console.is_terminal:
            return
        self._last_line = now
        status = self.status
        line = " · ".join([f"{status.phase} {status.done}/{status.total}", *status.parts(now)])
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _render(self) -> Table:
        status = self.status
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            f"[bold]{status.phase}[/]",
            ProgressBar(total=max(status.total, 1), completed=status.done, width=20),
            f"{status.done}/{status.total}",
            escape(" · ".join(status.parts(time.monotonic()))),
        )
        return grid


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
