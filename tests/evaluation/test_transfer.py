"""Evaluations of a transfer: told from other runs, joined with them, and refused where they say nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from palf_dist.config_loading import parse_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.results import make_results
from palf_dist.evaluation.runs import read_runs
from palf_dist.evaluation.transfer import compare_transfer, transfer_of, transfer_page
from tests.evaluation.judged import judged_run, rows_of

MLP = {"kind": "mlp", "hidden": [64], "embedding": 4, "image_size": None, "words": None}
OTHER = "tasks.architectures=[{kind: conv}]"
CARD: dict[str, Any] = {"inner_steps": 150, "architectures": [MLP]}
METHODS = ("policy", "ce", "s5")


@pytest.mark.parametrize(
    ("overrides", "card", "kind"),
    [
        ([], CARD, None),
        ([], {}, None),
        (["inner.steps=1500"], CARD, "horizon"),
        (["inner.steps=1500"], {"inner_steps": 150}, "horizon"),
        ([OTHER], CARD, "architecture"),
        (["tasks.architectures=[{kind: mlp, hidden: [32]}]"], CARD, "architecture"),
        ([], CARD | {"architectures": [MLP, {"kind": "conv"}]}, None),
        ([], CARD | {"architectures": [{"kind": "mlp"}]}, None),
    ],
)
def test_what_is_a_transfer(overrides, card, kind):
    config = parse_config("data: {train: [digits], held_out: [iris]}", "a", overrides)
    assert transfer_of(config, card, "run") == kind


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.architectures=[{kind: conv}, {kind: mlp}]"], "with mlp, which its policy was trained on"),
        ([OTHER, "inner.steps=1500"], "in runs of another length"),
    ],
)
def test_half_a_transfer_is_refused(overrides, message):
    config = parse_config("data: {train: [digits], held_out: [iris]}", "a", overrides)
    with pytest.raises(RunDirectoryError, match=f"run: judges a policy on other architectures .*{message}"):
        transfer_of(config, CARD, "run")


def test_a_card_of_a_later_version_is_refused():
    config = parse_config("data: {train: [digits], held_out: [iris]}", "a")
    with pytest.raises(RunDirectoryError, match="run: the card of its policy names an architecture that this version"):
        transfer_of(config, {"architectures": [{"kind": "mamba"}]}, "run")


@pytest.mark.parametrize(
    ("overrides", "setting", "tuning"),
    [
        (
            [OTHER],
            "meta-trained on mlp, at use on conv, judged on iris alone",
            "there, on the training datasets: Learning",
        ),
        (
            ["tasks.architectures=[{kind: mlp, hidden: [32]}]"],
            "meta-trained on mlp, at use on mlp (hidden [32]), judged on iris alone",
            "training datasets: Learning rate and L2 strength.",
        ),
        (
            [OTHER, "inner.learning_rate=0.01"],
            "at use on conv",
            "datasets: L2 strength. Given, and not tuned there: Learn",
        ),
        (
            [OTHER, "inner.learning_rate=0.01", "inner.weight_decay=0"],
            "at use on conv",
            "Given, and not tuned there: Learning rate 0.01 and L2 strength 0.",
        ),
    ],
)
def test_the_page_says_what_differs_and_what_was_tuned(overrides, setting, tuning):
    config = parse_config("data: {train: [digits], held_out: [iris]}", "a", overrides)
    rows = [row | {"architecture": config.tasks.architectures[0].kind} for row in rows_of(["iris"], METHODS)]
    transfer = compare_transfer("architecture", config, CARD, rows)
    (page, *_) = [part for part in transfer_page({"architecture": transfer}) if part.startswith("The policy")]
    assert setting in page and tuning in page
    assert ("Tuned anew" in page) == ("Given, and not tuned there: Learning rate 0.01 and" not in page)


@pytest.fixture
def runs(tmp_path):
    """Two folds, and a function that makes an evaluation of the policy of one of them or of another training."""

    def evaluated(name: str, dataset: str, *overrides: str, gain: float = 0.0, **card: Any) -> str:
        rows = [
            row
            | {"architecture": "conv" if OTHER in overrides else "mlp"}
            | {"accuracy": row["accuracy"] + gain * (row["method"] == "policy")}
            for row in rows_of([dataset], METHODS)
        ]
        return judged_run(tmp_path / name, rows, *overrides, card=CARD | card)

    return [evaluated("fold-0", "iris"), evaluated("fold-1", "wine")], evaluated


@pytest.mark.slow
def test_each_kind_has_a_table_and_a_figure(tmp_path, runs):
    folds, evaluated = runs
    longer = [evaluated(f"horizon-{name}", name, "inner.steps=1500", gain=0.05) for name in ("iris", "wine")]
    other = evaluated("architecture", "wine", OTHER, "evaluation.methods=[policy, ce, s5]", gain=0.02, outer_step=40)
    made = make_results([*longer, folds[1], other, folds[0]], tmp_path / "docs")
    head, details = made.record["headline"], made.record["headline_details"]

    def ahead(datasets: list[str]) -> float:
        rows = rows_of(datasets, METHODS)
        accuracy = {name: [row["accuracy"] for row in rows if row["method"] == name] for name in METHODS}
        return 100 * float(np.mean(accuracy["policy"]) - np.mean(accuracy["ce"]))

    assert head["diff_vs_tuned_ce"] == pytest.approx(ahead(["iris", "wine"]), abs=1e-4), "none of these are in it"
    assert head["diff_horizon_transfer"] == pytest.approx(ahead(["iris", "wine"]) + 5, abs=1e-4)
    assert head["diff_architecture_transfer"] == pytest.approx(ahead(["wine"]) + 2, abs=1e-4)
    assert details["diff_horizon_transfer"]["clusters"] == 2
    assert "in runs of 150 steps, at use in runs of 1500" in details["diff_horizon_transfer"]["meaning"]
    assert "meta-trained on mlp, at use on conv" in details["diff_architecture_transfer"]["meaning"]
    assert {kind: each[0]["method"] for kind, each in made.record["transfers"].items()} == {
        "architecture": "ce",
        "horizon": "ce",
    }
    assert [run["transfer"] for run in made.record["runs"]] == [None, None, "architecture", "horizon", "horizon"]
    assert head["held_out_designs"] == 3
    page = made.markdown.read_text()
    assert page.index("## Architecture transfer") < page.index("## Horizon transfer") < page.index("## The claims")
    assert [run["trained_apart"] for run in made.record["runs"]] == [False, False, True, False, False]
    assert "| suite (horizon transfer) |" in page
    assert "| suite (architecture transfer, of a policy trained at another time) |" in page
    again = make_results([*folds, other, *longer], tmp_path / "docs")
    assert again.record == made.record, "whatever the order, and no look is counted twice"


def test_transfers_that_do_not_belong_together_are_refused(runs):
    folds, evaluated = runs

    def refused(*others: str) -> str:
        with pytest.raises(RunDirectoryError) as caught:
            read_runs([*folds, *others])
        return str(caught.value)

    longer = evaluated("a", "iris", "inner.steps=1500")
    longest = evaluated("b", "wine", "inner.steps=3000")
    assert "inner.steps: 1500 in " in refused(longer, longest)
    assert "policy.hidden: 16 in " in refused(evaluated("c", "wine", "inner.steps=1500", "policy.hidden=3"))
    assert "iris: is judged by both" in refused(longer, evaluated("d", "iris", "inner.steps=1500"))
    trained = evaluated("e", "iris", "inner.steps=1500", trained_on=["iris"])
    assert "e: its policy was trained on rows of iris" in refused(trained)
    conv = {"architectures": [{"kind": "transformer"}]}
    one, two = evaluated("f", "iris", OTHER), evaluated("g", "wine", OTHER, **conv)
    assert "its policy was trained on other architectures than that of" in refused(one, two)
    with pytest.raises(RunDirectoryError, match="all runs are evaluations of a transfer"):
        read_runs([longer])
