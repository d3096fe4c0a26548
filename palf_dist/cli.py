"""The command line: parse, call, print. Heavy libraries are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from palf_dist.usage import usage

if TYPE_CHECKING:
    from palf_dist.config import RunConfig
    from palf_dist.evaluation.report import ReportPaths

app = typer.Typer(
    help="Meta-learns how to weigh losses while a model trains: one policy, over many real datasets, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
datasets_app = typer.Typer(help="List, describe and fetch the datasets that a config can name.", no_args_is_help=True)
app.add_typer(datasets_app, name="datasets")

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override one field, e.g. inner.steps=200; may be repeated."),
]
Workers = Annotated[int | None, typer.Option("--workers", help="Ray workers; 0 runs the same code in process.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="auto|HOST:PORT", help="A running Ray cluster; else a private one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def main() -> None:
    """Entry point: a user's mistake is one message on stderr and exit code 2, without a traceback."""
    try:
        app(prog_name="palf-dist")
    except Exception as error:
        from palf_dist.errors import PalfError

        if not isinstance(error, PalfError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"palf-dist {version('palf-dist')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def meta_train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run; default runs/NAME-TIME. Must be empty.")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Go on with an earlier run from its newest checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train one policy over the datasets of a config and compare it on held-out datasets.

    Ctrl-C saves a checkpoint and ends; --resume goes on. The result does not depend on the number of workers.
    """
    with _output(as_json) as emit:
        from palf_dist.distributed.driver import meta_train as train
        from palf_dist.run_directory import CONFIG

        if resume is None:
            settings = _load(config, overrides, workers, address)
            folder = run_dir or f"runs/{settings.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        else:
            settings, folder = _resumed(resume, run_dir, config, overrides, workers, address), resume
        go_on = f"go on with palf-dist meta-train --resume {folder}"
        try:
            result = train(settings, folder, resume=resume is not None)
        except KeyboardInterrupt:
            if Path(folder, CONFIG).exists():
                print(f"interrupted; {go_on}", file=sys.stderr)
            raise
        record = {
            **(_report_record(result.report) if result.report else {"held_out": []}),
            "run_dir": str(result.run_dir),
            "outer_steps": result.outer_steps,
            "policy": str(result.policy) if result.policy else None,
            "mlflow_run_id": result.mlflow_run_id,
            "contributions": result.contributions,
            "interrupted": result.interrupted,
        }
        if result.interrupted:
            print(f"interrupted and saved; {go_on}", file=sys.stderr)
            if as_json:
                emit(record)
            raise typer.Exit(130)
        assert result.report is not None and result.policy is not None, "a run that was not interrupted has both"
        mlflow = result.mlflow_run_id or "not reached yet; palf-dist report delivers what is left"
        emit(
            record,
            _report_table(result.report),
            *_report_lines(result.report),
            f"policy  {_near(result.policy)}",
            f"mlflow  {mlflow if settings.tracking.enabled else 'off'}",
            "\nin your own training loop:\n" + indent(usage(_near(result.policy)), "    "),
        )


@app.command()
def evaluate(
    policy: Annotated[Path, typer.Argument(metavar="POLICY", help="Policy file, or the folder that holds it.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    workers: Workers = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Compare a policy file with other methods on the held-out datasets of a config.

    Without --config it is the config of the run that the policy lies in.
    """
    with _output(as_json) as emit:
        from palf_dist.distributed.driver import evaluate_policy
        from palf_dist.evaluation.statistics import compare
        from palf_dist.evaluation.table import to_records, to_rich
        from palf_dist.policies.policy_file import load_policy
        from palf_dist.run_directory import CONFIG

        load_policy(policy)  # a damaged file is the first thing to say
        stored = (policy if policy.is_dir() else policy.parent).absolute().parent / CONFIG
        settings = _load(config or (stored if stored.exists() else None), overrides, workers, address)
        comparisons = compare(evaluate_policy(settings, policy))
        emit({"policy": str(policy), "held_out": to_records(comparisons)}, to_rich(comparisons))


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")], as_json: AsJson = False
) -> None:
    """Draw the plots of a run and write its page again, also of a run that is not finished.

    What the run could not deliver to MLflow is delivered now, if the server answers.
    """
    with _output(as_json) as emit:
        from palf_dist.evaluation.report import make_report
        from palf_dist.tracking import deliver_spool

        made = make_report(run_dir)
        undelivered = deliver_spool(Path(run_dir))
        if undelivered:
            print(f"{undelivered} records have not reached MLflow yet", file=sys.stderr)
        emit({**_report_record(made), "undelivered": undelivered}, _report_table(made), *_report_lines(made))


