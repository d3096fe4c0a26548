"""``palf-dist doctor`` on this machine, with a private Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import SMOKE, Command


def test_what_cannot_be_reached(cli: Command) -> None:
    ended = cli("doctor", "--address", "127.0.0.1:1", "--json")
    assert ended.code == 1
    [finding] = json.loads(ended.out)["findings"]
    assert (finding["check"], finding["status"]) == ("cluster", "problem")
    assert "no Ray head answers at 127.0.0.1:1" in finding["message"]
    assert "none.yaml cannot be read" in cli.refused("doctor", "--config", "none.yaml")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_a_run_directory_that_holds_a_key_goes_nowhere(cli: Command, address: str) -> None:
    message = cli.refused("doctor", "--address", address, "--run-dir", "s3://KEYKEYKEY:canary@bucket/run")
    assert "--run-dir: holds a password or a key" in message and "canary" not in message


@pytest.mark.slow
def test_this_machine(cli: Command) -> None:
    config = cli.folder / "own.yaml"
    config.write_text(Path(SMOKE).read_text() + "tracking: {uri: 'http://127.0.0.1:1'}\n")
    ended = cli("doctor", "--run-dir", "runs/new", "--config", str(config), "--json")
    assert ended.code == 0, ended
    found = {finding["check"]: finding for finding in json.loads(ended.out)["findings"]}
    assert found["authentication"]["message"] == "token on every node"
    assert found["mlflow"]["status"] == "warning" and "127.0.0.1:1" in found["mlflow"]["message"]
    assert found["storage"]["status"] == "ok" and not (cli.folder / "runs").exists()
