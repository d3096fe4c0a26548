"""Faults on purpose: named points where a test can kill, stop, hang, poison or interrupt a process exactly once.

Nothing happens unless the environment variable PALF_FAULTS is set. It holds a JSON list of faults:
``{"point": "in_unit", "unit": ["meta_gradient", 2, 0], "action": "kill", "once_file": "/tmp/x/fired"}``.
``unit`` (kind, outer step, group) narrows the fault to one unit; ``once_file`` is created when the fault fires, and a
fault whose file exists stays silent, so that a unit that is issued again goes through. Whoever removes the file arms
the fault once more.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

from palf_dist.types import Unit

VARIABLE = "PALF_FAULTS"
POINTS = (
    "before_unit",
    "in_unit",  # before each part of a unit's inner run
    "after_unit",  # computed, not delivered
    "driver_before_take",  # delivered: Ray has the answer for the driver, which has not read it; aims at the worker
    "driver_after_apply",  # an outer step was taken, not logged
    "driver_before_checkpoint",
    "driver_in_checkpoint",  # some of a checkpoint's files are written
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
ACTIONS = (*SIGNALS, "kill_soon", "hang", "raise", "nan", "oom")
SOON_SECONDS = 0.05


def fault_point(point: str, unit: Unit, pid: int | None = None) -> str | None:
    """Do what PALF_FAULTS asks for here; returns the action that fired and did not end the call, else None.

    ``nan`` only returns its name: the caller poisons its own result. ``kill_soon`` kills in the midst of what follows.
    The driver's points pass a unit of kind "driver" unless they are about another one. ``pid``: the process of this
    machine that a signal goes to, else this one.
    """
    assert point in POINTS, point
    specification = os.environ.get(VARIABLE)
    if not specification:
        return None
    for fault in json.loads(specification):
        assert fault["point"] in POINTS and fault["action"] in ACTIONS, fault
        aims_here = fault.get("unit") in (None, [unit.kind, unit.outer_step, unit.group])
        if fault["point"] == point and aims_here and _first_time(fault.get("once_file")):
            _act(fault["action"], os.getpid() if pid is None else pid)
            return str(fault["action"])
    return None


def _first_time(once_file: str | None) -> bool:
    """Whether this process is the one that creates ``once_file`` (always, when there is none)."""
    if once_file is None:
        return True
    try:
        os.close(os.open(once_file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _act(action: str, pid: int) -> None:
    if action in SIGNALS:
        os.kill(pid, SIGNALS[action])
    elif action == "kill_soon":
        threading.Timer(SOON_SECONDS, os.kill, (pid, signal.SIGKILL)).start()
    elif action == "hang":
        time.sleep(3600)
    elif action == "oom":
        raise MemoryError("out of memory on purpose by PALF_FAULTS")
    elif action == "raise":
        raise RuntimeError("raised on purpose by PALF_FAULTS")
