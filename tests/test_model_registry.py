"""Policies in the model registry of a real MLflow server that asks for a user and a password."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palf_dist import AdaptiveLoss
from palf_dist.errors import PolicyFileError, RegistryError
from palf_dist.evaluation.policy_card import described, register_policy
from palf_dist.model_registry import FOLDER, Version, fetch, publish
from palf_dist.policies.policy_file import CARD, TENSORS, PolicyArtefact, digest, load_policy, policy_bytes
from tests.adaptive_cases import artefact
from tests.command import Command
from tests.evaluation.judged import judged_run, rows_of
from tests.pages import ROOT, blocks
from tests.test_tracking import client
from tests.tracking_server import Server

USER, PASSWORD = "admin", "a-password-of-your-own"  # of the page
on_server = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As docs/policies.md starts it, on a free port."""
    folder = tmp_path_factory.mktemp("registry")
    page = {block.info: block for block in blocks([ROOT / "docs/policies.md"])}
    (folder / "auth.ini").write_text(page["ini"].text)
    commands = [*page["sh server"].commands()]
    variables = dict(words[1].split("=", 1) for words in commands if words[0] == "export")
    (options,) = (words[2:] for words in commands if words[0] == "mlflow")
    server = Server(folder, *options, variables=variables)
    server.start()
    yield server
    if server.process is not None:
        server.kill()


