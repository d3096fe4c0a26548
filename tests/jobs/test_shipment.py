from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from palf_dist import cli_jobs
from palf_dist.config_loading import load_config
from palf_dist.errors import ConfigError, DataError, RunDirectoryError
from palf_dist.jobs import shipment
from palf_dist.jobs.shipment import Packer, Shipment
from palf_dist.policies.policy_file import load_policy, save_policy
from palf_dist.search.config import load_search_config
from palf_dist.tasks.suites import load_suite, suite_overrides
from tests.adaptive_cases import untrained
from tests.command import SMOKE, Command
from tests.test_cli_results import SUITE

DIGITS = str(Path(SMOKE).parent / "tune-digits.yaml")


@pytest.fixture
def packer(tmp_path: Path) -> Packer:
    (tmp_path / "shipped").mkdir()
    return Packer(tmp_path / "shipped")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"x": np.arange(200) / 7, "label": np.arange(200) % 2}), path)
    return path


def shipped(packer: Packer) -> list[str]:
    return sorted(str(path.relative_to(packer.folder)) for path in packer.folder.rglob("*") if path.is_file())


def test_the_resolved_configuration_goes_along_and_is_all_that_the_command_line_names(packer: Packer) -> None:
    config = load_config(SMOKE, ["inner.steps=18", "distributed.address=10.0.0.1:6379", "tracking.uri=http://ml:5000"])
    made = packer.meta_train(config, "s3://bucket/run", None, as_json=True)
    words = shlex.split(made.entrypoint("0.1.0", 2))
    assert words[:3] == ["python", "-m", "palf_dist.jobs"]
    assert words[3:7] == ["--for-version", "0.1.0", "--max-restarts", "2"]
    assert words[7:] == ["meta-train", "--config", "config.yaml", "--run-dir", "s3://bucket/run", "--json"]
    assert shipped(packer) == ["config.yaml"] and made.notes == ()
    sent = load_config(packer.folder / "config.yaml")
    assert sent.distributed.address == "auto"
    changed = sent.distributed.model_copy(update={"address": "10.0.0.1:6379"})
    assert sent.model_copy(update={"distributed": changed}) == config


@pytest.mark.parametrize("form", ["mine.parquet", "{folder}/mine.parquet", "mine*.parquet"])
def test_small_files_go_along_under_a_path_that_does_not_change(packer: Packer, table: Path, form: str) -> None:
    path = form.format(folder=table.parent)
    config = load_config(SMOKE, [f"data.train=[wine, {{name: mine, path: '{path}'}}]"])
    packer.meta_train(config, "s3://bucket/run", None, as_json=False)
    assert shipped(packer) == ["config.yaml", "data/mine/00000.parquet"]
    assert (packer.folder / "data/mine/00000.parquet").read_bytes() == table.read_bytes()
    assert load_config(packer.folder / "config.yaml").data.train[1].path == "data/mine"


def test_large_files_do_not(packer: Packer, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipment, "MOST_BYTES", 1000)
    relative = load_config(SMOKE, ["data.train=[wine, {name: mine, path: mine.parquet}]"])
    with pytest.raises(DataError, match=r"data.train.1.path: mine.parquet has 0 MiB.* put it where the"):
        packer.meta_train(relative, "s3://bucket/run", None, as_json=False)
    absolute = load_config(SMOKE, [f"data.train=[wine, {{name: mine, path: {table}}}]"])
    made = packer.meta_train(absolute, "s3://bucket/run", None, as_json=False)
    assert [note for note in made.notes if f"{table} is not sent; every node must have it" in note]
    assert shipped(packer) == ["config.yaml"]


def test_files_that_are_nowhere(packer: Packer, table: Path) -> None:
    missing = load_config(SMOKE, ["data.train=[wine, {name: mine, path: none.parquet}]"])
    with pytest.raises(DataError, match=r"none.parquet: no such file"):
        packer.meta_train(missing, "s3://bucket/run", None, as_json=False)
    elsewhere = load_config(SMOKE, ["data.train=[wine, {name: mine, path: /only/there.parquet}]"])
    made = packer.meta_train(elsewhere, "s3://bucket/run", None, as_json=False)
    assert [note for note in made.notes if "/only/there.parquet is not sent" in note]


