"""The command ``results``: parse, call, print."""

from __future__ import annotations

from typing import Annotated

import typer

from palf_dist.cli_shared import AsJson, Overrides, near, output


def results(
    run_dirs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR...", help="Folders or URIs of runs, or their results.parquet."),
    ],
    output_folder: Annotated[
        str, typer.Option("--output", metavar="DIR", help="Where results.md, results.json and results/*.png go.")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Join the held-out comparisons of several runs, one for each fold of a suite, into one report.

    Besides, runs that hold out a family, and runs of a learned schedule, of learned constants or of MAML-Loss
    (policy.kind). It is logged to MLflow where the runs were; --set takes fields of tracking.
    """
    with output(as_json) as emit:
        from palf_dist.evaluation.results import make_results
        from palf_dist.evaluation.results_tracking import given_tracking, track_results, tracking_of
        from palf_dist.evaluation.table import to_rich

        given = given_tracking(overrides or ())
        made = make_results(run_dirs, output_folder)
        tracking = tracking_of(made, given)
        mlflow = track_results(made, run_dirs, tracking)
        paths = {
            "page": str(made.markdown),
            "json": str(made.json),
            "pictures": [str(path) for path in made.pictures],
        }
        said = {name: made.record[name] for name in ("headline", "not_measured", "targets", "claims", "designs")}
        figures = {name: value for name, value in made.record["headline"].items() if value is not None}
        emit(
            {**paths, **said, "mlflow_run_id": mlflow},
            to_rich(made.comparisons),
            *(
                f"family  {run['family']}: {run['name']} trained on none of it: no fold, it has a table of its own"
                for run in made.record["runs"]
                if run["family"]
            ),
            *(f"{name:<36} {value:g}" for name, value in figures.items()),
            *(f"plot    {near(path)}" for path in made.pictures),
            f"page    {near(made.markdown)}",
            f"mlflow  {mlflow or ('not reached' if tracking.enabled else 'off')}",
        )
