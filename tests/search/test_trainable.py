"""A trial's process without Ray around it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.tune.trainable.trainable import _DICT_CHECKPOINT_FILE_NAME

from palf_dist.errors import CheckpointError, ConfigError, DataError, PolicyFileError
from palf_dist.run_directory import CONFIG, locked
from palf_dist.search import trainable
from palf_dist.search.trainable import FAILURE, FATAL, REPORT, TrialProcess
from palf_dist.search.trial import Parameters, Report, TrialContext
from tests.search.quadratic import Quadratic

MIDDLE = {"x": 0.5, "y": 0.5}


@dataclass(frozen=True)
class Troubled(Quadratic):
    error: Exception | None = None

    def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
        if self.error is not None:
            raise self.error
        with locked(context.folder):
            yield from super().run(parameters, context)


def first_result(run_dir: Path, target: Quadratic) -> dict[str, Any]:
    process = TrialProcess.__new__(TrialProcess)
    process.setup({"number": 1, "parameters": MIDDLE}, target, run_dir)
    try:
        return process.step()
    finally:
        process.cleanup()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigError("wrong"), FATAL),
        (DataError("wrong"), FATAL),
        (CheckpointError("wrong"), FAILURE),
        (PolicyFileError("wrong"), FAILURE),
        (ValueError("wrong"), FAILURE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_only_what_every_trial_would_meet_ends_the_search(error: Exception, kind: str, run_dir: Path) -> None:
    result = first_result(run_dir, Troubled(error=error))
    assert result["done"] and result.keys() == {"done", kind} and "wrong" in result[kind]


def test_a_trial_waits_for_a_predecessor_to_be_gone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_dir / "trials" / "00001"
    folder.mkdir(parents=True)
    monkeypatch.setattr(trainable, "PATIENCE_SECONDS", 0.0)
    with locked(folder):
        result = first_result(run_dir, Troubled())
    assert result["done"] and "is in use by another run" in result[FATAL]

    predecessor = locked(folder)
    predecessor.__enter__()
    begun = []

    class Dying(Troubled):
        """Its predecessor is gone at the second attempt."""

        def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
            begun.append(context)
            if len(begun) == 2:
                predecessor.__exit__(None, None, None)
            return super().run(parameters, context)

    monkeypatch.setattr(trainable, "PATIENCE_SECONDS", 60.0)
    assert first_result(run_dir, Dying())[REPORT].step == 1 and len(begun) == 2


def test_a_node_without_the_run_directory_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    result = first_result(tmp_path / "elsewhere", Quadratic())
    assert "search in a folder that all nodes share" in result[FATAL] and result["done"]
    assert not (tmp_path / "elsewhere").exists()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


def test_a_pickle_in_a_checkpoint_of_tune_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    """Tune restores a trial whose state another one takes over, from a folder that others can write to."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / _DICT_CHECKPOINT_FILE_NAME).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    process = TrialProcess.__new__(TrialProcess)
    process.setup({"number": 1, "parameters": MIDDLE}, Quadratic(), run_dir)
    process.restore(str(tmp_path / "checkpoint"))
    process.cleanup()
    assert not (tmp_path / "exploded").exists()
