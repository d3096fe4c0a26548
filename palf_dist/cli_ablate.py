"""The command ``ablate``: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from palf_dist.cli_shared import (
    Address,
    AsJson,
    ConfigFile,
    Overrides,
    SuiteOption,
    Workers,
    load_run_config,
    near,
    output,
    overrides_of_suite,
)


def ablate(
    ablations: Annotated[Path, typer.Option("--ablations", metavar="FILE", help="YAML file of the variants.")],
    run_dir: Annotated[
        str,
        typer.Option(metavar="DIR", help="Folder of the runs: finished ones are left, begun ones resumed."),
    ],
    config: ConfigFile = None,
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="One variant, not all; may be repeated.")
    ] = None,
    output_folder: Annotated[
        str | None, typer.Option("--output", metavar="DIR", help="Where the page and its JSON go; default: --run-dir.")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    suite: SuiteOption = None,
    folds: Annotated[
        list[str] | None,
        typer.Option("--fold", metavar="FOLD|FAMILY", help="What of the suite is held out; several folds are joined."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Meta-train a base configuration and variants of it, and compare their policies on the same held-out tasks.

    Ctrl-C saves a checkpoint and ends; the same command goes on.
    """
    with output(as_json) as emit:
        from palf_dist.ablations.config import designs_of, load_ablations
        from palf_dist.ablations.report import make_ablations_report, report_name
        from palf_dist.ablations.runs import run_designs
        from palf_dist.evaluation.designs import published_designs
        from palf_dist.storage import local_path

        folder, written = local_path(run_dir), local_path(output_folder or run_dir)
        chosen: Sequence[str | None] = folds or (None,)
        published_designs(written)  # a file there that is none of ours is not replaced, and not after hours
        bases = {
            "" if fold is None else f"fold-{fold}": load_run_config(
                config, [*overrides_of_suite(suite, fold), *(overrides or ())], workers, address
            )
            for fold in chosen
        }
        designs = designs_of(load_ablations(ablations), bases)
        if not run_designs(designs, folder, only):
            print("interrupted and saved; the same command goes on", file=sys.stderr)
            raise typer.Exit(130)
        made = make_ablations_report(designs, folder, written, report_name(ablations))
        table = Table("variant", "group", "points against the base", "se", "p (Holm)")
        for group, variants in made.record["groups"].items():
            for variant in variants:
                against = variant["against_base"]
                numbers = (against[name] for name in ("difference", "se", "p_holm"))
                table.add_row(variant["name"], group, *("-" if each is None else f"{each:.3f}" for each in numbers))
        emit(
            made.record | {"page": str(made.files[0])},
            table,
            f"held-out designs so far: {made.record['held_out_designs']}",
            *(f"written {near(path)}" for path in made.files),
        )