def test_names_that_look_alike_as_folders(packer: Packer, table: Path) -> None:
    both = [{"name": name, "path": "mine.parquet"} for name in ("a/b", "a_b")]
    packer.meta_train(load_config(SMOKE, [f"data.train={both}"]), "s3://bucket/run", None, as_json=False)
    assert shipped(packer) == ["config.yaml", "data/a_b/00000.parquet", "data/a_b_/00000.parquet"]
    sent = load_config(packer.folder / "config.yaml").data.train
    assert [source.path for source in sent] == ["data/a_b", "data/a_b_"]


def test_a_module_of_the_users_is_told_to_stay(packer: Packer) -> None:
    config = load_config(SMOKE, ["tasks.architectures=[{kind: mlp}, {kind: module, factory: 'mymodels:net'}]"])
    made = packer.meta_train(config, "s3://bucket/run", None, as_json=False)
    [note] = [note for note in made.notes if "factory" in note]
    assert note.startswith("tasks.architectures.1.factory: mymodels is not sent; install it on every node")


@pytest.mark.parametrize(
    ("run_dir", "resume", "message"),
    [
        (None, None, "--run-dir: name where the run is kept"),
        ("runs/mine", None, "--run-dir runs/mine: a relative path means nothing on a cluster"),
        (None, "runs/mine", "--resume runs/mine: a relative path means nothing"),
        ("/a", "/b", "leave --run-dir out"),
        ("s3://KEYKEYKEY:abc@bucket/run", None, "--run-dir: holds a password or a key"),
        ("s3://bucket/run?secret_key=abc", None, "--run-dir: holds a password or a key"),
    ],
)
def test_run_directories_that_a_cluster_cannot_use(
    packer: Packer, run_dir: str | None, resume: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        packer.meta_train(load_config(SMOKE), run_dir, resume, as_json=False)
    assert message in str(refused.value) and "abc" not in str(refused.value)


def test_a_path_is_told_to_be_one_of_the_cluster(packer: Packer) -> None:
    made = packer.meta_train(None, None, "/shared/run", as_json=False)
    assert made.arguments == ("--resume", "/shared/run") and shipped(packer) == []
    assert [note for note in made.notes if "unless it is a folder that the nodes share, the run is lost" in note]


def test_a_search_has_its_own_cache_on_the_cluster(packer: Packer) -> None:
    made = packer.tune(load_search_config(DIGITS), "/shared/run", None, "10m", as_json=False)
    assert made.arguments == ("--config", "config.yaml", "--run-dir", "/shared/run", "--time-budget", "10m")
    text = (packer.folder / "config.yaml").read_text()
    assert "cache: null" in text and "address: auto" in text
    with pytest.raises(RunDirectoryError, match="only meta-train, evaluate and report work on a URI"):
        packer.tune(load_search_config(DIGITS), "s3://bucket/run", None, None, as_json=False)


def test_a_policy_goes_along(packer: Packer, tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_policy(best, untrained())
    (best / "notes.txt").write_text("no part of it")
    made = packer.evaluate(load_config(SMOKE), load_policy(best), None, None, as_json=False)
    assert made.arguments == ("policy", "--config", "config.yaml") and not made.resumable
    assert shipped(packer) == ["config.yaml", "policy/policy.json", "policy/policy.safetensors"]
    shutil.rmtree(packer.folder)
    packer.folder.mkdir()
    kept = packer.evaluate(
        load_config(SMOKE), load_policy(best / "policy.safetensors"), "s3://bucket/kept", None, as_json=False
    )
    assert kept.arguments[-2:] == ("--run-dir", "s3://bucket/kept") and kept.resumable
    for name in ("policy.safetensors", "policy.json"):
        assert (packer.folder / "policy" / name).read_bytes() == (best / name).read_bytes()
    packer.evaluate(load_config(SMOKE), load_policy("default"), None, None, as_json=False)
    assert load_policy(packer.folder / "policy").card["run"] == "palf12", "no name of something that stays here"
    resumed = packer.evaluate(None, None, None, "s3://bucket/kept", as_json=True)
    assert resumed.arguments == ("--resume", "s3://bucket/kept", "--json") and resumed.resumable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "x"), "submit report: meta-train, tune, evaluate can be submitted"),
        (("meta-train",), "--config: name the YAML file of the run"),
        (("meta-train", "--config", SMOKE, "--set", "inner.stepz=3"), "inner.stepz: unknown key"),
        (("meta-train", "--config", SMOKE, "--address", "auto"), "--address auto: goes before meta-train"),
        (("tune", "--config", SMOKE), "target: is required"),
        (("evaluate", "nowhere"), "there is no policy.safetensors"),
        (
            ("evaluate", "--resume", "s3://bucket/kept", "--workers", "3"),
            "give --config too, or leave out what changes it",
        ),
        (
            ("meta-train", "--resume", "s3://bucket/run", "--set", "seed=3"),
            "s3://bucket/run: its configuration is read on",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(cli: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in cli.refused("submit", "--address", "http://127.0.0.1:1", "--", *arguments)
    assert cli.files() == {}


def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Shipment, str]]:
    """What would be sent, with the text of its configuration, and no cluster."""
    found: list[tuple[Shipment, str]] = []

    def noted(client: object, job: Shipment, folder: str, max_restarts: int) -> str:
        found.append((job, (Path(folder) / "config.yaml").read_text()))
        return "palf-job"

    monkeypatch.setattr(cli_jobs, "_send", noted)
    monkeypatch.setattr(cli_jobs, "_client", lambda address: SimpleNamespace(address="http://127.0.0.1:1"))
    monkeypatch.setattr(cli_jobs, "_begin", lambda client, job_id: "RUNNING")
    return found


