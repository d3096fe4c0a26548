"""The command ``tune``: parse, call, print."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from palf_dist.cli_shared import (
    Address,
    AsJson,
    ConfigFile,
    Overrides,
    load_search,
    near,
    new_folder,
    option_overrides,
    output,
    refuse_differences,
    resumed_config,
    told_how_to_go_on,
)

if TYPE_CHECKING:
    from palf_dist.search.config import SearchConfig
    from palf_dist.search.driver import SearchResult

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
SAID_ELSEWHERE = ("run_dir", "mlflow_run_id", "interrupted", "out_of_time", "page")


def tune(
    config: ConfigFile = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the search; default runs/NAME-TIME. Must be empty.")
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End after so long with the best so far, e.g. 90s, 10m or 1.5h."),
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", help="Trials at once; default: as the configuration says.")
    ] = None,
    address: Address = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Go on with an earlier search; no finished trial is repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search loss weights of one dataset and model, or the settings of meta-training, on Ray Tune.

    The best answer so far lies in DIR/best at any moment. Ctrl-C ends with everything saved; --resume goes on.
    """
    with output(as_json) as emit:
        budget = None if time_budget is None else _seconds(time_budget)
        fields = {"concurrent": concurrent, "distributed.address": address}
        settings, folder = _settings(config, [*(overrides or ()), *option_overrides(fields)], run_dir, resume)

        from palf_dist.search.driver import tune as search

        go_on = f"go on with palf-dist tune --resume {folder}"
        with told_how_to_go_on(folder, go_on):
            result = search(settings, folder, resume=resume is not None, time_budget=budget)
        if result.interrupted:
            print(f"interrupted and saved; {go_on}", file=sys.stderr)
            if as_json:
                emit(result.record())
            raise typer.Exit(130)
        if result.out_of_time:
            print(f"the time budget is over; {go_on}", file=sys.stderr)
        assert result.report is not None, "a search that was not interrupted has one"
        mlflow = result.mlflow_run_id or "not reached yet; palf-dist report delivers what is left"
        emit(
            result.record(),
            _table(result),
            f"best    {near(result.run_dir / 'best')}",
            f"page    {near(result.report.page)}",
            f"mlflow  {mlflow if settings.tracking.enabled else 'off'}",
        )


def _settings(
    config: Path | None, overrides: list[str], run_dir: str | None, resume: str | None
) -> tuple[SearchConfig, str]:
    """The configuration, and the folder of the search."""
    from palf_dist.search.config import load_search_config, search_differences

    if resume is None:
        settings = load_search(config, overrides)
        return settings, run_dir or new_folder(settings.name)
    own = resumed_config(resume, run_dir, "tune")
    settings = load_search_config(config or own, overrides)
    refuse_differences(resume, search_differences(load_search_config(own), settings))
    return settings, resume


def _seconds(text: str) -> float:
    """Of a time such as 90s, 10m or 1.5h."""
    from palf_dist.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"--time-budget {text}: write a number and its unit, for instance 90s, 10m or 1.5h")
    return seconds


def _table(result: SearchResult) -> Table:
    record = result.record()
    for row in record.pop("held_out", ()):  # of a meta-training
        record[f"held out: {row['label']}"] = (
            f"{row['accuracy']:.2f} % ({row['diff_vs_ce']:+.2f} points against tuned cross-entropy, se {row['se']:.2f})"
        )
    table = Table(show_header=False)
    for name, value in record.items():
        if name not in SAID_ELSEWHERE and value is not None:
            table.add_row(name.replace("_", " "), escape(_shown(value)))
    return table


def _shown(value: Any) -> str:
    """Numbers short, mappings one entry a line."""
    if isinstance(value, dict):
        return "\n".join(f"{name} {_shown(item)}" for name, item in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)
