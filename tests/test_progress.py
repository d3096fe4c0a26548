from __future__ import annotations

import io

import pytest
from rich.console import Console

from palf_dist import progress
from palf_dist.progress import Progress, Status


def plain() -> tuple[Progress, io.StringIO]:
    screen = io.StringIO()
    return Progress(Console(file=screen, width=60)), screen


def test_lines_say_what_is_known() -> None:
    status = Status(phase="meta-training", done=30, total=100, began=100.0, began_at=10, contributions=40)
    status.outer_loss, status.selection_score, status.workers = 0.31234, 0.0215, 2
    status.reissued, status.refused = 1, {"stale": 3, "non_finite": 0, "outlier": 2}
    assert status.parts(now=120.0) == [
        "outer loss 0.3123",
        "selection +2.15 points",
        "2.0 contributions/s",
        "2 workers alive",
        "refused 3 stale, 2 outlier",
        "1 re-issued",
        "1 min 10 s left",
    ]
    assert Status(phase="tuning", total=8).parts(now=1.0) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text


def test_plain_lines_are_few_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown, screen = plain()
    with shown:
        shown.begin("tuning", 8)
        for done in range(1, 9):
            now += 0.5
            shown.advance(done)
        shown.event("worker 1 (pid 7) died; it is replaced, and unit [tune] is issued again, which makes a long line")
    lines = screen.getvalue().splitlines()
    assert lines[:3] == ["tuning 0/8", "tuning 4/8 · 2 s left", "tuning 8/8"]
    assert lines[3] == (
        "! worker 1 (pid 7) died; it is replaced, and unit [tune] is issued again, which makes a long line"
    )


def test_a_terminal_shows_one_line_and_events_above_it() -> None:
    screen = io.StringIO()
    shown = Progress(Console(file=screen, width=120, force_terminal=True))
    with shown:
        shown.begin("meta-training", 100, done=40)
        shown.status.workers = 2
        shown.advance(41)
        shown._live.refresh()
        shown.event("worker 0 died")
    text = screen.getvalue()
    assert "meta-training" in text and "41/100" in text and "2 workers alive" in text and "worker 0 died" in text


def test_a_new_phase_starts_afresh() -> None:
    shown, _ = plain()
    shown.begin("meta-training", 4)
    shown.status.outer_loss, shown.status.contributions = 0.3, 8
    shown.begin("evaluating", 18)
    assert shown.status.outer_loss is None and shown.status.contributions == 0
