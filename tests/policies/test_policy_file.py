from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from palf_dist.config import PolicyConfig, PolicyStart
from palf_dist.errors import PolicyFileError
from palf_dist.policies import make_policy, policy_spec
from palf_dist.policies.policy_file import CARD, TENSORS, PolicyArtefact, digest, load_policy, policy_bytes, save_policy


@pytest.fixture
def artefact() -> PolicyArtefact:
    spec = policy_spec(PolicyConfig())
    size = len(spec.features)
    zero = PolicyArtefact(spec, np.zeros(0, np.float32), np.zeros(size, np.float32), np.ones(size, np.float32))
    count = zero.policy().num_parameters
    phi = np.random.default_rng(0).normal(size=count).astype(np.float32)
    return PolicyArtefact(spec, phi, zero.mean + 0.5, zero.std * 2, {"datasets": ["digits"]})


def test_round_trip_is_exact(artefact: PolicyArtefact, tmp_path: Path) -> None:
    path = save_policy(tmp_path / "best", artefact)
    for name in (path, tmp_path / "best"):
        loaded = load_policy(name)
        assert loaded.spec == artefact.spec and loaded.card == artefact.card
        for field in ("phi", "mean", "std"):
            assert np.array_equal(getattr(loaded, field), getattr(artefact, field))
    assert policy_bytes(loaded) == policy_bytes(artefact) == (path.read_bytes(), path.with_name(CARD).read_bytes())


@pytest.mark.parametrize("kind", get_args(PolicyConfig.model_fields["kind"].annotation))
def test_every_kind_makes_a_round_trip(kind: str, tmp_path: Path) -> None:
    spec = policy_spec(PolicyConfig(kind=kind, hidden=3))
    zero = np.zeros(len(spec.features), np.float32)
    phi = make_policy(spec, zero, zero + 2).initial() + np.float32(0.1)
    save_policy(tmp_path, PolicyArtefact(spec, phi, zero, zero + 2))
    loaded = load_policy(tmp_path)
    assert loaded.spec == spec and np.array_equal(loaded.phi, phi)
    assert type(loaded.policy()) is type(make_policy(spec, zero, zero + 2))
    version = {"robust": 1, "palf": 1, "informed": 4}.get(kind, 3)
    assert json.loads((tmp_path / CARD).read_text())["format_version"] == version


def test_start_is_kept_and_asks_for_the_newer_format(artefact: PolicyArtefact, tmp_path: Path) -> None:
    spec = policy_spec(PolicyConfig(start=PolicyStart(gamma=3, e=0.4)))
    save_policy(tmp_path, replace(artefact, spec=spec))
    card = json.loads((tmp_path / CARD).read_text())
    assert card["format_version"] == 2 and card["policy"]["start"] == {"gamma": 3, "e": 0.4}
    assert load_policy(tmp_path).spec == spec


@pytest.mark.parametrize("start", [PolicyStart(), PolicyStart(gamma=3)])
def test_a_shield_is_kept_and_asks_for_a_newer_format(
    start: PolicyStart, artefact: PolicyArtefact, tmp_path: Path
) -> None:
    """A release that knows no shield must refuse the file: without it the policy is another one."""
    spec = policy_spec(PolicyConfig(shield=0.25, start=start))
    save_policy(tmp_path, replace(artefact, spec=spec))
    card = json.loads((tmp_path / CARD).read_text())
    assert card["format_version"] == 3 and card["policy"]["shield"] == 0.25
    loaded = load_policy(tmp_path)
    assert loaded.spec == spec and loaded.policy().shield == 0.25


@pytest.mark.parametrize(
    "config",
    [
        PolicyConfig(basis=("ce", "generalised_ce", "mae")),
        PolicyConfig(kind="schedule", basis=("elr", "bootstrap"), hyperparameters=("lam", "beta")),
        PolicyConfig(start=PolicyStart(q=0.5), shield=0.5),
    ],
    ids=lambda config: config.kind,
)
def test_later_basis_losses_ask_for_the_newest_format_and_keep_their_names(
    config: PolicyConfig, tmp_path: Path
) -> None:
    spec = policy_spec(config)
    zero = np.zeros(len(spec.features), np.float32)
    phi = make_policy(spec, zero, zero + 1).initial() + np.float32(0.1)
    save_policy(tmp_path, PolicyArtefact(spec, phi, zero, zero + 1))
    card = json.loads((tmp_path / CARD).read_text())
    assert card["format_version"] == 4 and tuple(card["policy"]["basis"]) == spec.basis
    assert load_policy(tmp_path).spec == spec


