"""The scripts of examples/, as their first lines say to run them."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from palf_dist.policies.policy_file import save_policy
from tests.adaptive_cases import untrained
from tests.processes import ROOT

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def command(tmp_path: Path, name: str, *runner: str) -> dict[str, Any]:
    """Of the example with the policy that meta-training starts from; what it leaves behind goes to ``tmp_path``."""
    script, policy = ROOT / "examples" / name, save_policy(tmp_path, untrained())
    assert len(script.read_text().splitlines()) <= 40, "short enough to be read before it is run"
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    return {
        "args": [sys.executable, *runner, str(script), str(policy)],
        "env": {**os.environ, **variables, "RAY_DEDUP_LOGS": "0"},
        "cwd": tmp_path,
        "text": True,
    }


def output(tmp_path: Path, name: str, *runner: str, extra: str | None = None) -> str:
    """What it prints; it must be done within two minutes. ``extra``: of this package, that it needs; what that warns
    of is not ours."""
    if extra is not None and importlib.util.find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed: pip install 'palf-dist[{extra}]'")
    ended = subprocess.run(**command(tmp_path, name, *runner), capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert extra is not None or "Warning" not in ended.stderr
    return ended.stdout


def test_a_plain_loop(tmp_path: Path) -> None:
    accuracies = [float(found) for found in re.findall(r"accuracy (\S+)", output(tmp_path, "plain_loop.py"))]
    assert len(accuracies) == 15 and accuracies[0] < 0.85 < accuracies[-1]


def test_two_processes(tmp_path: Path) -> None:
    printed = output(tmp_path, "ddp.py", *TORCHRUN)
    # not by lines: two processes write into one pipe
    first, second = sorted(re.findall(r"rank \d: test accuracy [\d.]+, \{[^}]*\}", printed))
    assert first.replace("rank 0", "rank 1") == second
    assert float(re.findall(r"accuracy ([\d.]+)", first)[0]) > 0.85


def test_noisy_digits(tmp_path: Path) -> None:
    printed = output(tmp_path, "noisy_digits.py")
    (plain, ours), *_ = re.findall(r"mean of 5: cross-entropy (\S+), AdaptiveLoss (\S+)", printed)
    assert len(re.findall("seed ", printed)) == 5
    assert float(ours) > float(plain) + 0.03, printed


def test_lightning_resumes_the_loss_with_the_model(tmp_path: Path) -> None:
    printed = output(tmp_path, "lightning_module.py", extra="lightning")
    first, second = re.findall(r"^epoch (\d+): step (\d+), loss ([\d.]+)$", printed, re.M)
    assert (first[:2], second[:2]) == (("8", "152"), ("15", "285"))
    assert float(second[2]) < float(first[2]) < 1
    saved = torch.load(tmp_path / "lightning.ckpt", weights_only=True)["state_dict"]
    assert saved["criterion._extra_state"]["step"] == 285


def test_the_trainer_of_hugging_face_resumes_the_loss_too(tmp_path: Path) -> None:
    printed = output(tmp_path, "hugging_face.py", extra="transformers")
    first, second = map(float, re.findall(r"^epoch [36]: accuracy ([\d.]+)$", printed, re.M))
    assert min(first, second) > 0.8
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint-960" / "criterion.pt", weights_only=True)
    assert saved["_extra_state"]["step"] == 960 and saved["averages.seen"].sum() == 1280


def test_ray_train_goes_on_without_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Its epochs as its workers report them, by process: those after the kill begin where the others ended."""
    reported: dict[int, list[int]] = {}
    killed = None
    with subprocess.Popen(
        **command(tmp_path, "ray_train.py"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"TrainWorker pid=(\d+).*metrics={'epoch': (\d+)", line):
                worker, epoch = map(int, found.groups())
                reported.setdefault(worker, []).append(epoch)
                if epoch == 2 and killed is None:
                    killed = worker
                    os.kill(killed, signal.SIGKILL)
    assert process.returncode == 0, "".join(said)
    assert len(reported) == 4, "two workers before the kill, two after it"
    before, after = ([*reported.values()][part] for part in (slice(2), slice(2, 4)))
    assert all(epochs[0] == 0 and epochs[-1] in (2, 3) for epochs in before), before
    first = after[0][0]  # not that of the kill: Ray takes a checkpoint in some time after it was reported
    assert 0 < first <= 4 and all(epochs == [*range(first, 8)] for epochs in after), after
    *_, loss = re.findall(r"metrics={'epoch': 7, 'loss': ([^}]+)}", "".join(said))
    assert float(loss) < 0.5, "it has learned"
