"""The overhead benchmark: all ways train the same model on the same batches, and what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead import MODELS, POLICIES, Round, Training, cell, initial_policy, load, measure, page, tables
from palf_dist.config import PolicyConfig
from palf_dist.evaluation.overhead import OVERHEAD_JSON, Overheads, read_overheads
from palf_dist.policies.policy_file import save_policy


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_rows(name: str) -> None:
    model = MODELS[name]
    data = load("digits") if model.dataset == "digits" else overhead.Data(*rows_like(model.dataset), classes=10)
    training = Training(model, data, 3, None)
    logits, features = training.network(data.x[:3])
    assert logits.shape == (3, data.classes) and features.shape == (3, model.width)
    assert training.seconds(2) > 0


def rows_like(dataset: str) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Ten training rows and five others of the form of a dataset that would have to be downloaded."""
    x = torch.zeros(15, overhead.WORDS, dtype=torch.int64) if dataset == "newsgroups" else torch.zeros(15, 1, 28, 28)
    y = torch.arange(15) % 10
    return x[5:], y[5:], (x[:5], y[:5])


def test_digits_are_pictures_and_a_tenth_is_held_back() -> None:
    data = load("digits")
    assert data.x.shape == (1618, 1, 8, 8) and len(data.held_back[1]) == 179 and 0.9 < data.x.max() <= 1
    assert len(data.y) == 1618 and data.classes == 10 and not data.words


def test_a_refresh_counts_as_often_as_it_comes() -> None:
    once = Round(plain=100.0, between=110.0, refresh=310.0)
    assert once.ratio(1) == pytest.approx(3.1)
    assert once.ratio(10) == pytest.approx(1.3)
    assert once.ratio(100) == pytest.approx(1.12)


def test_the_median_of_the_ratios_and_its_interval() -> None:
    rounds = [Round(1e-4, each * 1e-4, each * 1e-4) for each in (1.1, 1.2, 1.5, 1.3, 1.0, 1.4)]
    found = cell("MLP", 64, "palf", 10, rounds)
    assert found.percent == pytest.approx(25.0) and found.plain == pytest.approx(100.0)
    assert found.ci95 == (pytest.approx(0.0), pytest.approx(50.0)), "six rounds: from the least to the most"


def test_all_ways_by_turns_and_the_policy_is_asked_when_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def seconds(self: Training, steps: int, refresh_every: int = overhead.NEVER) -> float:
        order.append("plain" if self.criterion is None else f"{self.criterion.policy.spec.kind} {refresh_every}")
        return 1.0 if self.criterion is None else 3.0 if refresh_every == 1 else 2.0

    monkeypatch.setattr(Training, "seconds", seconds)
    policies = {name: initial_policy(POLICIES[name]) for name in ("robust", "palf")}
    found = measure(MODELS["MLP 64"], load("digits"), 64, policies, 2)
    assert found == {name: [Round(1.0, 2.0, 3.0)] * 2 for name in policies}
    apart = [f"{name} {every}" for name in policies for every in (overhead.NEVER, 1)]
    assert order[4:] == ["plain", *apart[2:], *apart[:2], "plain", "plain", *apart, "plain"]


def test_a_step_between_two_refreshes_asks_nothing() -> None:
    training = Training(MODELS["MLP 64"], load("digits"), 64, initial_policy(POLICIES["robust"]))
    assert training.criterion is not None
    training.seconds(2, 1)
    asked = training.criterion.controls
    training.seconds(3)
    assert training.criterion.controls is asked
    training.seconds(1, 1)
    assert training.criterion.controls is not asked


@pytest.mark.slow
def test_a_tiny_one_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "DOCS", tmp_path)
    monkeypatch.setattr(overhead, "MODELS", {name: MODELS[name] for name in ("MLP 64", "conv 8-16")})
    monkeypatch.setattr(overhead, "BATCHES", (16,))
    overhead.main(["--rounds", "6", "--write-docs"])
    torch.set_flush_denormal(False)
    assert "conv 8-16" in capsys.readouterr().out
    found = read_overheads(tmp_path)
    assert found is not None and list(found.judged) == ["MLP 64, batch 16", "conv 8-16, batch 16"]
    assert len(found.cells) == 2 * len(POLICIES) * 2 and all(each.plain > 0 for each in found.cells)
    assert (found.policy, found.threads, found.torch) == ("informed", 1, torch.__version__) and len(found.digest) == 64
    written = (tmp_path / "results_overhead.md").read_text()
    assert written == page(found) and f"]({OVERHEAD_JSON})" in written and written.count("\n| ") == 2 * 4
    policy = initial_policy(PolicyConfig(kind="validation_free"))
    save_policy(tmp_path / "other", policy)
    overhead.main(["--rounds", "6", "--write-docs", "--policy", str(tmp_path / "other")])
    again = read_overheads(tmp_path)
    assert again is not None and again.policy == "validation_free" and again.digest != found.digest
    assert {each.policy for each in again.cells} == {"validation_free"}


def test_a_table_for_each_refresh_interval() -> None:
    rounds = [Round(1e-4, 1.1e-4, 2e-4)] * 6
    cells = [
        cell("MLP", batch, name, n, rounds) for batch in (64, 128) for n in (10, 100) for name in ("palf", "robust")
    ]
    found = Overheads(
        rounds=6, policy="palf", refresh=100, digest="ab" * 32, threads=1, torch="2.9.1", cells=tuple(cells)
    )
    made = tables(found)
    assert list(made) == ["The policy asked every 10 steps", "The policy asked every 100 steps"]
    header, rows = made["The policy asked every 10 steps"]
    assert header == ["model", "batch", "plain step", "palf, %", "robust, %"]
    assert rows == [["MLP", batch, "100 us", *["+19.0 (+19.0 to +19.0)"] * 2] for batch in ("64", "128")]


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--rounds", "5"])
    assert "--rounds takes 6 or more" in capsys.readouterr().err