def test_an_evaluation_is_sent_with_its_suite_and_whether_it_is_quick(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(SUITE))
    save_policy(Path("best"), untrained())
    made = sent(monkeypatch)
    suite = ("--config", SMOKE, "--suite", "own.yaml", "--fold", "1")
    for command in (("evaluate", "best", *suite, "--quick"), ("meta-train", *suite, "--run-dir", "s3://bucket/run")):
        ended = cli("submit", "--", *command)
        assert ended.code == 0, ended.err
        assert ("resume  submit the same command again" in ended.out) == (command[0] == "meta-train")
    held_out = [
        source.name for source in load_config(SMOKE, suite_overrides(load_suite("own.yaml"), "1")).data.held_out
    ]
    for job, text in made:
        data = yaml.safe_load(text)
        assert [each["name"] for each in data["data"]["held_out"]] == held_out
        assert len(data["evaluation"]["suite_conditions"]) == len(SUITE["conditions"])
        assert ("--quick" in job.arguments) == (job.command == "evaluate")
    ended = cli("submit", "--", "evaluate", "best", *suite, "--run-dir", "s3://bucket/kept")
    assert ended.code == 0 and "resume  submit the same command again" in ended.out
    message = cli.refused("submit", "--", "evaluate", "best", *suite, "--quick", "--run-dir", "s3://bucket/kept")
    assert "--quick gives no results to keep" in message and len(made) == 3
    assert "--suite and --fold go together" in cli.refused("submit", "--", "evaluate", "best", "--fold", "1")
    assert "POLICY: name the policy to evaluate" in cli.refused("submit", "--", "evaluate", "--run-dir", "s3://b/kept")


def test_options_of_the_command_are_its_own(cli: Command) -> None:
    ended = cli("submit", "meta-train", "--nonsense")
    assert ended.code == 2 and "No such option: --nonsense" in ended.err
