"""A disk that takes nothing for a while, stood in for by the kernel's limit on the size of files."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palf_dist import workplace
from palf_dist.distributed.driver import meta_train
from palf_dist.errors import StorageError
from palf_dist.types import Contribution, Unit
from palf_dist.units import Runner
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config
from tests.distributed.test_driver import train

BYTES = 700
"""A metrics row or two fit in, nothing else does."""


class FillingRunner(Runner):
    """The disk is full from the first of two units on, and has room again from the second on. In process only."""

    full_at = ("meta_gradient", 1, 0)
    free_at: tuple[str, int, int] | None = ("meta_gradient", 3, 0)

    def run(self, unit: Unit, *arguments: Any, **named: Any) -> Contribution:
        key, (_, most) = (unit.kind, unit.outer_step, unit.group), resource.getrlimit(resource.RLIMIT_FSIZE)
        if key in (self.full_at, self.free_at):
            resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES if key == self.full_at else most, most))
        return super().run(unit, *arguments, **named)


class FilledRunner(FillingRunner):
    free_at = None


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | str]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    meta_train(small_config(), run_dir)
    return fingerprint(run_dir)


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, undisturbed: dict[str, bytes | str]) -> None:
    result, screen = train(small_config(), tmp_path / "run", make_runner=FillingRunner)
    assert not result.interrupted and fingerprint(tmp_path / "run") == undisturbed
    assert screen.count("takes no writes (File too large); the run goes on") == 1
    assert screen.count("takes writes again and everything is saved") == 1


def test_a_disk_that_stays_full_ends_it_with_nothing_corrupt(
    tmp_path: Path, undisturbed: dict[str, bytes | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workplace, "GRACE_SECONDS", 0.1)
    run_dir = tmp_path / "run"
    with pytest.raises(StorageError, match=rf"{run_dir} takes no writes .*go on with --resume {run_dir}"):
        train(small_config(), run_dir, make_runner=FilledRunner)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    _, screen = train(small_config(), run_dir, resume=True)
    assert "was skipped" not in screen and fingerprint(run_dir) == undisturbed
