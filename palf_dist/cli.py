"""The command line: parse, call, print. Heavy libraries are imported inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from palf_dist.cli_ablate import ablate
from palf_dist.cli_doctor import doctor
from palf_dist.cli_jobs import OWN_OPTIONS_FIRST, jobs_app, submit
from palf_dist.cli_policy import policy_app
from palf_dist.cli_results import results
from palf_dist.cli_shared import (
    Address,
    AsJson,
    ConfigFile,
    FoldOption,
    Overrides,
    SuiteOption,
    Workers,
    config_of_policy,
    load_run_config,
    near,
    new_folder,
    output,
    overrides_of_suite,
    policy_to_evaluate,
    refuse_quick_results,
    resumed_run_config,
    told_how_to_go_on,
)
from palf_dist.cli_tune import tune
from palf_dist.usage import usage

if TYPE_CHECKING:
    from palf_dist.evaluation.report import ReportPaths
    from palf_dist.search.report import SearchReport

app = typer.Typer(
    help="Meta-learns how to weigh losses while a model trains: one policy, over many real datasets, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
datasets_app = typer.Typer(help="List, describe and fetch the datasets that a config can name.", no_args_is_help=True)
app.add_typer(datasets_app, name="datasets")
app.command()(tune)
app.command(context_settings=OWN_OPTIONS_FIRST)(submit)
app.command()(doctor)
app.command()(results)
app.command()(ablate)
app.add_typer(jobs_app, name="jobs")
app.add_typer(policy_app, name="policy")


def main() -> None:
    """Entry point: a user's mistake is one message on stderr and exit code 2, without a traceback; anything else
    has one. Neither shows secrets."""
    try:
        app(prog_name="palf-dist")
    except Exception as error:
        from palf_dist.errors import PalfError
        from palf_dist.redaction import redact

        if isinstance(error, PalfError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(1)


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
        str | None,
        typer.Option(metavar="DIR", help="Folder or URI (s3://...) of the run; default runs/NAME-TIME. Must be empty."),
    ] = None,
    workers: Workers = None,
    address: Address = None,
    suite: SuiteOption = None,
    fold: FoldOption = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Go on with an earlier run from its newest checkpoint.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train one policy over the datasets of a config and compare it on held-out datasets.

    Ctrl-C saves a checkpoint and ends; --resume goes on. The result does not depend on the number of workers.
    """
    with output(as_json) as emit:
        from palf_dist.distributed.driver import meta_train as train
        from palf_dist.policies.meta_learned import needs_parameters

        overrides = [*overrides_of_suite(suite, fold), *(overrides or ())]
        if resume is None:
            settings = load_run_config(config, overrides, workers, address)
            folder = run_dir or new_folder(settings.name)
        else:
            settings = resumed_run_config(resume, run_dir, "meta-train", config, overrides, workers, address)
            folder = resume
        go_on = f"go on with palf-dist meta-train --resume {folder}"
        with told_how_to_go_on(folder, go_on):
            result = train(settings, folder, resume=resume is not None)
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
        hint = ["\nin your own training loop:\n" + indent(usage(near(result.policy)), "    ")]
        if needs_parameters(settings.policy):  # AdaptiveLoss refuses it
            hint = []
        mlflow = result.mlflow_run_id or "not reached yet; palf-dist report delivers what is left"
        emit(
            record,
            _report_table(result.report),
            *_report_lines(result.report),
            f"policy  {near(result.policy)}",
            f"mlflow  {mlflow if settings.tracking.enabled else 'off'}",
            *hint,
        )


