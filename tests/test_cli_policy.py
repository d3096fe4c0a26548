"""``palf-dist policy show|export|compare``; ``register`` has its server in test_model_registry.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palf_dist.config import RunConfig, TrackingConfig
from palf_dist.config_loading import load_config
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.policy_card import described, policy_place
from palf_dist.evaluation.policy_comparison import States, compare_behaviour, states_for
from palf_dist.evaluation.table import to_records
from palf_dist.policies.policy_file import CARD, TENSORS, load_policy, policy_bytes, save_policy
from palf_dist.run_directory import BEST
from palf_dist.types import DEFAULT_HYPERPARAMETERS
from tests.adaptive_cases import artefact, untrained
from tests.command import Command
from tests.evaluation.judged import judged_run, rows_of

ROWS = rows_of(("fashion_mnist", "iris"))


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A judged run, with recorded states."""
    return judged_run(tmp_path / "run", ROWS, "tracking.enabled=false", trajectories=3)


def test_the_card_gets_what_the_run_measured(run: str) -> None:
    card = described(run).card
    (own,) = [record for record in to_records(held_out(ROWS)[0]) if record["method"] == "policy"]
    assert {name: card["figures"]["policy"][name] for name in ("diff_vs_ce", "se", "ci95", "by_dataset")} == {
        name: own[name] for name in ("diff_vs_ce", "se", "ci95", "by_dataset")
    }
    whole = load_config(Path(run, "config.yaml"))
    assert RunConfig.model_validate(card["config"]) == whole.model_copy(update={"tracking": TrackingConfig()})
    assert "tracking" not in card["config"], "where it was tracked is nobody's business"
    assert card["protocol"]["datasets"] == ["fashion_mnist", "iris"]
    assert set(card["digests"]) == {TENSORS, "results.parquet"} and set(card["versions"]) >= {"torch", "python"}
    assert card["trained_on"] == load_policy(policy_place(run)).card["trained_on"], "what it had stays"


def test_each_way_to_name_it_gives_the_same_card(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy_bytes(described(run))
    for place in (f"{run}/best", f"{run}/best/", f"{run}/best/{TENSORS}", f"file://{run}"):
        assert policy_bytes(described(place)) == whole
    monkeypatch.chdir(Path(run, "best"))
    assert policy_bytes(described(".")) == whole


def test_without_a_run_the_card_stays_as_it_is(run: str, tmp_path: Path) -> None:
    alone = save_policy(tmp_path / "alone", untrained())
    assert described(str(alone)).card == {}
    Path(run, "results.parquet").unlink()
    assert "figures" not in described(run).card and "config" in described(run).card


def test_a_run_that_only_evaluated_it_does_not_say_how_it_was_trained(run: str, tmp_path: Path) -> None:
    """Such as ``evaluate --run-dir`` keeps, of another configuration: that is not the one it was trained by."""
    trained = described(run)
    kept = Path(judged_run(tmp_path / "kept", rows_of(("iris", "wine")), "inner.steps=77"))
    for path in kept.glob("metrics.*"):
        path.unlink()
    for kept_policy, config in ((load_policy(policy_place(run)), None), (trained, trained.card["config"])):
        save_policy(kept / BEST, kept_policy)
        card = described(str(kept)).card
        assert card.get("config") == config and ("command" in card) == (config is not None)
        assert card["protocol"]["datasets"] == ["iris", "wine"] and card["protocol"]["inner_steps"] == 77


def test_show_says_and_draws_it(cli: Command, run: str) -> None:
    ended = cli("policy", "show", run, "--plots", "pictures")
    assert ended.code == 0
    for said in ("robust_ce", "over tuned CE", "2 datasets, ", "what moves most", "pictures/mixture_weights.png"):
        assert said in ended.out
    for name in ("mixture_weights", "hyperparameters"):
        assert Path("pictures", f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(cli("policy", "show", run, "--json").out)
    assert record["card"] == described(run).card and record["pictures"] == []
    time = record["explanation"]["features"]["time"]
    assert len(time["values"]) == len(time["controls"]["e"]) == 21


def test_what_reads_no_state_has_no_picture(cli: Command) -> None:
    save_policy("constant", untrained(kind="constant"))
    ended = cli("policy", "show", "constant", "--plots", "pictures")
    assert ended.code == 0 and "plot " not in ended.out and not list(Path("pictures").iterdir())


def test_export_writes_the_whole_card_and_nothing_over_another_policy(cli: Command, run: str) -> None:
    record = json.loads(cli("policy", "export", run, "out", "--json").out)
    assert policy_bytes(load_policy("out")) == policy_bytes(described(run))
    assert json.loads(Path("out", CARD).read_text())["sha256"] == record["sha256"]
    for name in (CARD, TENSORS):
        assert "out: holds a policy already" in cli.refused("policy", "export", "default", "out")
        Path("out", name).unlink()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("export", "default", "file"), "file: cannot be written to"),
        (("show", "default", "--plots", "file"), "file: cannot be written to"),
        (("export", "default", "s3://bucket/policy"), "s3://bucket/policy: is a URI"),
    ],
)
def test_a_folder_that_is_none_is_refused(command: tuple[str, ...], reason: str, cli: Command) -> None:
    Path("file").write_text("in the way")
    assert reason in cli.refused("policy", *command)
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize(
    "command", [("show",), ("export", "to"), ("compare", "default"), ("register", "--name", "palf")]
)
def test_a_policy_that_was_changed_is_refused_by_every_command(command: tuple[str, ...], cli: Command) -> None:
    save_policy("changed", untrained())
    card = json.loads(Path("changed", CARD).read_text())
    Path("changed", CARD).write_text(json.dumps(card | {"card": {"figures": "better"}}))
    complaint = cli.refused("policy", command[0], "changed", *command[1:])
    assert "not as they were saved together" in complaint and not Path("to").exists()


