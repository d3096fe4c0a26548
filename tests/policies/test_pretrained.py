"""The policy inside the wheel: it is there, it is the published one, and it trains."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from palf_dist import AdaptiveLoss
from palf_dist.cli_shared import load_run_config, overrides_of_suite
from palf_dist.config import RunConfig
from palf_dist.evaluation.designs import design_of
from palf_dist.evaluation.policy_card import described
from palf_dist.policies.policy_file import CARD, DEFAULT, PRETRAINED, TENSORS, load_policy, save_policy
from palf_dist.tasks.suites import load_suite
from tests.adaptive_cases import untrained
from tests.evaluation.judged import judged_run, rows_of

ROOT = Path(__file__).parent.parent.parent


def test_the_default_policy_is_that_of_the_published_design() -> None:
    """As its card says: configs/palf12.yaml with the first fold of its suite held out, and judged on that; by which
    methods besides may have changed since."""
    artefact = load_policy(DEFAULT)
    published = load_run_config(ROOT / "configs/palf12.yaml", overrides_of_suite("palf12", "0"), None, None)
    config = RunConfig.model_validate(artefact.card["config"])
    assert design_of(config) == design_of(published)
    assert (config.data, config.seed) == (published.data, published.seed)
    fold = set(load_suite("palf12").folds[0])
    assert set(artefact.card["protocol"]["datasets"]) == set(artefact.card["held_out"]) == fold
    assert not fold & set(artefact.card["trained_on"])
    own = artefact.card["figures"]["policy"]
    assert own["tasks"] == len(fold) * 9 * 5 and own["ci95"][0] < own["diff_vs_ce"] < own["ci95"][1]
    assert own["by_dataset"].keys() == fold
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 40_000
    assert {path.name for path in PRETRAINED.iterdir()} == {CARD, TENSORS}


def test_it_is_also_there_when_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a policy, and a run; both can be named, too."""
    monkeypatch.chdir(tmp_path)
    run = judged_run(tmp_path / DEFAULT, rows_of(("fashion_mnist", "iris")))
    save_policy(run, untrained())
    for place in (f"./{DEFAULT}", Path(DEFAULT)):
        assert load_policy(place).card == {}
    for name in (CARD, TENSORS, None):
        assert load_policy(DEFAULT).card["run"] == described(DEFAULT).card["run"] == "palf12"
        if name is not None:
            Path(run, name).unlink()
    assert described(f"./{DEFAULT}").card["outer_step"] == 80


def test_it_trains_on_rows_that_it_never_saw_and_says_once_what_it_was_not_shown() -> None:
    """Digits is a dataset of its held-out fold; 30 % of the labels are drawn anew."""
    torch.manual_seed(0)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x, y = x.float() / 16, y.long()
    labels = torch.where(torch.rand(1200) < 0.3, torch.randint(10, (1200,)), y[:1200])
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        criterion = AdaptiveLoss.load(DEFAULT, total_steps=200)
        for _ in range(200):
            index = torch.randint(1200, (64,))
            criterion(model(x[index]), labels[index], index=index).backward()
            criterion.step(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
    assert (model(x[1200:]).argmax(1) == y[1200:]).float().mean() > 0.85
    missing = [str(each.message) for each in said if "AdaptiveLoss" in str(each.message)]
    assert len(missing) == 2 and "no validation" in missing[0] and "no training_rows" in missing[1]
