"""Hostile run directories: names and links in them lead nowhere, and nothing that is read is executed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palf_dist.checkpoint import copy_checkpoint, latest_checkpoint, prune, save_checkpoint
from palf_dist.config import DataConfig, DatasetSource
from palf_dist.containment import is_inside, link_out_of
from palf_dist.errors import CheckpointError, DataError, RunDirectoryError
from palf_dist.run_directory import BEST, CHECKPOINTS, CONFIG, REPORT, TRAJECTORIES, open_run_directory
from palf_dist.tasks.datasets import load_dataset
from palf_dist.tracking_delivery import Delivery
from palf_dist.tracking_spool import Spool
from tests.processes import ROOT

ESCAPES = ("../outside", "/etc/hostname", "best/../../outside", "outside-link")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory beside a file and a folder that are none of its business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine.txt").write_text("mine")
    folder = tmp_path / "run"
    (folder / BEST).mkdir(parents=True)
    (folder / CONFIG).write_text("name: run\n")
    return folder


def arrays() -> dict[str, np.ndarray]:
    return {"policy": np.zeros(3, np.float32), "moment": np.zeros(3)}


def rewrite(folder: Path, **content: Any) -> None:
    """Change state.json as somebody does who knows how digests are made."""
    path = folder / "state.json"
    changed = json.loads(path.read_text())["content"] | content
    canonical = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"sha256": hashlib.sha256(canonical).hexdigest(), "content": changed}))


@pytest.mark.parametrize("name", ["../../../outside/mine.txt", "/etc/hostname", "carried.safetensors/..", ".", ""])
def test_checkpoints_name_no_files_but_their_own(run_dir: Path, tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(run_dir, 1, arrays(), {})
    files = json.loads((folder / "state.json").read_text())["content"]["files"]
    rewrite(folder, files={**files, name: hashlib.sha256(b"mine").hexdigest()})
    with pytest.raises(CheckpointError, match="step-000001 was skipped"):
        latest_checkpoint(run_dir)
    with pytest.raises(CheckpointError, match="cannot be used"):
        copy_checkpoint(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("step", ["../../outside", "1", -1, 1.5, True, None, [1]])
def test_steps_of_checkpoints_are_numbers(run_dir: Path, tmp_path: Path, step: Any) -> None:
    folder = save_checkpoint(run_dir, 1, arrays(), {})
    rewrite(folder, step=step)
    with pytest.raises(CheckpointError):
        copy_checkpoint(folder, tmp_path / "other")
    with pytest.raises(CheckpointError):
        latest_checkpoint(run_dir)


@pytest.mark.parametrize("name", [CHECKPOINTS, TRAJECTORIES, REPORT, "tracking", "metrics.parquet", f"{BEST}/deep"])
def test_links_out_of_a_run_are_refused(run_dir: Path, tmp_path: Path, name: str) -> None:
    (run_dir / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RunDirectoryError, match=f"{name} is a link that leads out of"):
        open_run_directory(run_dir)


def test_links_inside_a_run_and_to_a_run_are_fine(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "newest").symlink_to(BEST)
    (tmp_path / "latest").symlink_to(run_dir)
    assert open_run_directory(tmp_path / "latest") == tmp_path / "latest"
    assert link_out_of(tmp_path / "latest") is None


def test_prune_deletes_nothing_behind_a_link(run_dir: Path, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(run_dir, step, arrays(), {})
    (run_dir / CHECKPOINTS / ".step-000009.tmp").mkdir()
    (tmp_path / "outside" / "step-000007").mkdir()
    prune(run_dir, 1)
    assert (tmp_path / "outside" / "step-000007").exists() and (tmp_path / "outside" / "mine.txt").exists()


class Client:
    """What the delivery process calls; it has no business with any of it here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


@pytest.mark.parametrize("name", ESCAPES)
def test_no_file_outside_of_the_run_is_uploaded(run_dir: Path, tmp_path: Path, name: str) -> None:
    (run_dir / "outside-link").symlink_to(tmp_path / "outside")
    told: list[str] = []
    delivery = Delivery(Spool(run_dir), lambda level, message: told.append(message))
    delivery._client = Client()
    delivery._send_artifact("run", [{"path": name, "folder": ""}])
    (run_dir / BEST / "link").symlink_to(tmp_path / "outside")
    delivery._send_artifact("run", [{"path": str(run_dir / BEST), "folder": "best"}])
    assert ["leads out of" in message for message in told] == [True, True]


def test_is_inside(run_dir: Path) -> None:
    (run_dir / "outside-link").symlink_to("../outside")
    assert all(not is_inside(run_dir, run_dir / name) for name in ESCAPES)
    assert all(is_inside(run_dir, run_dir / name) for name in (BEST, "missing", "best/../best", "."))


@pytest.mark.parametrize("name", ["../../outside/x", "/etc/x", "..", "a\\..\\b"])
def test_names_of_datasets_lead_nowhere(tmp_path: Path, name: str) -> None:
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"x": np.arange(40.0), "label": ["a", "b"] * 20}), rows)
    cache = tmp_path / "deep" / "cache"
    data = DataConfig(train=({"name": name, "path": str(rows)},), held_out=("wine",), cache=str(cache))
    load_dataset(DatasetSource(name=name, path=str(rows)), data)
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - {rows}
    assert made and all(is_inside(cache, path) for path in made)


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_a_parquet_file_stays_one(tmp_path: Path) -> None:
    """Old pyarrow unpickled the name of an extension type (CVE-2023-47248)."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    schema = pa.schema([pa.field("x", pa.float64(), metadata=metadata), pa.field("label", pa.string())])
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table([np.arange(40.0), ["a", "b"] * 20], schema=schema), rows)
    source = DatasetSource(name="rows", path=str(rows))
    data = DataConfig(train=(source,), held_out=("wine",), cache=str(tmp_path / "cache"))
    with contextlib.suppress(DataError):
        load_dataset(source, data)
    assert not (tmp_path / "exploded").exists()


AUDIT = """
import sys
from pathlib import Path
from palf_dist.distributed.driver import meta_train
from palf_dist.evaluation.report import make_report
from tests.distributed.small import small_config

unpickled = []
sys.addaudithook(lambda event, arguments: unpickled.append(arguments) if event == "pickle.find_class" else None)
run_dir = Path(sys.argv[1])
meta_train(small_config(meta_learner={"outer_steps": 2}), run_dir)
meta_train(small_config(meta_learner={"outer_steps": 2}), run_dir, resume=True)
make_report(run_dir)
print(unpickled)
"""


def test_a_run_its_resume_and_its_report_unpickle_nothing(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", AUDIT, str(tmp_path / "run")]
    environment = {**os.environ, "PALF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
