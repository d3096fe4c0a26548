"""The scripts of examples/, as their first lines say to run them."""

from __future__ import annotations

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
# Warnings are errors, but for those of the libraries' own use of torch: of Lightning, which reads a class that torch is
# to drop, and of a DataLoader that accelerate makes as for a GPU.
LIGHTNING = ["-W", "error", "-W", "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"]
HUGGING_FACE = ["-W", "error", "-W", "ignore:'pin_memory' argument is set as true:UserWarning"]
THREADS = """
from pathlib import Path
print(f"<threads {[path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]}>", flush=True)
"""


def command(tmp_path: Path, name: str | Path, *runner: str) -> dict[str, Any]:
    """Of the example with the policy that meta-training starts from; what it leaves behind goes to ``tmp_path``."""
    script, policy = ROOT / "examples" / name, save_policy(tmp_path, untrained())
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "RAY_ADDRESS": "local"}
    return {
        "args": [sys.executable, *runner, str(script), str(policy)],
        "env": {**os.environ, **variables, "RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1"},
        "cwd": tmp_path,
        "text": True,
    }


def output(tmp_path: Path, name: str | Path, *runner: str) -> str:
    """What it prints; it must be done within five minutes and warn of nothing."""
    ended = subprocess.run(**command(tmp_path, name, *runner), capture_output=True, timeout=300)
    said = f"it ended with {ended.returncode} and printed:\n{ended.stdout}\nand to stderr:\n{ended.stderr}"
    assert ended.returncode == 0 and "Warning" not in ended.stderr, said
    return ended.stdout


def test_they_are_short_enough_to_be_read_before_they_are_run() -> None:
    assert all(len(path.read_text().splitlines()) <= 40 for path in (ROOT / "examples").glob("*.py"))


def test_a_plain_loop(tmp_path: Path) -> None:
    accuracies = [float(found) for found in re.findall(r"accuracy (\S+)", output(tmp_path, "plain_loop.py"))]
    assert len(accuracies) == 15 and accuracies[0] < 0.85 < accuracies[-1]


def test_two_processes(tmp_path: Path) -> None:
    """No thread of the process group is left: one that lets go of a tensor while the interpreter ends aborts it."""
    watched = tmp_path / "ddp_watched.py"
    watched.write_text((ROOT / "examples" / "ddp.py").read_text() + THREADS)
    printed = output(tmp_path, watched, *TORCHRUN)
    # not by lines: two processes write into one pipe
    reports = re.findall(r"rank \d: test accuracy [\d.]+, \{[^}]*\}", printed)
    threads = re.findall("<threads .*?>", printed)
    assert len(reports) == len(threads) == 2 and "gloo" not in str(threads), printed
    first, second = sorted(reports)
    assert first.replace("rank 0", "rank 1") == second
    assert float(re.findall(r"accuracy ([\d.]+)", first)[0]) > 0.85, printed


def test_noisy_digits(tmp_path: Path) -> None:
    printed = output(tmp_path, "noisy_digits.py")
    (plain, ours), *_ = re.findall(r"mean of 5: cross-entropy (\S+), AdaptiveLoss (\S+)", printed)
    assert len(re.findall("seed ", printed)) == 5
    assert float(ours) > float(plain) + 0.03, printed


def test_lightning_resumes_the_loss_with_the_model(tmp_path: Path) -> None:
    printed = output(tmp_path, "lightning_module.py", *LIGHTNING)
    first, second = re.findall(r"^epoch (\d+): step (\d+), accuracy ([\d.]+)$", printed, re.M)
    assert (first[:2], second[:2]) == (("8", "152"), ("15", "285"))
    assert min(float(first[2]), float(second[2])) > 0.85
    saved = torch.load(tmp_path / "lightning.ckpt", weights_only=True)["state_dict"]
    assert saved["criterion._extra_state"]["step"] == 285


def test_the_trainer_of_hugging_face_resumes_the_loss_too(tmp_path: Path) -> None:
    printed = output(tmp_path, "hugging_face.py", *HUGGING_FACE)
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
