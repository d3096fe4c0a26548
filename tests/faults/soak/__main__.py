"""make soak: faults from a seeded schedule for some minutes, then what was survived, and whether it left a trace."""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from palf_dist.config import RunConfig
from tests.distributed.fingerprint import fingerprint
from tests.distributed.small import small_config
from tests.faults.soak.mischief import KINDS, POINTS
from tests.faults.soak.runs import Runs, SoakError, command
from tests.faults.soak.schedule import schedule
from tests.faults.soak.stage import set_up
from tests.processes import ROOT

LEAST = 4
"""Faults that are begun however long it takes."""


def configuration(outer_steps: int, **sections: dict[str, Any]) -> RunConfig:
    """Steps of about half a second for two workers."""
    return small_config(
        inner={"steps": 40},
        tasks={"group_size": 4},
        meta_learner={"outer_steps": outer_steps, "groups_per_step": 4},
        evaluation={"select_every": 10},
        checkpoint={"every": 2, "keep": 2},
        **sections,
    )


def undisturbed(folder: Path, outer_steps: int) -> dict[str, bytes | str]:
    """The fingerprint of the same run, done in one process that nobody disturbs."""
    line = command(configuration(outer_steps), folder / "undisturbed.json", folder / "undisturbed", "new")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SoakError(f"the undisturbed run failed: {done.stderr}")
    return fingerprint(folder / "undisturbed")


def soak(minutes: float, seed: int) -> bool:
    """Whether everything was survived without a trace. Prints as it goes."""
    outer_steps = round(min(100, max(20, 40 * minutes)))  # several meta-trainings, each compared at its end
    with tempfile.TemporaryDirectory(prefix="palf-soak-", dir="/tmp") as name, ThreadPoolExecutor(1) as thread:
        reference = thread.submit(undisturbed, Path(name), outer_steps)
        with set_up(Path(name)) as stage:
            for point in POINTS:
                stage.mark(point).touch()
            kinds = [kind for kind in KINDS if stage.disk_is_its_own or kind != "disk full for a while"]
            config = configuration(
                outer_steps,
                distributed={
                    "workers": "auto",
                    "address": stage.cluster.address,
                    "unit_timeout": 8.0,
                    "max_attempts": 20,
                },
                tracking={"enabled": True, "uri": stage.server.uri},
            )
            runs = Runs(stage, config, reference.result())
            try:
                _disturb(runs, kinds, 60 * minutes, seed)
                survived = True
            except SoakError as error:
                runs.say(str(error))
                survived = False
            finally:
                runs.close()
            _report(runs, seed)
            return survived and runs.identical > 0 and not runs.different


def _disturb(runs: Runs, kinds: list[str], seconds: float, seed: int) -> None:
    runs.until(lambda: runs.working)
    end = time.monotonic() + seconds
    for planned in schedule(kinds, seed):
        runs.until(partial(runs.settled, planned.kind if planned.on_top else None))
        begin = time.monotonic() + planned.gap
        if begin > end and planned.number > LEAST:
            break
        runs.until(partial(_past, begin))
        runs.commit(planned)
    runs.until(runs.settled)
    runs.finish()


def _past(moment: float) -> bool:
    return time.monotonic() >= moment


def _report(runs: Runs, seed: int) -> None:
    seconds = defaultdict(list)
    for fault in runs.faults:
        if fault.recovered is not None:
            seconds[fault.planned.kind].append(fault.seconds)
    everything = [value for values in seconds.values() for value in values]
    minutes = (time.monotonic() - runs.began) / 60
    print(f"\n{minutes:.1f} minutes, seed {seed}; seconds to recovery: until work is done with all workers there")
    print(f"{'fault':40} {'begun':>6} {'survived':>9} {'median':>7} {'max':>7}")
    for kind in KINDS:
        begun = sum(fault.planned.kind == kind for fault in runs.faults)
        if begun:
            _row(kind, begun, seconds[kind])
    _row("all", len(runs.faults), everything)
    counts = runs.counts
    refused = {name.removeprefix("refused "): n for name, n in counts.items() if name.startswith("refused ")}
    causes = ", ".join(f"{count} {cause}" for cause, count in refused.items() if count) or "0"
    print(
        f"contributions: {counts['applied']} applied, {counts['issued again']} re-issued, "
        f"{counts['issued a second time']} issued twice, refused: {causes}"
    )
    print(
        f"drivers: {counts['drivers killed']} killed, {counts['drivers that ended by themselves']} ended by themselves"
    )
    print(f"meta-trainings: {runs.identical} identical to the undisturbed one, {runs.different} different")


def _row(name: str, begun: int, seconds: list[float]) -> None:
    times = f"{statistics.median(seconds):7.1f} {max(seconds):7.1f}" if seconds else ""
    print(f"{name:40} {begun:6} {len(seconds):9} {times}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="for so long faults are begun (default 15)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule: the same one, the same faults")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        survived = soak(arguments.minutes, arguments.seed)
    except KeyboardInterrupt:
        sys.exit("stopped")
    sys.exit(0 if survived else 1)


if __name__ == "__main__":
    main()