@app.command()
def evaluate(
    policy: Annotated[
        str | None,
        typer.Argument(
            metavar="POLICY",
            show_default=False,
            help="Policy file, its folder (path or URI), models:/NAME@ALIAS, or default.",
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    workers: Workers = None,
    address: Address = None,
    suite: SuiteOption = None,
    fold: FoldOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Cut everything down to minutes: shows that it works, gives no results.")
    ] = False,
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder or URI that keeps it, for report and results. Must be empty."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Go on with an evaluation that is kept; POLICY is its own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a policy file with other methods on the held-out datasets of a config.

    Without --config it is the config of the run that the policy lies in. Architectures and inner.steps may be others
    than in its training. One that is kept by --run-dir goes on with --resume after a Ctrl-C, or whatever ended it.
    """
    with output(as_json) as emit:
        from palf_dist.distributed.driver import evaluate_policy
        from palf_dist.evaluation.derived import held_out
        from palf_dist.evaluation.quick import NO_RESULTS, cut
        from palf_dist.evaluation.table import to_records, to_rich
        from palf_dist.policies.policy_file import load_policy

        overrides = [*overrides_of_suite(suite, fold), *(overrides or ())]
        refuse_quick_results(quick, run_dir, resume)
        policy = policy_to_evaluate(policy, resume)
        if resume is None:
            artefact = load_policy(policy)  # a damaged file is the first thing to say
            settings = load_run_config(config or config_of_policy(policy), overrides, workers, address)
        else:
            settings = resumed_run_config(resume, run_dir, "evaluate", config, overrides, workers, address)
            artefact = load_policy(policy)
        kept = run_dir if resume is None else resume
        with told_how_to_go_on(kept, f"go on with palf-dist evaluate --resume {kept}", "interrupted and saved"):
            rows = evaluate_policy(
                cut(settings) if quick else settings, artefact, run_dir=kept, resume=resume is not None
            )
        comparisons, _ = held_out(rows)
        record = {"policy": policy, "quick": quick, "held_out": to_records(comparisons)}
        emit(record, to_rich(comparisons), *([NO_RESULTS] if quick else []))


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder or URI of a run.")], as_json: AsJson = False
) -> None:
    """Draw the plots of a run or a search and write its page again, also of one that is not finished.

    What the run could not deliver to MLflow is delivered now, if the server answers; that of a run under a URI when it
    is resumed.
    """
    with output(as_json) as emit:
        from palf_dist.evaluation.report import make_remote_report, make_report
        from palf_dist.search.report import is_search, make_search_report
        from palf_dist.storage import is_remote, local_path
        from palf_dist.tracking import deliver_spool

        if is_remote(run_dir):
            remote = make_remote_report(run_dir)
            emit(_report_record(remote), _report_table(remote), *_report_lines(remote))
            return
        folder = local_path(run_dir)
        made = make_search_report(folder) if is_search(folder) else make_report(folder)
        undelivered = deliver_spool(folder)
        if undelivered:
            print(f"{undelivered} records have not reached MLflow yet", file=sys.stderr)
        emit({**_report_record(made), "undelivered": undelivered}, _report_table(made), *_report_lines(made))


@datasets_app.command("list")
def list_command(suite: SuiteOption = None, as_json: AsJson = False) -> None:
    """The datasets known by name, or those of a suite; nothing is downloaded."""
    with output(as_json) as emit:
        from palf_dist.tasks.datasets import list_datasets
        from palf_dist.tasks.suites import list_suite, load_suite

        records = list_suite(load_suite(suite)) if suite else list_datasets()
        columns = ["name", "family", "rows", "classes", "package", *(["fold"] if suite else [])]
        table = Table(*columns, "here")
        for record in records:
            cells = ["" if record[key] is None else escape(str(record[key])) for key in columns]
            table.add_row(*cells, {True: "yes", False: "no", None: ""}[record["cached"]])
        emit({"datasets": records}, table)


@datasets_app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: AsJson = False) -> None:
    """Size and shape of one dataset, which is fetched when it is not in the cache."""
    with output(as_json) as emit:
        from palf_dist.tasks.datasets import describe

        record = describe(name)
        emit(record, _facts(record))


@datasets_app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", show_default=False)] = None,
    suite: SuiteOption = None,
    as_json: AsJson = False,
) -> None:
    """Bring datasets, or all those of a suite, into the cache ($PALF_CACHE, else ./.palf_cache), where they can be used
    offline. Parquet paths of a suite stay where they are; they are only looked up."""
    with output(as_json) as emit:
        from palf_dist.errors import ConfigError
        from palf_dist.tasks.datasets import fetch as fetch_datasets
        from palf_dist.tasks.registry import find_entry
        from palf_dist.tasks.suites import fetch_suite, load_suite

        if not names and not suite:
            raise ConfigError("nothing to fetch: name datasets, or a suite with --suite")
        for name in names or ():
            find_entry(name)  # a slip is the first thing to say
        paths = fetch_suite(load_suite(suite)) if suite else {}
        paths |= {name: str(path) for name, path in fetch_datasets(names or []).items()}
        table = Table("dataset", "file")
        for name, path in paths.items():
            table.add_row(escape(name), escape(path))
        emit({"paths": paths}, table)


def _report_record(made: ReportPaths | SearchReport) -> dict[str, Any]:
    from palf_dist.evaluation.report import ReportPaths
    from palf_dist.evaluation.table import to_records

    record = {"page": str(made.page), "pictures": [str(path) for path in made.pictures]}
    if isinstance(made, ReportPaths):
        return {**record, "held_out": to_records(made.comparisons)}
    return {**record, "best": made.best and asdict(made.best)}


def _report_table(made: ReportPaths | SearchReport) -> RenderableType:
    from palf_dist.evaluation.report import ReportPaths
    from palf_dist.evaluation.table import to_rich

    if not isinstance(made, ReportPaths):
        return made.headline
    return to_rich(made.comparisons) if made.comparisons else "no held-out comparison yet"


def _report_lines(made: ReportPaths | SearchReport) -> list[str]:
    return [*(f"plot    {near(path)}" for path in made.pictures), f"page    {near(made.page)}"]


def _facts(record: dict[str, Any]) -> Table:
    """Names and values in two columns."""
    table = Table(show_header=False)
    for name, value in record.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    return table
