"""Each of the smaller benchmarks, cut down to seconds: that it runs and prints what it promises, never its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import classifier, hedge_regret, import_time, learnloss_certificates, learnloss_lp, online_learnloss
from tests.command import SMOKE

pytestmark = pytest.mark.slow


def test_classifier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: classifier.METHODS[name] for name in (next(iter(classifier.METHODS)), list(classifier.METHODS)[2])}
    monkeypatch.setattr(classifier, "METHODS", few)
    monkeypatch.setattr(classifier, "DATASETS", {"iris": classifier.DATASETS["iris"]})
    monkeypatch.setattr(classifier, "SPLITS", 2)
    classifier.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in few) and "log loss" in printed


def test_certificates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(learnloss_certificates, "DATASETS", {"wine": learnloss_certificates.DATASETS["wine"]})
    monkeypatch.setattr(learnloss_certificates, "CASES", learnloss_certificates.CASES[:1])
    learnloss_certificates.main()
    assert "wine" in capsys.readouterr().out


def test_linear_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(learnloss_lp, "COUNTS", (300,))
    learnloss_lp.main()
    assert "300" in capsys.readouterr().out


def test_import_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(import_time, "ROUNDS", 2)
    import_time.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in import_time.STATEMENTS) and "in 2 rounds" in printed


def test_hedge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(hedge_regret, "ROUNDS", (50, 200))
    monkeypatch.setattr(hedge_regret, "EXPERTS", (2, 4, 8))
    monkeypatch.setattr(hedge_regret, "SEEDS", 2)
    monkeypatch.setattr(hedge_regret, "PAGE", tmp_path / "results_hedge.md")
    monkeypatch.setattr(hedge_regret, "PICTURE", tmp_path / "hedge_regret.png")
    hedge_regret.main(["--write-docs"])
    assert "is the rate that holds" in capsys.readouterr().out
    page = hedge_regret.PAGE.read_text()
    assert page.count("\n| worst case |") == page.count("\n| stochastic |") == 2 and "images/hedge_regret.png" in page
    assert hedge_regret.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_online(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(online_learnloss, "CONFIG", SMOKE)
    monkeypatch.setattr(online_learnloss, "SEEDS", 1)
    monkeypatch.setattr("sys.argv", ["online_learnloss", "--json", str(tmp_path / "online.json")])
    online_learnloss.main()
    assert "plain CE" in capsys.readouterr().out
    assert json.loads((tmp_path / "online.json").read_text())["summaries"]