def test_compare_takes_the_recorded_states_of_a_run(cli: Command, run: str) -> None:
    save_policy("other", artefact())
    ended = cli("policy", "compare", "other", run)
    assert ended.code == 0 and "inner runs of the last outer steps of" in ended.out and "largest change" in ended.out
    record = json.loads(cli("policy", "compare", run, run, "--json").out)
    assert {value for each in record["controls"].values() for name, value in each.items() if "change" in name} == {0}


def test_how_far_two_policies_differ_is_known() -> None:
    """Policies that say the same everywhere, of different kinds."""
    first, second = untrained(kind="constant"), untrained(kind="constant", start={"wd": 3.0}, hyperparameters=("wd",))
    grid = states_for(["nowhere", "nowhere"], [first, second])
    assert grid.features == () and "0 features" in grid.origin
    found = compare_behaviour(first, second, grid)
    change = dict(zip(found.controls, found.largest_change, strict=True))
    assert change.pop("wd") == pytest.approx(3.0 - DEFAULT_HYPERPARAMETERS["wd"])
    assert max(change.values()) == pytest.approx(0, abs=1e-6)


def test_policies_that_read_different_features_meet_in_the_states_of_both() -> None:
    first, second = artefact(kind="schedule"), artefact(kind="informed")
    grid = states_for(["nowhere", "nowhere"], [first, second])
    assert set(grid.features) == {*first.spec.features, *second.spec.features}
    found = compare_behaviour(first, second, grid)
    assert set(found.controls) == {*second.spec.basis, *second.spec.hyperparameters}
    assert (found.largest_change >= found.mean_change).all() and found.mean_change.min() > 0
    lam = found.controls.index("lam")
    assert found.means[0, lam] == pytest.approx(DEFAULT_HYPERPARAMETERS["lam"]), "the schedule does not set it"


def test_a_feature_that_was_not_recorded_is_at_its_usual_value() -> None:
    """The other's own states, but for the one that is left out."""
    policy = artefact()
    usual = np.array(policy.mean, float)
    states = np.tile(usual, (3, 4, 1))
    states[:, :, 0] = 0.25
    whole = States(policy.spec.features, states, "")
    changed = replace(policy, phi=policy.phi * 2)
    without = States(policy.spec.features[:-1], states[:, :, :-1], "")
    assert np.allclose(
        compare_behaviour(policy, changed, whole).means, compare_behaviour(policy, changed, without).means
    )


def test_a_card_of_another_program_is_refused_not_guessed_at(cli: Command) -> None:
    save_policy("foreign", replace(untrained(), card={"figures": "good"}))
    assert "the card is not one that this palf_dist writes" in cli.refused("policy", "show", "foreign")
