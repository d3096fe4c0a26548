from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palf_dist.faults import VARIABLE, fault_point
from palf_dist.types import Unit

HERE = Unit("meta_gradient", 2, 1)


def inject(monkeypatch: pytest.MonkeyPatch, *faults: dict[str, object]) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps(faults))


def test_nothing_happens_unless_asked_for() -> None:
    assert fault_point("in_unit", HERE) is None


def test_a_fault_is_for_its_point_and_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {"point": "after_unit", "unit": ["meta_gradient", 2, 1], "action": "nan"})
    assert fault_point("after_unit", HERE) == "nan"
    assert fault_point("before_unit", HERE) is None
    assert fault_point("after_unit", Unit("meta_gradient", 2, 0)) is None
    assert fault_point("after_unit", Unit("select", 2, 1)) is None


def test_a_fault_without_a_unit_is_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {"point": "in_unit", "action": "raise"})
    with pytest.raises(RuntimeError, match="on purpose"):
        fault_point("in_unit", HERE)


def test_once_is_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, {"point": "after_unit", "action": "nan", "once_file": str(tmp_path / "fired")})
    assert [fault_point("after_unit", HERE) for _ in range(3)] == ["nan", None, None]


def test_an_interrupt_is_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {"point": "driver_after_apply", "action": "interrupt"})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fault_point("driver_after_apply", HERE)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("fault", [{"point": "nowhere", "action": "nan"}, {"point": "in_unit", "action": "smile"}])
def test_a_misspelt_fault_is_noticed(fault: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, fault)
    with pytest.raises(AssertionError):
        fault_point("in_unit", HERE)


@pytest.mark.parametrize("action", ["kill", "kill_soon"])
def test_kill_is_kill(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, {"point": "in_unit", "action": action})
    child = os.fork()
    if child == 0:
        fault_point("in_unit", HERE)
        time.sleep(20 if action == "kill_soon" else 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_signal_can_go_to_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inject(monkeypatch, {"point": "driver_before_take", "action": "stop", "once_file": str(tmp_path / "fired")})
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert fault_point("driver_before_take", HERE, sleeper.pid) == "stop"
        assert os.WIFSTOPPED(os.waitpid(sleeper.pid, os.WUNTRACED)[1])
        (tmp_path / "fired").unlink()  # armed once more
        monkeypatch.setenv(VARIABLE, os.environ[VARIABLE].replace("stop", "kill"))
        assert fault_point("driver_before_take", HERE, sleeper.pid) == "kill"
        assert sleeper.wait() == -signal.SIGKILL
    finally:
        sleeper.kill()
        sleeper.wait()
