"""The published results: the held-out comparisons of several runs as one report, with what it says of the paper's
claims. results.md and results.json are written by this module alone, never by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from palf_dist.atomic import write_atomic
from palf_dist.config import RunConfig
from palf_dist.config_loading import leaves
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation import plots
from palf_dist.evaluation.claims import FEWEST_CLUSTERS, Evidence, findings
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.headline import Figure, headline
from palf_dist.evaluation.inner_runs import dataset_facts
from palf_dist.evaluation.interpretation import Interpretation, interpret
from palf_dist.evaluation.interpretation_plots import pictures as interpretation_pictures
from palf_dist.evaluation.interpretation_tables import section
from palf_dist.evaluation.interpretation_tables import to_record as interpretation_record
from palf_dist.evaluation.report import CAPTIONS, comparison_pictures, headline_sentence, last_trajectories
from palf_dist.evaluation.runs import JoinedRuns, JudgedRun, read_runs
from palf_dist.evaluation.statistics import Comparison
from palf_dist.evaluation.table import (
    NOTHING,
    Cells,
    interval,
    label_of,
    markdown_table,
    number,
    signed,
    to_markdown,
    to_pair_records,
    to_records,
)
from palf_dist.policies.policy_file import load_policy
from palf_dist.redaction import redact
from palf_dist.run_directory import BEST
from palf_dist.storage import is_remote, join, local_path

RESULTS_MARKDOWN, RESULTS_JSON, PICTURES = "results.md", "results.json", "results"

NOT_OF_A_DESIGN: dict[str, Any] = {
    "name": True,
    "seed": True,
    "data": True,
    "policy": {"seed"},
    "evaluation": {"methods", "noise_rates", "conditions", "suite_conditions", "imbalance", "seeds"},
    "distributed": {"workers", "address", "gpus_per_worker", "unit_timeout", "max_attempts"},
    "checkpoint": True,
    "tracking": True,
}
"""Fields that do not make another design: what is learned from and judged on, seeds, and execution settings that do not
touch a result."""


@dataclass(frozen=True)
class Results:
    """What ``make_results`` wrote."""

    markdown: Path
    json: Path
    pictures: tuple[Path, ...]
    comparisons: tuple[Comparison, ...]
    record: dict[str, Any]  # of results.json


def make_results(places: Sequence[str], output: str | Path) -> Results:
    """Join the runs at ``places``, paths or URIs, into results.md, results.json and the folder of pictures ``results``
    in the folder ``output``. Equal runs give equal bytes, whatever their order.

    Designs that an earlier results.json there lists stay in the list. Raises RunDirectoryError as ``read_runs``, for
    an output folder that cannot be written, and for a results.json in it that is none.
    """
    if is_remote(output):
        raise RunDirectoryError(f"--output {redact(str(output))}: is no local folder; name one")
    folder = local_path(output)
    published = _published_designs(folder / RESULTS_JSON)
    runs = read_runs(places)
    rows = runs.rows
    compared, pairs = held_out(rows)
    figures = headline(rows, compared, pairs)
    family_rows = runs.family_rows
    family_compared, family_pairs = held_out(family_rows) if family_rows else ([], [])
    family_figures = headline(family_rows, family_compared, family_pairs) if family_rows else {}
    trajectories = _trajectories(runs.folds)
    interpretation = None if trajectories is None else _interpretation(runs, trajectories)
    claims = findings(
        Evidence(runs.config, figures, family_figures, rows, compared, pairs, trajectories, interpretation)
    )
    designs = _with_design(published, runs, figures["diff_vs_tuned_ce"])
    record = {
        "headline": {name: number(figure.value) for name, figure in figures.items()}
        | {"held_out_designs": len(designs)},
        "not_measured": {name: figure.meaning for name, figure in figures.items() if figure.value is None},
        "headline_details": {name: _details(figure) for name, figure in figures.items() if figure.estimate is not None},
        "claims": claims,
        "designs": designs,
        "table": to_records(compared),
        "pairs": to_pair_records(pairs),
        "families": to_records(family_compared),
        "family_headline": {name: number(figure.value) for name, figure in family_figures.items()},
        "interpretation": None if interpretation is None else interpretation_record(interpretation),
        "runs": [_about(run) for run in (*runs.folds, *runs.families)],
    }
    pictures = comparison_pictures(compared)
    if trajectories is not None:
        pictures["alpha"] = plots.to_png(plots.plot_alpha(trajectories))
    explained = {} if interpretation is None else interpretation_pictures(interpretation)
    shown = (list(pictures), list(explained))
    pictures |= explained
    family_tables = (family_compared, family_pairs)
    page = _page(runs, figures, (compared, pairs), family_tables, interpretation, claims, designs, shown)
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for name in CAPTIONS:
            if name in pictures:
                write_atomic(folder / PICTURES / f"{name}.png", pictures[name])
            else:  # of other runs
                (folder / PICTURES / f"{name}.png").unlink(missing_ok=True)
        # Of the two the one that counts the designs comes first.
        write_atomic(folder / RESULTS_JSON, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
        write_atomic(folder / RESULTS_MARKDOWN, page.encode())
    except OSError as error:
        raise RunDirectoryError(
            f"--output {folder}: cannot be written ({error.strerror}); name another folder"
        ) from error
    return Results(
        folder / RESULTS_MARKDOWN,
        folder / RESULTS_JSON,
        tuple(folder / PICTURES / f"{name}.png" for name in pictures),
        tuple(compared),
        record,
    )


def design_of(config: RunConfig) -> str:
    """Digest of all that makes a design of a configuration. Fields at their default are left out, so that a design
    stays the same when a later version has more fields."""
    fields = leaves(config.model_dump(mode="json", exclude=NOT_OF_A_DESIGN, exclude_defaults=True))
    # The kinds of architectures tell them apart, also the one that is the default of its own section.
    fields["tasks.architectures"] = [item.model_dump(mode="json") for item in config.tasks.architectures]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _published_designs(path: Path) -> list[dict[str, Any]]:
    """The designs of an earlier results.json; none where there is no such file."""
    try:
        designs = json.loads(path.read_bytes())["designs"]
        if all({"digest", "name"} <= design.keys() for design in designs):
            return designs
        problem = "its designs have no digest and name"
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise RunDirectoryError(
        f"{path}: is no file of this command ({problem}), and the designs that it counts would be lost; restore it, or "
        "name another --output"
    )


def _with_design(published: list[dict[str, Any]], runs: JoinedRuns, figure: Figure) -> list[dict[str, Any]]:
    """The designs so far and this one, last where it is new. An entry stays unless all but its name is the same: to
    judge a design again, with another seed or on other datasets, is another look at held-out data."""
    config = runs.config
    datasets = sorted({name for run in runs.folds for name in run.judged})
    looked = {"digest": design_of(config), "seed": config.seed, "datasets": datasets, figure.name: number(figure.value)}
    own = {"name": config.name, **looked}
    designs = [own if design == looked | {"name": design["name"]} else design for design in published]
    return designs if own in designs else [*designs, own]


def _trajectories(folds: Sequence[JudgedRun]) -> pa.Table | None:
    """Those of the last outer steps of the runs of the policy, with the number of the run as a column. Raises
    RunDirectoryError where the columns of two runs differ."""
    tables: list[tuple[str, pa.Table]] = []
    for index, run in enumerate(run for run in folds if run.learned is None):
        table = last_trajectories(run.place)
        if table is None:
            continue
        if tables and table.schema.names != tables[0][1].schema.names[:-1]:
            raise RunDirectoryError(
                f"{run.place}: its trajectories have other columns than those of {tables[0][0]}; name runs of one "
                "version of palf_dist"
            )
        tables.append((run.place, table.append_column("run", pa.array(np.full(table.num_rows, index)))))
    return pa.concat_tables([table for _, table in tables]) if tables else None


def _interpretation(runs: JoinedRuns, trajectories: pa.Table) -> Interpretation:
    """Of the trajectories that ``_trajectories`` gives."""
    folds = [run for run in runs.folds if run.learned is None]
    sources = [source for run in folds for source in run.config.data.train]
    facts = dataset_facts(trajectories["dataset"].unique().to_pylist(), sources, runs.rows)
    return interpret(trajectories, runs.config, facts, [load_policy(join(run.place, BEST)) for run in folds])


def _details(figure: Figure) -> dict[str, Any]:
    estimate = figure.estimate
    assert estimate is not None
    return {
        "meaning": figure.meaning,
        "against": figure.of,
        "difference": number(estimate.mean),
        "se": number(estimate.se),
        "ci95": None if number(estimate.se) is None else [number(estimate.low), number(estimate.high)],
        "tasks": estimate.tasks,
        "clusters": estimate.clusters,
    }


def _about(run: JudgedRun) -> dict[str, Any]:
    return {
        "name": run.config.name,
        "policy": run.config.policy.kind,
        "held_out": run.judged,
        "family": run.family,
        "trained_on": run.card["trained_on"],
        "outer_step": run.card.get("outer_step"),
        "selection_score": run.card.get("selection_score"),
        "seeds": run.config.evaluation.seeds,
    }


def _page(
    runs: JoinedRuns,
    figures: Mapping[str, Figure],
    tables: tuple[Sequence[Comparison], Sequence[Comparison]],
    family_tables: tuple[Sequence[Comparison], Sequence[Comparison]],
    interpretation: Interpretation | None,
    claims: Sequence[Mapping[str, str]],
    designs: Sequence[Mapping[str, Any]],
    pictures: tuple[Sequence[str], Sequence[str]],
) -> str:
    """results.md. ``pictures``: names of those of the comparison, and of the interpretation."""
    compared, explained = ([f"![{name}]({PICTURES}/{name}.png)\n\n{CAPTIONS[name]}\n" for name in p] for p in pictures)
    parts = [
        f"# Results: {runs.config.name}\n",
        "Written by `palf-dist results`, never by hand; [evaluation.md](evaluation.md) explains every figure, and "
        f"[{RESULTS_JSON}]({RESULTS_JSON}) has them all.\n",
        f"**{headline_sentence(tables[0])}**\n",
        "## Headline\n",
        markdown_table(_headline_cells(figures), texts=2),
        "## The held-out comparison\n",
        f"Designs judged on held-out datasets and published here so far, this one among them: {len(designs)}.\n",
        to_markdown(*tables),
        *compared,
        "## What the policy does\n",
        *section(interpretation),
        *explained,
    ]
    if runs.families:
        families = ", ".join(sorted({run.family or "" for run in runs.families}))
        parts += [
            "## Families never seen\n",
            f"Each family ({families}) judged by a policy that was trained on none of it.\n",
            to_markdown(*family_tables),
        ]
    parts += [
        "## The claims of the paper\n",
        "*reproduced* where the 95 % interval lies above zero and the mean reaches what is claimed; *opposite* where "
        "the interval lies below zero; else *not reproduced*. *not measured* where there is no such figure, or fewer "
        f"than {FEWEST_CLUSTERS} independent datasets. The claims about every dataset, distinct phases and features "
        "have rules of their own.\n",
        markdown_table((["claim", "measured", "verdict"], [list(entry.values()) for entry in claims]), texts=3),
        "## Runs\n",
        markdown_table(_run_cells((*runs.folds, *runs.families)), texts=3),
    ]
    return "\n".join(parts)


def _headline_cells(figures: Mapping[str, Figure]) -> Cells:
    rows = []
    for figure in figures.values():
        value, within, meaning = NOTHING, NOTHING, f"not measured: {figure.meaning}"
        if figure.value is not None:
            value = f"{figure.value:.2f}"
            meaning = f"{figure.meaning}, against {label_of(figure.of)}" if figure.of else figure.meaning
        if figure.estimate is not None and figure.value == figure.estimate.mean:  # rather than a ratio
            value, within = signed(figure.estimate), interval(figure.estimate)
        rows.append([f"`{figure.name}`", meaning, value, within])
    return ["figure", "of what", "value", "95 % interval"], rows


def _run_cells(runs: Sequence[JudgedRun]) -> Cells:
    rows = []
    for run in runs:
        about = _about(run)
        score = about["selection_score"]
        rows.append(
            [
                about["name"],
                about["policy"],
                ", ".join(about["held_out"]),
                f"{len(about['trained_on'])} datasets",
                NOTHING if about["outer_step"] is None else str(about["outer_step"]),
                NOTHING if score is None else f"{100 * score:+.2f}",
            ]
        )
    header = ["run", "policy", "held out", "trained on", "outer steps", "points against CE on training tasks"]
    return header, rows
