from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from palf_dist.config import PolicyConfig
from palf_dist.policies import policy_spec
from palf_dist.policies.policy_file import CARD, TENSORS, PolicyArtefact, load_policy, policy_bytes, save_policy
from palf_dist.types import PolicyFileError


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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"there is no policy.safetensors in .*; name a folder"):
        load_policy(tmp_path)


def test_tampered_tensors_are_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    path = save_policy(tmp_path, artefact)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(PolicyFileError, match="tensors are not those"):
        load_policy(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "newer than 1.*upgrade palf_dist"),
        ({"format": "other"}, "not a palf_dist policy card"),
        ({"policy": {}}, "do not fit together"),
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
