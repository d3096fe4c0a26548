from __future__ import annotations

import math

import pytest

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import efficiency
from benchmarks.scaling.efficiency import Efficiency
from benchmarks.scaling.fleet import Latencies
from benchmarks.scaling.simulated import simulate
from palf_dist.tasks.datasets import load_all
from tests.distributed.small import small_config

TROUBLED = Latencies(median=20.0, spread=0.1, straggling=0.1, slower=10.0, dying=0.1)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_simulated_run_is_a_run(mode: str) -> None:
    config = small_config()
    run = simulate(config, load_all(config.data), mode=mode, workers=8, rounds=5, latencies=TROUBLED)
    assert run.contributions == 40 and run.refused == 0
    assert run.reissued > 0, "one worker in ten dies"
    assert 0 < run.efficiency < 1 and 0 < run.driver_busy < 0.9 and len(run.memory) == 4
    assert run.seconds > 5 * 20 * 0.5, "time that is skipped counts"


def test_late_units_are_issued_twice_only_where_that_is_wanted() -> None:
    config = small_config()
    datasets = load_all(config.data)
    runs = [
        simulate(config, datasets, mode="sync", workers=20, rounds=5, duplicates=twice, latencies=TROUBLED)
        for twice in (False, True)
    ]
    assert runs[0].duplicated == 0 < runs[1].duplicated
    assert runs[1].seconds < runs[0].seconds


def test_short_units_keep_the_driver_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "settings", small_config)
    monkeypatch.setattr(scaling, "load_all", lambda data: load_all(small_config().data))
    (long, relaxed), (short, busy) = scaling.saturation((20.0, 0.001), 8, 6)
    assert (long, short) == (20.0, 0.001) and relaxed.driver_busy < 0.1 and busy.driver_busy > 5 * relaxed.driver_busy
    assert busy.rate > 10 * relaxed.rate and busy.efficiency < relaxed.efficiency


def test_the_page_holds_all_tables() -> None:
    rows = [Efficiency(0, 2.0, 1.9, 2.1, math.nan), Efficiency(2, 1.25, 1.2, 1.3, 0.8)]
    config = small_config()
    run = simulate(config, load_all(config.data), mode="async", workers=4, rounds=3)
    saturated = scaling.saturation_rows([(20.0, run)])
    page = scaling.page(scaling.efficiency_rows(rows), scaling.simulation_rows([run]), saturated, 3)
    assert "| 2 | 1.25 | 1.20 - 1.30 | 80 % |" in page and "| async | 4 | yes |" in page
    ideal, rate = (float(cell) for cell in saturated[1][0][2:4])
    assert ideal >= rate and f"| 4 | 20 | {ideal:.0f} | {rate:.0f} |" in page


@pytest.mark.slow
def test_workers_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "WORKERS", (0, 1))
    alone, one = efficiency.measure(small_config(), rounds=1)
    assert alone.seconds > 0 and math.isnan(alone.share) and one.share == alone.seconds / one.seconds
