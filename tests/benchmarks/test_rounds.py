"""The benchmark of outer steps: everything that passes is somewhere in its parts, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rounds
from benchmarks.rounds import PARTS, RAY, UNITS, Rounds
from tests.distributed.small import small_config


def test_the_quick_preset_has_as_many_blocks_as_are_asked_for() -> None:
    config = rounds.settings(3)
    steps, every = config.meta_learner.outer_steps, config.checkpoint.every
    assert (steps - 1) // every - 1 == 3 and config.evaluation.select_every == steps
    assert config.distributed.workers == 1 and config.tracking.enabled


def made(*of_units: float) -> Rounds:
    return Rounds(5, 2, [dict.fromkeys(PARTS, 0.0) | {UNITS: each, RAY: 1.0} for each in of_units], {"delivery": 0.5})


def test_shares_are_of_the_whole_block() -> None:
    found = made(9.0, 19.0, 4.0)
    assert found.share(UNITS) == pytest.approx([90, 95, 80]) and rounds.besides(found) == pytest.approx([10, 5, 20])
    assert found.milliseconds == pytest.approx([2000, 4000, 1000])
    assert "10.00 % of an outer step (5.00 to 20.00)" in rounds.verdict(found) and "missed" in rounds.verdict(found)
    assert "reached" in rounds.verdict(made(20.0))
    assert ["delivery", "33.3", "1.43"] in rounds.cpu_table(found)[1]


@pytest.mark.slow
def test_a_run_taken_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = small_config(
        meta_learner={"outer_steps": 7},
        checkpoint={"every": 2},
        evaluation={"select_every": 7},
        distributed={"workers": 1},
        tracking={"enabled": True},
    )
    monkeypatch.setattr(rounds, "settings", lambda blocks: small)
    monkeypatch.setattr(rounds, "PAGE", tmp_path / "results_rounds.md")
    monkeypatch.setattr(rounds, "JSON", tmp_path / "results_rounds.json")
    rounds.main(["--write-docs"])
    found = json.loads(rounds.JSON.read_text())
    assert found["steps_of_a_block"] == 2
    assert [len(each) for each in found["percent"].values()] == [2] * len(PARTS), "the first block does not count"
    for shares in zip(*found["percent"].values(), strict=True):
        assert sum(shares) == pytest.approx(100, abs=0.01) and all(share >= 0 for share in shares)
        assert all(share > 0 for share in shares), "each part was seen at work"
    assert set(found["cpu_seconds_elsewhere"]) == {"delivery to MLflow", "Ray's own processes"}
    page = rounds.PAGE.read_text()
    assert all(f"| {part} |" in page for part in PARTS) and "of an outer step" in capsys.readouterr().out