@datasets_app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """The datasets known by name; nothing is downloaded."""
    with _output(as_json) as emit:
        from palf_dist.tasks.datasets import list_datasets

        records = list_datasets()
        table = Table("name", "family", "rows", "classes", "package", "here")
        for record in records:
            here = "yes" if record["cached"] else "no"
            table.add_row(*(escape(str(record[key])) for key in ("name", "family", "rows", "classes", "package")), here)
        emit({"datasets": records}, table)


@datasets_app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJson = False) -> None:
    """Size and shape of one dataset, which is fetched when it is not in the cache."""
    with _output(as_json) as emit:
        from palf_dist.tasks.datasets import describe

        record = describe(name)
        emit(record, _facts(record))


@datasets_app.command()
def fetch(names: Annotated[list[str], typer.Argument(metavar="NAME...")], as_json: AsJson = False) -> None:
    """Bring datasets into the cache ($PALF_CACHE, else ./.palf_cache), where they can be used offline."""
    with _output(as_json) as emit:
        from palf_dist.tasks.datasets import fetch as fetch_datasets

        paths = {name: str(path) for name, path in fetch_datasets(names).items()}
        table = Table("dataset", "file")
        for name, path in paths.items():
            table.add_row(escape(name), escape(path))
        emit({"paths": paths}, table)


def _report_record(made: ReportPaths) -> dict[str, Any]:
    from palf_dist.evaluation.table import to_records

    return {
        "page": str(made.page),
        "pictures": [str(path) for path in made.pictures],
        "held_out": to_records(made.comparisons),
    }


def _report_table(made: ReportPaths) -> RenderableType:
    from palf_dist.evaluation.table import to_rich

    return to_rich(made.comparisons) if made.comparisons else "no held-out comparison yet"


def _report_lines(made: ReportPaths) -> list[str]:
    return [*(f"plot    {_near(path)}" for path in made.pictures), f"page    {_near(made.page)}"]


def _facts(record: dict[str, Any]) -> Table:
    """Names and values in two columns."""
    table = Table(show_header=False)
    for name, value in record.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    return table


def _near(path: Path) -> Path:
    """The path as seen from the working folder, where it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _resumed(
    resume: str,
    run_dir: str | None,
    config: Path | None,
    overrides: list[str] | None,
    workers: int | None,
    address: str | None,
) -> RunConfig:
    """The configuration to go on with: the run's own, but for fields that touch no result."""
    from palf_dist.config_loading import config_differences, load_config
    from palf_dist.errors import ConfigError
    from palf_dist.run_directory import CONFIG, open_run_directory

    if run_dir is not None:
        raise ConfigError(f"--run-dir {run_dir}: a resumed run goes on in its own folder; leave --run-dir out")
    own = open_run_directory(resume) / CONFIG
    settings = _load(config or own, overrides, workers, address)
    differences = config_differences(load_config(own), settings)
    if differences:
        raise ConfigError(
            f"--resume {resume}: the configuration differs from the run's; start a new run, or undo\n"
            + "\n".join(differences)
        )
    return settings


def _load(config: Path | None, overrides: list[str] | None, workers: int | None, address: str | None) -> RunConfig:
    from palf_dist.config_loading import load_config
    from palf_dist.errors import ConfigError
    from palf_dist.evaluation.methods import select_methods

    if config is None:
        raise ConfigError("--config: name the YAML file of the run, for instance --config configs/quick.yaml")
    options = {"distributed.workers": workers, "distributed.address": address}
    extra = [f"{field}={json.dumps(value)}" for field, value in options.items() if value is not None]
    settings = load_config(config, [*(overrides or ()), *extra])
    select_methods(settings.evaluation.methods)
    return settings


class Emit(Protocol):
    """Prints the result of a command."""

    def __call__(self, record: dict[str, Any], table: RenderableType = "", *lines: str) -> None:
        """``record`` as JSON, or for people the table and below it the lines, which are never wrapped."""
        ...


@contextlib.contextmanager
def _output(as_json: bool) -> Iterator[Emit]:
    """Yields how to print the result.

    With ``as_json`` everything else that is written to stdout meanwhile, by native code and child processes too, goes
    to stderr.
    """
    if not as_json:
        yield _print_for_people
        return
    printed: list[str] = []
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda record, table="", *lines: printed.append(json.dumps(record, allow_nan=False))
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        print(*printed, sep="\n", end="\n" if printed else "")


def _print_for_people(record: dict[str, Any], table: RenderableType = "", *lines: str) -> None:
    Console().print(table)
    for line in lines:
        print(line)