def test_without_a_start_the_file_is_as_it_was_in_format_1(artefact: PolicyArtefact, tmp_path: Path) -> None:
    save_policy(tmp_path, artefact)
    card = json.loads((tmp_path / CARD).read_text())
    assert card["format_version"] == 1 and not {"start", "shield"} & card["policy"].keys()
    assert load_policy(tmp_path).spec.start == {}


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"there is no policy.safetensors in .*; name a folder"):
        load_policy(tmp_path)


def test_tampered_tensors_are_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    path = save_policy(tmp_path, artefact)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(PolicyFileError, match="not as they were saved together; restore both"):
        load_policy(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer than 4.*upgrade palf_dist"),
        ({"format": "other"}, "not a palf_dist policy card"),
        ({"policy": {"refresh": 1}}, "not as they were saved together"),
        ({"card": {"ema": 0.1}}, "not as they were saved together"),
        ({"sha256": 1}, "not as they were saved together"),
    ],
)
def test_other_cards_are_refused(
    change: dict[str, object], message: str, artefact: PolicyArtefact, tmp_path: Path
) -> None:
    save_policy(tmp_path, artefact)
    card = json.loads((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(json.dumps(card | change))
    with pytest.raises(PolicyFileError, match=message):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": []}, "JSON objects"),
        ({"card": []}, "JSON objects"),
        ({"policy": {}}, "initial_weights"),
        ({"basis": ["ce", "nonsense"]}, "basis.1: Input should be 'ce'"),
        ({"basis": None}, "not a policy that works"),
        ({"features": ["nonsense"]}, "unknown nonsense"),
        ({"features": None}, "not a policy that works"),
        ({"hyperparameters": ["wd", "nonsense"]}, "hyperparameters.1: Input should be 'e'"),
        ({"hyperparameters": None}, "not a policy that works"),
        ({"refresh": 0}, "refresh: .*greater than or equal to 1"),
        ({"refresh": 2.5}, "refresh: .*valid integer"),
        ({"hidden": -1}, "hidden: .*greater than or equal to 1"),
        ({"hidden": 17}, "phi must be .* finite"),
        ({"start": {"e": 0.99}}, "start.e: .*less than 0.95"),
        ({"start": {"alpha": 1.0}}, "start.alpha: Extra inputs"),
        ({"start": None}, "start: "),
        ({"unheard_of": 1}, "unheard_of: Extra inputs"),
        ({"initial_weights": [0.5, 0.4]}, "one share per basis loss with sum 1"),
        ({"initial_weights": [1.5, -0.5]}, "one share per basis loss with sum 1"),
        ({"initial_weights": [1.0]}, "one share per basis loss with sum 1"),
        ({"initial_weights": [float("nan"), 1.0]}, "one share per basis loss with sum 1"),
        ({"initial_weights": ["much", 1.0]}, "not a policy that works"),
    ],
    ids=str,
)
def test_a_card_that_describes_no_policy_is_refused(
    change: dict[str, object], message: str, artefact: PolicyArtefact, tmp_path: Path
) -> None:
    """Also where its digest is right."""
    tensors = save_policy(tmp_path, artefact).read_bytes()
    card = json.loads((tmp_path / CARD).read_text())
    card |= change if change.keys() <= card.keys() else {"policy": card["policy"] | change}
    (tmp_path / CARD).write_text(json.dumps(card | {"sha256": digest(tensors, card)}))
    with pytest.raises(PolicyFileError, match=f"{message}.*restore both files or train anew"):
        load_policy(tmp_path)


def test_statistics_that_are_not_finite_are_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    artefact.std[0] = np.nan
    save_policy(tmp_path, artefact)
    with pytest.raises(PolicyFileError, match=r"feature_std must be .* finite"):
        load_policy(tmp_path)


def test_a_card_that_is_not_json_is_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    save_policy(tmp_path, artefact)
    (tmp_path / CARD).write_text("{")
    with pytest.raises(PolicyFileError, match="not a palf_dist policy card"):
        load_policy(tmp_path / TENSORS)


def test_a_policy_of_another_shape_is_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    spec, phi = artefact.spec, artefact.phi[:-1]
    save_policy(tmp_path, PolicyArtefact(spec, phi, artefact.mean, artefact.std))
    with pytest.raises(PolicyFileError, match="phi must be"):
        load_policy(tmp_path)
