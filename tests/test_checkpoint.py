"""Checkpoints: exact round trip, every kind of damage noticed, and kill -9 at every moment of a save."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palf_dist import checkpoint as module
from palf_dist.atomic import superseded
from palf_dist.checkpoint import copy_checkpoint, latest_checkpoint, prune, save_checkpoint
from palf_dist.errors import CheckpointError
from palf_dist.randomness import random_generator
from palf_dist.run_directory import CHECKPOINTS

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def arrays(step: int) -> dict[str, np.ndarray]:
    generator = random_generator("checkpoint", step)
    return {
        "policy": generator.normal(size=300).astype(np.float32),
        "first_moment": generator.normal(size=300),
        "ledger": generator.integers(0, 256, size=(step, 16), dtype=np.uint8),
        "counters": np.array([step, 2, 3]),
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes(), name


def steps_on_disk(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir())


def test_round_trip_and_layout(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    carried = {'["meta_gradient",1,0]': {"theta": np.arange(6.0).reshape(2, 3)}, "b/c": {"m": np.zeros(0, np.int64)}}
    state = {"prepared": {"lr": 0.1 + 0.2, "none": None}, "best": float("-inf"), "names": ["é"], "counts": {3: 1}}
    folder = save_checkpoint(tmp_path, 123, arrays(123), state, carried)
    assert folder == tmp_path / "checkpoints" / "step-000123"
    names = ["carried.safetensors", "learner.safetensors", "policy.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.folder, found.skipped) == (123, folder, ())
    assert found.state == {**state, "counts": {"3": 1}}
    assert_equal(found.learner, arrays(123))
    assert found.carried.keys() == carried.keys()
    for key in carried:
        assert_equal(found.carried[key], carried[key])


def test_newest_wins_whatever_the_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save_checkpoint(tmp_path, step, arrays(1), {})
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1_000_000 and found.carried == {}


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, arrays(4), {"phase": "training"})
    save_checkpoint(tmp_path, 4, arrays(5), {"phase": "done"})
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.state == {"phase": "done"}
    assert_equal(found.learner, arrays(5))
    assert steps_on_disk(tmp_path) == ["step-000004"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap_with_older(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-000001" / path.name, path)


FILES = ("policy.safetensors", "learner.safetensors", "carried.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", [truncate, empty, swap_with_older, Path.unlink])
def test_damaged_files_are_reported_and_skipped(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, arrays(step), {"at": step}, {"k": {"x": np.full(3, float(step))}})
    damage(tmp_path / CHECKPOINTS / "step-000002" / name)
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    assert len(found.skipped) == 1
    assert "step-000002 was skipped" in found.skipped[0] and name in found.skipped[0]


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_damaged_state_is_reported_and_skipped(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, arrays(step), {"at": step})
    damage(tmp_path / CHECKPOINTS / "step-000002" / "state.json")
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1 and len(found.skipped) == 1


@pytest.mark.parametrize("name", FILES)
def test_no_bit_flip_goes_unnoticed(tmp_path: Path, name: str) -> None:
    """A flip either is found or, in the white space of state.json alone, changes nothing that is read."""
    state = {"best": 0.25, "history": [1.5, 2.5], "note": "abc"}
    folder = save_checkpoint(tmp_path, 2, arrays(2), state, {"k": {"x": np.arange(64.0)}})
    intact = (folder / name).read_bytes()
    generator = random_generator("flip", name)
    noticed = 0
    for position in generator.choice(len(intact), size=min(150, len(intact)), replace=False):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << int(generator.integers(8))
        (folder / name).write_bytes(bytes(damaged))
        try:
            found = latest_checkpoint(tmp_path)
        except CheckpointError:
            noticed += 1
            continue
        assert name == "state.json" and found is not None and found.state == state
        assert_equal(found.learner, arrays(2))
    assert noticed >= (75 if name == "state.json" else 150)


def test_a_newer_format_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, arrays(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT_VERSION", 99)
        save_checkpoint(tmp_path, 2, arrays(2), {})
    found = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    assert "format version is 99" in found.skipped[0]


def test_nothing_valid_left_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, step, arrays(step), {}) / "learner.safetensors")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint is left.*step-000002.*step-000001"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"sha256": 1, "content": []}', b"null", b"\xff\xfe"])
def test_nonsense_in_state_json(tmp_path: Path, content: bytes) -> None:
    folder = save_checkpoint(tmp_path, 1, arrays(1), {})
    (folder / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        latest_checkpoint(tmp_path)


def test_prune_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, arrays(step), {})
    truncate(tmp_path / CHECKPOINTS / "step-000005" / "policy.safetensors")
    (tmp_path / CHECKPOINTS / ".step-000006.tmp").mkdir()
    (tmp_path / CHECKPOINTS / "notes").mkdir()
    prune(tmp_path, 2)
    assert steps_on_disk(tmp_path) == ["notes", "step-000003", "step-000004"]


def test_nothing_but_json_and_safetensors_is_written(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, arrays(1), {"a": 1})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, arrays(2), {"a": object()})
    assert steps_on_disk(tmp_path) == ["step-000001"]
    assert json.loads((folder / "state.json").read_text())["content"]["state"] == {"a": 1}


def _save_for_ever(run_dir: Path, first: int, announce: Any) -> None:
    for step in range(first, first + 10_000):
        save_checkpoint(run_dir, step, {**arrays(step % 50), "bulk": np.full(200_000, float(step))}, {"at": step})
        prune(run_dir, 2)
        announce.send(step)


def test_killed_while_saving_in_a_loop(tmp_path: Path) -> None:
    """What was announced as saved is never lost, whenever the kill comes."""
    generator = random_generator("kill")
    first = 0
    for _ in range(8):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        writer = PROCESSES.Process(target=_save_for_ever, args=(tmp_path, first, sender))
        writer.start()
        sender.close()
        assert receiver.poll(60)
        writer.join(float(generator.uniform(0.0, 0.08)))
        assert writer.is_alive()
        writer.kill()
        writer.join()
        announced = first
        try:
            while receiver.poll():
                announced = receiver.recv()
        except EOFError:
            pass
        found = latest_checkpoint(tmp_path)
        assert found is not None and found.step >= announced and found.skipped == ()
        assert found.learner["bulk"][0] == found.step == found.state["at"]
        assert_equal({"policy": found.learner["policy"]}, {"policy": arrays(found.step % 50)["policy"]})
        first = found.step + 1


def _save_and_die(run_dir: Path, call: int) -> None:
    """Replace step 7 by itself, and die just before the ``call``-th operation on the file system."""
    calls = 0

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapped

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "open"), (os, "mkdir"), (shutil, "rmtree")):
        setattr(owner, name, dying(getattr(owner, name)))
    save_checkpoint(run_dir, 7, arrays(8), {"take": 2})


def test_killed_before_every_operation_of_a_replacing_save(tmp_path: Path) -> None:
    """The worst case: the only checkpoint is being replaced by one of the same step."""
    takes = []
    for call in range(1, 100):
        run_dir = tmp_path / str(call)
        save_checkpoint(run_dir, 7, arrays(7), {"take": 1})
        writer = PROCESSES.Process(target=_save_and_die, args=(run_dir, call))
        writer.start()
        writer.join(60)
        found = latest_checkpoint(run_dir)
        assert found is not None and found.skipped == ()
        takes.append(found.state["take"])
        assert_equal(found.learner, arrays(6 + takes[-1]))
        save_checkpoint(run_dir, 7, arrays(9), {"take": 3})
        again = latest_checkpoint(run_dir)
        assert again is not None and again.state == {"take": 3}
        prune(run_dir, 1)
        assert steps_on_disk(run_dir) == ["step-000007"]
        assert not superseded(found.folder).exists()
        if writer.exitcode == 0:
            break
        assert writer.exitcode == -signal.SIGKILL
    assert writer.exitcode == 0 and len(takes) > 10, "every operation was reached"
    assert takes == sorted(takes) and {1, 2} == set(takes)


def test_a_checkpoint_can_be_given_to_another_run(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "first", 7, arrays(7), {"best": 1})
    copied = tmp_path / "under any name"
    shutil.copytree(folder, copied)
    copy_checkpoint(copied, tmp_path / "second")
    found = latest_checkpoint(tmp_path / "second")
    assert found is not None and (found.step, found.state) == (7, {"best": 1})
    assert_equal(found.learner, arrays(7))
    truncate(copied / "learner.safetensors")
    with pytest.raises(CheckpointError, match=r"under any name cannot be used: learner\.safetensors does not match"):
        copy_checkpoint(copied, tmp_path / "third")
