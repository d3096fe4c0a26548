"""The scripts of examples/, as their first lines say to run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from palf_dist.policies.policy_file import save_policy
from tests.adaptive_cases import untrained
from tests.processes import ROOT

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def output(tmp_path: Path, name: str, *runner: str) -> str:
    """What the example prints with the policy that meta-training starts from; it must be done within two minutes."""
    script, policy = ROOT / "examples" / name, save_policy(tmp_path, untrained())
    assert len(script.read_text().splitlines()) <= 40, "short enough to be read before it is run"
    ended = subprocess.run(
        [sys.executable, *runner, str(script), str(policy)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr
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