@pytest.fixture
def as_admin(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, in the environment of somebody who may write there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return server


def other(policy: PolicyArtefact) -> PolicyArtefact:
    return replace(policy, phi=policy.phi + np.float32(0.1))


def stored(server: Server, version: Version) -> Path:
    """Where the server keeps the files of a version."""
    run_id = version.source.split("/")[1]
    (folder,) = (server.folder / "artifacts").glob(f"*/{run_id}/artifacts/{FOLDER}")
    return folder


class TestOnAServer:
    pytestmark = on_server

    def test_round_trip(self, as_admin: Server, tmp_path: Path, cli: Command) -> None:
        """From a run to the registry, and from there into a loop, a folder and a comparison."""
        run = judged_run(tmp_path / "run", rows_of(("fashion_mnist", "iris")))
        ended = cli("policy", "register", run, "--name", "palf", "--alias", "champion", "--json")
        made = json.loads(ended.out)
        assert made["address"] == "models:/palf@champion" and made["version"] == "1" and made["new"]

        whole = described(run)
        criterion = AdaptiveLoss.load("models:/palf@champion", total_steps=100)
        assert np.array_equal(criterion.phi.numpy(), whole.phi)
        assert policy_bytes(load_policy("models:/palf@champion")) == policy_bytes(whole)
        assert load_policy("models:/palf/latest").card["figures"] == whole.card["figures"]
        found = client(as_admin.uri).get_model_version("palf", "1")
        logged = client(as_admin.uri).get_run(found.run_id)
        own = whole.card["figures"]["policy"]
        assert logged.data.metrics == {name: own[name] for name in ("accuracy", "diff_vs_ce", "se")}
        assert logged.info.status == "FINISHED" and "over tuned CE" in found.description

        again = json.loads(cli("policy", "register", run, "--name", "palf", "--alias", "stable", "--json").out)
        assert not again["new"] and again["version"] == "1", "the same policy is registered once"
        assert cli("policy", "export", "models:/palf@stable", "out").code == 0
        assert policy_bytes(load_policy("out")) == policy_bytes(whole)

        version, new = register_policy(other(whole), "palf", "champion")
        assert new and version.address == "models:/palf/2"
        assert np.array_equal(load_policy("models:/palf@champion").phi, other(whole).phi), "the alias moved"
        assert np.array_equal(load_policy("models:/palf/1").phi, whole.phi)
        compared = json.loads(cli("policy", "compare", "models:/palf@champion", "models:/palf/1", "--json").out)
        assert "grid" in compared["states"] and compared["controls"]["e"]["largest_change"] > 0
        assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "what is downloaded does not stay here"

    def test_without_the_password(self, as_admin: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        register_policy(artefact(), "closed", "champion")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password-of-it")
        with pytest.raises(RegistryError, match=r"says: .*(authenticated|401).*MLFLOW_TRACKING_PASSWORD") as wrong:
            load_policy("models:/closed@champion")
        assert "not-the-password-of-it" not in str(wrong.value)
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
        for attempt in (lambda: load_policy("models:/closed/1"), lambda: register_policy(artefact(), "open")):
            with pytest.raises(RegistryError, match=r"authenticated|401"):
                attempt()

    def test_what_is_not_what_was_registered_is_refused(self, as_admin: Server, tmp_path: Path) -> None:
        policy = artefact()
        version, _ = register_policy(policy, "changed")
        tensors, card = stored(as_admin, version) / TENSORS, stored(as_admin, version) / CARD
        saved = tensors.read_bytes(), card.read_bytes()

        changed = bytearray(saved[0])
        changed[-1] ^= 1
        tensors.write_bytes(changed)
        with pytest.raises(PolicyFileError, match=r"models:/changed/1: .* not as they were saved together"):
            load_policy("models:/changed/1")

        for path, content in zip((tensors, card), policy_bytes(other(policy)), strict=True):
            path.write_bytes(content)
        with pytest.raises(PolicyFileError, match=r"another policy than .* registered; register it again"):
            load_policy("models:/changed/latest")
        again, new = register_policy(policy, "changed", "champion")
        assert new and again.version == "2", "its digest alone says that it is there"
        assert policy_bytes(load_policy("models:/changed@champion")) == saved
        assert register_policy(policy, "changed") == (again, False)

        newer = json.loads(saved[1]) | {"format_version": 99}
        card.write_text(json.dumps(newer | {"sha256": digest(saved[0], newer)}))
        with pytest.raises(PolicyFileError, match=r"format_version 99 is newer .* upgrade palf_dist"):
            load_policy("models:/changed/1")

        card.unlink()
        with pytest.raises(RegistryError, match=f"models:/changed/1: {CARD} cannot be had"):
            load_policy("models:/changed/1")

    def test_what_is_not_there_is_named(self, as_admin: Server) -> None:
        register_policy(artefact(), "known")
        for address, reason in (
            ("models:/unknown@champion", "unknown"),
            ("models:/known@nobody", "nobody"),
            ("models:/known/12", "version=12"),
            ("models:/unknown/latest", "no version of unknown"),
        ):
            with pytest.raises(RegistryError, match=reason):
                load_policy(address)

    def test_an_upload_that_fails_leaves_no_version(
        self, as_admin: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server's artifacts cannot be written; then they can, and the same call works."""
        artifacts = as_admin.folder / "artifacts"
        moved = shutil.move(artifacts, as_admin.folder / "moved")
        artifacts.write_text("in the way")
        with pytest.raises(RegistryError, match="models:/late: the registry at http"):
            register_policy(artefact(), "late")
        artifacts.unlink()
        shutil.move(moved, artifacts)
        assert not client(as_admin.uri).search_model_versions("name='late'")
        version, new = register_policy(artefact(), "late")
        assert new and version.version == "1"

    def test_a_server_that_is_gone(self, as_admin: Server) -> None:
        as_admin.kill()
        try:
            with pytest.raises(RegistryError, match="models:/palf@champion: the registry at http"):
                load_policy("models:/palf@champion")
        finally:
            as_admin.start()


@pytest.mark.parametrize(
    "address", ["models:/palf", "models:palf@champion", "models:/", "models:/a/b/c", "models:/palf@", "models:/palf/v1"]
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(RegistryError, match=r"write models:/NAME@ALIAS or models:/NAME/VERSION"):
        load_policy(address)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_made_where_there_is_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(RegistryError, match=r"none.db does not exist; name the MLflow server"):
        fetch("models:/palf@champion", ["policy.json"])
    assert not list(tmp_path.iterdir())


def test_credentials_do_not_belong_into_the_address(cli: Command) -> None:
    complaint = cli.refused("policy", "show", "models:/palf/1", "--tracking-uri", "https://me:secret12@example.org")
    assert "MLFLOW_TRACKING_USERNAME" in complaint and "secret12" not in complaint


@pytest.mark.parametrize("name", ["", "a/b", "palf@champion", "c:", "..", "it's"])
def test_a_name_that_addresses_cannot_have(name: str) -> None:
    with pytest.raises(RegistryError, match=r"--name .*: a name of letters, digits, _ - and \. is needed"):
        publish(name, {}, "", experiment="e", metrics={}, description="")


@pytest.mark.parametrize("alias", ["", "latest", "V2", "a/b", "the best"])
def test_an_alias_that_mlflow_refuses_registers_nothing(alias: str, cli: Command) -> None:
    complaint = cli.refused("policy", "register", "default", "--name", "palf", "--alias", alias)
    assert f"--alias {alias}: an alias of letters" in complaint and not cli.files()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_any_address_it_is_the_database_of_the_working_folder(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where MLflow would take the old file store that lies there, and not where runs are tracked; and the same
    database from another folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = Path("mlruns", "0", "meta.yaml")
    old.parent.mkdir(parents=True)
    old.write_text("experiment_id: '0'\nname: Default\n")
    assert cli("policy", "register", "default", "--name", "palf", "--alias", "champion").code == 0
    assert Path("mlflow.db").is_file()
    assert load_policy("models:/palf@champion").card == load_policy("default").card
    database = f"sqlite:///{Path('mlflow.db').absolute()}"
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert cli("policy", "export", "models:/palf/1", "out", "--tracking-uri", database).code == 0
    assert policy_bytes(load_policy("out")) == policy_bytes(load_policy("default"))
    assert [path.name for path in Path().iterdir()] == ["out"]
