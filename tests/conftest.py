"""What every test shares: one thread, a private MLflow store, and hypothesis without files or time limits."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from tests.command import Command
from tests.processes import spawn

__all__ = ["spawn"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a shell starts it in the background; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile("palf", deadline=None, database=None, derandomize="CI" in os.environ)
settings.load_profile("palf")


@pytest.fixture(autouse=True)
def _private_stores(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the working folder's MLflow store or reads a user's settings."""
    store = tmp_path_factory.getbasetemp() / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.delenv("PALF_FAULTS", raising=False)


@pytest.fixture
def cli(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    monkeypatch.setenv("PALF_CACHE", str(tmp_path_factory.getbasetemp() / "palf_cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return Command(tmp_path, capfd, monkeypatch)
