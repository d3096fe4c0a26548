"""What a job runs on the cluster: start the run, or resume it where one has begun, and again when its driver dies.

Thin on purpose: the driver is a process of its own, so that whatever kills it leaves this one to start the next.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from palf_dist.errors import PalfError
from palf_dist.redaction import redact
from palf_dist.run_directory import CONFIG
from palf_dist.storage import exists, join

COMMANDS = ("meta-train", "tune", "evaluate")
MISTAKE, INTERRUPTED = 2, 130
FINAL = (0, MISTAKE, INTERRUPTED)
"""Exit codes after which another attempt would end no better."""
BEGUN = "palf_dist job:"
"""What the first line of a job that runs starts with."""


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Run ``palf-dist COMMAND ARGUMENTS`` as a job: on the Ray cluster that the process belongs to, idempotent for one
    run directory. ``command`` None: the first argument that is no option names it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, prog="python -m palf_dist.jobs")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N")
    parser.add_argument("--for-version", metavar="VERSION")
    if command is None:
        parser.add_argument("command", choices=COMMANDS)
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.for_version is not None:
            _check_version(options.for_version)
        sys.exit(_attempts(command or options.command, rest, options.max_restarts))
    except PalfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)


def installed_version() -> str:
    """Of palf_dist; "not installed" where it is only on the path."""
    try:
        return version("palf-dist")
    except PackageNotFoundError:
        return "not installed"


def _check_version(wanted: str) -> None:
    here = installed_version()
    if here != wanted:
        raise PalfError(
            f"the cluster has palf_dist {here}, the job was submitted with {wanted}; install the same on both sides"
        )


def _attempts(command: str, arguments: list[str], max_restarts: int) -> int:
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray signals the driver too, which ends with a checkpoint
        signal.signal(number, lambda received, frame: stopping.append(received))
    for attempt in range(max_restarts + 1):
        began = time.monotonic()
        whole = [command, *_start_or_resume(command, arguments), *_cluster(arguments)]
        print(redact(f"{BEGUN} palf-dist {' '.join(whole)}"), file=sys.stderr, flush=True)
        code = subprocess.Popen([sys.executable, "-m", "palf_dist", *whole]).wait()
        if code in FINAL or stopping or attempt == max_restarts:
            break
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        print(
            f"the driver {end} after {time.monotonic() - began:.0f} s; restart {attempt + 1} of {max_restarts}",
            file=sys.stderr,
            flush=True,
        )
    return 128 - code if code < 0 else code


def _start_or_resume(command: str, arguments: list[str]) -> list[str]:
    """The arguments with --run-dir turned into --resume where a run has begun in that directory."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--run-dir")
    parser.add_argument("--resume")
    options, rest = parser.parse_known_args(arguments)
    if options.resume is not None or options.run_dir is None:
        if options.resume is None and command != "evaluate":
            raise PalfError("--run-dir: a job needs one, so that it can go on when it is started again")
        return arguments
    return [*rest, "--resume" if exists(join(options.run_dir, CONFIG)) else "--run-dir", options.run_dir]


def _cluster(arguments: list[str]) -> list[str]:
    """The option that makes a driver use the cluster it was started on."""
    named = any(argument.partition("=")[0] == "--address" for argument in arguments)
    return ["--address", "auto"] if os.environ.get("RAY_ADDRESS") and not named else []
