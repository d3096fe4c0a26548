"""The run directory: its layout, how one is made or opened again, and the lock that keeps a second driver out.

Nothing is ever written into a folder before it has been found fit, and nothing that exists is overwritten.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from palf_dist.atomic import exclusive
from palf_dist.containment import link_out_of
from palf_dist.errors import RunDirectoryError, RunInUseError
from palf_dist.storage import local_path

CONFIG = "config.yaml"
METRICS = "metrics.parquet"
RESULTS = "results.parquet"
"""One row per method and held-out task; see ``evaluation.statistics.compare``."""
CHECKPOINTS = "checkpoints"
BEST = "best"
TRAJECTORIES = "trajectories"
UNITS = "units"
"""What finished units of a phase came to, while the phase goes on; see ``distributed.kept_units``."""
TRACKING = "tracking"
REPORT = "report"
LOCK = ".lock"


def create_run_directory(path: str | Path) -> Path:
    """Make an empty run directory, with its parents, and return it absolute.

    Raises RunDirectoryError when it holds files already, is a file, is a URI but file://, or cannot be written.
    """
    run_dir = local_path(path)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        entries = sorted(entry.name for entry in run_dir.iterdir() if entry.name != LOCK)
    except OSError as error:
        raise _unusable(run_dir, error) from error
    if entries:
        raise not_empty(run_dir, entries)
    _check_writable(run_dir)
    return run_dir


def open_run_directory(path: str | Path) -> Path:
    """The absolute path of an existing, writable run directory.

    Raises RunDirectoryError when there is none, when it has no config.yaml, or when it cannot be written.
    """
    run_dir = local_path(path)
    try:
        found = (run_dir / CONFIG).is_file()
    except OSError as error:
        raise _unusable(run_dir, error) from error
    if not found:
        raise no_run(run_dir)
    if link := link_out_of(run_dir):
        raise RunDirectoryError(
            f"run directory: {link} is a link that leads out of {run_dir}, and a run works on nothing outside of its "
            "folder; put what it points at in its place"
        )
    _check_writable(run_dir)
    return run_dir


def discard_unused(run_dir: Path) -> None:
    """Remove a run directory in which no run began; one that holds anything but the lock is left as it is."""
    with contextlib.suppress(OSError):
        if {entry.name for entry in run_dir.iterdir()} <= {LOCK}:
            (run_dir / LOCK).unlink(missing_ok=True)
            run_dir.rmdir()


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for one driver. Raises RunInUseError while another one has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(run_dir / LOCK))
        except BlockingIOError as error:
            raise RunInUseError(
                f"run directory: {run_dir} is in use by another run; wait for it to end, or choose another --run-dir"
            ) from error
        except OSError as error:
            raise _unusable(run_dir, error) from error
        yield


def not_empty(run_dir: str | Path, entries: Sequence[str]) -> RunDirectoryError:
    """What is wrong with the folder or URI of a new run that holds ``entries``."""
    return RunDirectoryError(
        f"run directory: {run_dir} is not empty (it holds {', '.join(entries[:3])}); "
        f"continue that run with --resume {run_dir}, or choose another folder with --run-dir"
    )


def no_run(run_dir: str | Path) -> RunDirectoryError:
    """What is wrong with the folder or URI of an earlier run that is none."""
    return RunDirectoryError(
        f"run directory: {run_dir} holds no run ({CONFIG} is missing); name the folder of an earlier run"
    )


def _check_writable(run_dir: Path) -> None:
    probe = run_dir / f".probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unusable(run_dir, error) from error


def _unusable(run_dir: Path, error: OSError) -> RunDirectoryError:
    reason = error.strerror or str(error)
    return RunDirectoryError(
        f"run directory: {run_dir} cannot be used ({reason}); make it a writable folder, or choose another --run-dir"
    )
