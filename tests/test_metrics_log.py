"""metrics.parquet: late columns, exact values, and each step once after a crash and resume."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from palf_dist.metrics_log import MetricsLog


def table(run_dir: Path) -> dict[str, list]:
    return pq.read_table(run_dir / "metrics.parquet").to_pydict()


def test_columns_may_appear_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(0, {"outer_loss": 0.1})
    log.append(1, {"outer_loss": 0.1 + 0.2, "select_score": 1})
    log.append(2, {"outer_loss": float("nan")})
    log.close()
    found = table(tmp_path)
    assert found["outer_step"] == [0, 1, 2]
    assert found["outer_loss"][:2] == [0.1, 0.1 + 0.2] and math.isnan(found["outer_loss"][2])
    assert found["select_score"] == [None, 1.0, None]
    assert str(pq.read_schema(tmp_path / "metrics.parquet").field("outer_step").type) == "int64"


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    crashed = MetricsLog(tmp_path)
    for step in range(5):
        crashed.append(step, {"outer_loss": float(step)})
        if step == 2:
            crashed.compact()
    crashed._file.write(b'{"outer_step": 5, "outer')  # torn by kill -9
    crashed._file.close()
    assert table(tmp_path)["outer_step"] == [0, 1, 2]

    resumed = MetricsLog(tmp_path, next_step=3)
    for step in range(3, 7):
        resumed.append(step, {"outer_loss": 10.0 * step})
    resumed.close()
    found = table(tmp_path)
    assert found["outer_step"] == list(range(7))
    assert found["outer_loss"] == [0.0, 1.0, 2.0, 30.0, 40.0, 50.0, 60.0]


def test_rows_reach_the_operating_system_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(0, {"a": 1.5})
    resumed = MetricsLog(tmp_path, next_step=1)
    resumed.close()
    log._file.close()
    assert table(tmp_path) == {"outer_step": [0], "a": [1.5]}


def test_an_empty_log(tmp_path: Path) -> None:
    MetricsLog(tmp_path).close()
    assert table(tmp_path) == {"outer_step": []}


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.append(0, {})
    with pytest.raises(AssertionError, match="outer step 0 was logged twice"):
        log.append(0, {})
    log.close()


def test_the_latest_row_with_a_metric_is_found_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    assert log.latest("score") is None
    log.append(0, {"loss": 3.0, "score": 0.5})
    log.append(1, {"loss": 2.0, "score": 0.75})
    log.append(2, {"loss": 1.0})
    log.close()
    for next_step, expected in ((3, (1, {"loss": 2.0, "score": 0.75})), (1, (0, {"loss": 3.0, "score": 0.5}))):
        again = MetricsLog(tmp_path, next_step)
        assert again.latest("score") == expected
        again.close()
