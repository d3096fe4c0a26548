from __future__ import annotations

from pathlib import Path

import pytest

from palf_dist.config import RunConfig
from palf_dist.config_loading import parse_config
from palf_dist.errors import ConfigError
from palf_dist.redaction import has_credentials, redact

SECRET = "canary-4711/+x"

WITH = (
    f"s3://AKIA123:{SECRET}@bucket/folder",
    "http://me:canary@host:5000",
    "https://canary@host/path",
    "postgresql://me:can@ary@host:5432/db",
    "postgresql+psycopg2://host/db?user=me&password=canary",
    "abfs://:canary@account.blob.core.windows.net/container",
    "https://account.blob.core.windows.net/c/x.parquet?sv=1&sig=canary&se=2",
    "s3://bucket/x?secret_key=canary",
    "http://me:12345@host",
)
WITHOUT = (
    "sqlite:///mlflow.db",
    "http://127.0.0.1:5000",
    "http://[::1]:5000/x",
    "http://host:5000/a@b",
    "s3://bucket/a@b.parquet?region=eu-1&endpoint_override=http%3A%2F%2Fhost:9000",
    "hf://datasets/me/name@refs/convert/parquet",
    "abfs://container@account.dfs.core.windows.net/x",
    "databricks://scope:prefix",
    "runs/token=1",
    "a user: me@example.org",
)


@pytest.mark.parametrize("text", WITH)
def test_credentials_are_found_and_hidden(text: str) -> None:
    assert has_credentials(text)
    hidden = redact(f"cannot open '{text}': 403")
    assert "canary" not in hidden and "me:" not in hidden and "AKIA" not in hidden and "12345" not in hidden
    assert hidden.endswith("': 403") and text.partition("://")[0] in hidden


@pytest.mark.parametrize("text", WITHOUT)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert not has_credentials(text) and redact(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = (
        *("RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"),
        *("AWS_SESSION_TOKEN", "PGPASSWORD", "MYSQL_PWD", "AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
    )
    for name in secret:
        monkeypatch.setenv(name, f"canary-of-{name}")
    monkeypatch.setenv("ANOTHER_TOKEN", "canary-of-HF_TOKEN-and-more")
    text = " ".join(f"canary-of-{name}" for name in (*secret, "HF_TOKEN-and-more"))
    assert redact(text) == " ".join(["***"] * (len(secret) + 1))
    for name, value in {"PWD": "/home/me/canary", "RAY_AUTH_TOKEN_PATH": "/etc/canary", "API_KEY": "word"}.items():
        monkeypatch.setenv(name, value)
        assert redact(f"so {value} it is") == f"so {value} it is"


def test_the_token_in_rays_file_is_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert redact("canary-of-home canary-of-path") == "canary-of-home canary-of-path"
    for name, content in ((".ray/auth_token", b"canary-of-home\n"), ("token", b"canary-of-path"), ("torn", b"\xff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert redact("canary-of-home canary-of-path") == "*** canary-of-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert redact("canary-of-home canary-of-path") == "canary-of-home ***"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "torn"))
    assert redact("canary-of-path") == "canary-of-path"


DATA = {"train": [{"name": "a"}], "held_out": [{"name": "b"}]}


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("tracking.uri", {"data": DATA, "tracking": {"uri": WITH[1]}}),
        ("data.train.0.path", {"data": {**DATA, "train": [{"name": "a", "path": WITH[0]}]}}),
        ("data.train.0", {"data": {**DATA, "train": [WITH[0]]}}),
        ("data.cache", {"data": {**DATA, "cache": WITH[7]}}),
        ("data.train", {"data": {**DATA, "train": WITH[0]}}),
        ("tracking.experiment", {"data": DATA, "tracking": {"experiment": [WITH[0]]}}),
        ("traking", {"data": DATA, "traking": WITH[0]}),
    ],
)
def test_no_configuration_holds_them(field: str, sections: dict[str, object]) -> None:
    import yaml

    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(sections), "run.yaml")
    assert str(caught.value).startswith(f"run.yaml: {field}: ")
    with pytest.raises(ValueError) as raw:
        RunConfig.model_validate(sections)
    for error in (caught, raw):
        assert "canary" not in str(error.value) and "AKIA" not in str(error.value)


@pytest.mark.parametrize("override", [f"tracking.uri={WITH[1]}", f"data.train.nine={WITH[0]}", WITH[4], f"x={WITH[0]}"])
def test_no_override_is_repeated_with_them(override: str) -> None:
    import yaml

    with pytest.raises(ConfigError, match="--set") as caught:
        parse_config(yaml.safe_dump({"data": DATA}), "run.yaml", [override])
    assert "canary" not in str(caught.value) and "AKIA" not in str(caught.value)
