"""The overhead benchmark: both ways train the same model on the same batches, and what is written is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import overhead
from benchmarks.overhead import MODELS, Model, initial_policy, measure
from palf_dist.config import PolicyConfig
from palf_dist.evaluation.overhead import OVERHEAD_JSON, read_overheads
from palf_dist.policies import LearnedPolicy, policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, save_policy


@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_its_rows(name: str) -> None:
    model = MODELS[name]
    shape = (3, *model.shape)
    assert model.make()(torch.zeros(shape, dtype=torch.int64 if model.words else None)).shape == (3, overhead.CLASSES)


def test_the_median_of_the_ratios_and_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds, a seventh before them that does not count, and either way first by turns."""
    ratios, order = iter([9.0, 1.1, 1.2, 1.5, 1.3, 1.0, 1.4]), []
    now: list[float] = [1.0]

    def train(model: Model, policy: object, steps: int) -> float:
        order.append(policy is None)
        if len(order) % 2:
            now[0] = next(ratios)
        return 2.0 if policy is None else 2.0 * now[0]

    monkeypatch.setattr(overhead, "train", train)
    found = measure(next(iter(MODELS.values())), initial_policy(), 6, 10)
    assert found.percent == pytest.approx(25.0) and found.seconds == 2.0
    assert found.ci95 == (pytest.approx(0.0), pytest.approx(50.0)), "six rounds: from the least to the most"
    assert order == [False, True, True, False] * 3 + [False, True]


@pytest.mark.slow
def test_a_tiny_one_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "DOCS", tmp_path)
    monkeypatch.setattr(overhead, "MODELS", {name: MODELS[name] for name in ("MLP 64", "transformer 32")})
    overhead.main(["--rounds", "6", "--steps", "12", "--write-docs"])
    torch.set_flush_denormal(False)
    assert "transformer 32" in capsys.readouterr().out
    found = read_overheads(tmp_path)
    assert found is not None and list(found.models) == ["MLP 64", "transformer 32"]
    assert (found.rounds, found.steps) == (6, 12) and all(each.seconds > 0 for each in found.models.values())
    assert (found.policy, found.threads, found.torch) == ("informed", 1, torch.__version__) and len(found.digest) == 64
    page = (tmp_path / "results_overhead.md").read_text()
    assert f"]({OVERHEAD_JSON})" in page and page.count("\n| ") == 4
    assert (
        f"with a policy of kind informed ({found.digest[:12]}), one thread, torch {torch.__version__} against" in page
    )
    spec = policy_spec(PolicyConfig(kind="validation_free"))
    mean = np.zeros(len(spec.features), np.float32)
    phi = LearnedPolicy(spec, mean.tolist(), (mean + 1).tolist()).initial()
    save_policy(tmp_path / "other", PolicyArtefact(spec, phi, mean, mean + 1))
    overhead.main(["--rounds", "6", "--steps", "12", "--write-docs", "--policy", str(tmp_path / "other")])
    again = read_overheads(tmp_path)
    assert again is not None and again.policy == "validation_free" and again.digest != found.digest
    assert "kind validation_free" in (tmp_path / "results_overhead.md").read_text()


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(["--rounds", "5"])
    assert "--rounds takes 6 or more" in capsys.readouterr().err
