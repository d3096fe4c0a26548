"""The published results: the held-out comparisons of several runs as one report, with what it says of the paper's
claims. results.md and results.json are written by this module alone, never by hand."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from palf_dist.atomic import write_atomic
from palf_dist.config import RunConfig
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation import plots
from palf_dist.evaluation.ablation_figures import AblationRecord, more_tasks_figures, read_ablations
from palf_dist.evaluation.as_is import CAVEAT, AsIs, compare_as_is
from palf_dist.evaluation.claims import Evidence, findings
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.designs import (
    RESULTS_JSON,
    Look,
    design_of,
    look,
    other_looks,
    published_designs,
    with_look,
)
from palf_dist.evaluation.headline import Figure, headline
from palf_dist.evaluation.inner_runs import dataset_facts
from palf_dist.evaluation.interpretation import Interpretation, interpret
from palf_dist.evaluation.interpretation_plots import pictures as interpretation_pictures
from palf_dist.evaluation.interpretation_tables import section
from palf_dist.evaluation.interpretation_tables import to_record as interpretation_record
from palf_dist.evaluation.overhead import overhead_figure, read_overheads
from palf_dist.evaluation.report import CAPTIONS, comparison_pictures, headline_sentence, last_trajectories
from palf_dist.evaluation.runs import JoinedRuns, JudgedRun, read_runs
from palf_dist.evaluation.statistics import Comparison
from palf_dist.evaluation.table import (
    NOTHING,
    Cells,
    interval,
    is_policy,
    label_of,
    markdown_table,
    number,
    signed,
    to_cells,
    to_markdown,
    to_pair_records,
    to_records,
)
from palf_dist.evaluation.targets import judge_targets, target_cells
from palf_dist.evaluation.transfer import Transfer, compare_transfer, transfer_figures, transfer_page
from palf_dist.evaluation.verdicts import FEWEST_CLUSTERS
from palf_dist.policies.policy_file import load_policy
from palf_dist.redaction import redact
from palf_dist.run_directory import BEST
from palf_dist.storage import is_remote, join, local_path

RESULTS_MARKDOWN, PICTURES = "results.md", "results"
BLOCK = ("<!-- results -->", "<!-- end of results -->")
"""Around what the README shows of results.md."""


@dataclass(frozen=True)
class Results:
    """What ``make_results`` wrote."""

    markdown: Path
    json: Path
    pictures: tuple[Path, ...]
    comparisons: tuple[Comparison, ...]
    record: dict[str, Any]  # of results.json
    config: RunConfig  # of the first of the runs


@dataclass(frozen=True)
class Joined:
    """What several runs say together: all that the record and the page are made of."""

    runs: JoinedRuns
    compared: Sequence[Comparison]
    pairs: Sequence[Comparison]
    family_compared: Sequence[Comparison]  # of the runs that hold out a family, empty without such runs
    family_pairs: Sequence[Comparison]
    as_is: AsIs
    transfers: Mapping[str, Transfer]
    figures: Mapping[str, Figure]
    family_figures: Mapping[str, Figure]
    trajectories: pa.Table | None
    interpretation: Interpretation | None
    claims: Sequence[Mapping[str, str]]
    targets: Sequence[Mapping[str, Any]]


def make_results(places: Sequence[str], output: str | Path) -> Results:
    """Join the runs at ``places``, paths or URIs, into results.md, results.json and the folder of pictures ``results``
    in the folder ``output``. Equal runs give equal bytes, whatever their order.

    Designs that an earlier results.json or ablations.json there lists stay in the list. What ablations say of claims
    and targets is read there as well, and the overhead from the file that its benchmark wrote. Raises RunDirectoryError
    as ``read_runs``, for an output folder that cannot be written, and for one of these files that is none.
    """
    if is_remote(output):
        raise RunDirectoryError(f"--output {redact(str(output))}: is no local folder; name one")
    folder = local_path(output)
    published = published_designs(folder)
    overhead, ablations = overhead_figure(read_overheads(folder)), read_ablations(folder)
    runs = read_runs(places)
    joined = _joined(runs, overhead, ablations)
    looks = _looks(runs, joined.figures)
    designs = reduce(with_look, looks, published)
    record = _record(joined, designs)
    pictures = comparison_pictures(joined.compared)
    if joined.trajectories is not None:
        pictures["alpha"] = plots.to_png(plots.plot_alpha(joined.trajectories))
    explained = {} if joined.interpretation is None else interpretation_pictures(joined.interpretation)
    page = _page(joined, len(designs), other_looks(designs, looks[0]), list(pictures), list(explained))
    pictures |= explained
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
        tuple(joined.compared),
        record,
        runs.config,
    )


def _joined(runs: JoinedRuns, overhead: Figure, ablations: Sequence[AblationRecord]) -> Joined:
    rows, family_rows = runs.rows, runs.family_rows
    compared, pairs = held_out(rows)
    as_is = compare_as_is(rows, runs.config.evaluation)
    transfers = {
        kind: compare_transfer(kind, judged[0].config, judged[0].card, [row for run in judged for row in run.rows])
        for kind, judged in runs.transfers.items()
    }
    figures = headline(rows, compared, pairs, runs.config) | transfer_figures(transfers)
    figures |= as_is.figures() | {overhead.name: overhead} | more_tasks_figures(ablations, design_of(runs.config))
    family_compared, family_pairs = held_out(family_rows) if family_rows else ([], [])
    family_figures = headline(family_rows, family_compared, family_pairs, runs.config) if family_rows else {}
    trajectories = _trajectories(runs.explained)
    interpretation = None if trajectories is None else _interpretation(runs, trajectories)
    evidence = Evidence(
        runs.config, figures, family_figures, rows, compared, pairs, trajectories, interpretation, ablations
    )
    return Joined(
        runs=runs,
        compared=compared,
        pairs=pairs,
        family_compared=family_compared,
        family_pairs=family_pairs,
        as_is=as_is,
        transfers=transfers,
        figures=figures,
        family_figures=family_figures,
        trajectories=trajectories,
        interpretation=interpretation,
        claims=findings(evidence),
        targets=judge_targets(figures, family_figures, {run.family for run in runs.families}),
    )


def _record(joined: Joined, designs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """results.json."""
    figures, interpretation = joined.figures, joined.interpretation
    return {
        "headline": {name: number(figure.value) for name, figure in figures.items()}
        | {"held_out_designs": len(designs)},
        "not_measured": {name: figure.meaning for name, figure in figures.items() if figure.value is None},
        "headline_details": {name: _details(figure) for name, figure in figures.items() if figure.estimate is not None},
        "as_is": joined.as_is.record(),
        "targets": joined.targets,
        "claims": joined.claims,
        "designs": designs,
        "table": to_records(joined.compared),
        "pairs": to_pair_records(joined.pairs),
        "families": to_records(joined.family_compared),
        "family_headline": {name: number(figure.value) for name, figure in joined.family_figures.items()},
        "interpretation": None if interpretation is None else interpretation_record(interpretation),
        "transfers": {kind: to_records(transfer.compared) for kind, transfer in joined.transfers.items()},
        "runs": [_about(run, joined.runs) for run in joined.runs.all],
    }


def _looks(runs: JoinedRuns, figures: Mapping[str, Figure]) -> list[Look]:
    """At the design of the folds, and at those of transfers."""
    judged = {"diff_vs_tuned_ce": runs.folds}
    judged |= {f"diff_{kind}_transfer": transferred for kind, transferred in runs.transfers.items()}
    return [
        look(each[0].config, {dataset for run in each for dataset in run.judged}, number(figures[name].value))
        for name, each in judged.items()
    ]


def _trajectories(folds: Sequence[JudgedRun]) -> pa.Table | None:
    """Those of the last outer steps of these runs, with the number of the run as a column. Raises RunDirectoryError
    where the columns of two runs differ."""
    tables: list[tuple[str, pa.Table]] = []
    for index, run in enumerate(folds):
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
    folds = runs.explained
    sources = [source for run in folds for source in run.config.data.train]
    facts = dataset_facts(trajectories["dataset"].unique().to_pylist(), sources, runs.rows)
    return interpret(trajectories, runs.config, facts, [load_policy(join(run.place, BEST)) for run in folds])


def _details(figure: Figure) -> dict[str, Any]:
    estimate = figure.estimate
    assert estimate is not None
    return {
        "meaning": figure.meaning,
        "against": figure.of,
        "missing": list(figure.missing),
        "unit": figure.unit,
        "difference": number(estimate.mean),
        "se": number(estimate.se),
        "ci95": None if number(estimate.se) is None else [number(estimate.low), number(estimate.high)],
        "tasks": estimate.tasks,
        "clusters": estimate.clusters,
    }


def _about(run: JudgedRun, runs: JoinedRuns) -> dict[str, Any]:
    return {
        "name": run.config.name,
        "policy": run.config.policy.kind,
        "held_out": run.judged,
        "family": run.family,
        "transfer": run.transfer,
        "trained_apart": runs.trained_apart(run),
        "trained_on": run.card["trained_on"],
        "outer_step": run.card.get("outer_step"),
        "selection_score": run.card.get("selection_score"),
        "seeds": run.config.evaluation.seeds,
    }


def _again(other: Sequence[float]) -> str:
    found = ", ".join(dict.fromkeys(f"{difference:+.2f}" for difference in other))
    return f" The same one, trained or judged at other times: {found} points against tuned CE." if other else ""


def _page(
    joined: Joined, designs: int, other: Sequence[float], compared: Sequence[str], explained: Sequence[str]
) -> str:
    """results.md. ``other``: what other looks at the same design found; ``compared``, ``explained``: names of the
    pictures of the comparison, and of the interpretation."""
    runs, figures, as_is = joined.runs, joined.figures, joined.as_is

    def shown(names: Sequence[str]) -> list[str]:
        return [f"![{name}]({PICTURES}/{name}.png)\n\n{CAPTIONS[name]}\n" for name in names]

    shifted = {row["condition"] for row in runs.rows if row["target_prior"] != "train"}
    parts = [
        f"# Results: {runs.config.name}\n",
        "Written by `palf-dist results`, never by hand; [evaluation.md](evaluation.md) explains every figure, and "
        f"[{RESULTS_JSON}]({RESULTS_JSON}) has them all.\n",
        "## The held-out comparison\n",
        BLOCK[0],
        f"**{headline_sentence(joined.compared)}**\n",
        f"Designs judged on held-out datasets and published here so far, this one among them: {designs}."
        + _again(other)
        + "\n",
        _brief_table(joined.compared, shifted) + BLOCK[1] + "\n",
        "All conditions and rates of noise:\n",
        to_markdown(joined.compared, joined.pairs),
        "## Headline\n",
        markdown_table(_headline_cells(figures), texts=2),
        "## What was to be reached\n",
        "Gains in points of clean test accuracy over what is named, on held-out datasets, as set before these "
        f"measurements. *not measured* also with fewer than {FEWEST_CLUSTERS} independent datasets.\n",
        markdown_table(target_cells(joined.targets), texts=4),
        *(["## Datasets as they are\n", f"{CAVEAT}\n", markdown_table(as_is.cells())] if as_is.differences else []),
        *shown(compared),
        "## What the policy does\n",
        *section(joined.interpretation),
        *shown(explained),
    ]
    if runs.families:
        families = ", ".join(sorted({run.family or "" for run in runs.families}))
        parts += [
            "## Families never seen\n",
            f"Each family ({families}) judged by a policy that was trained on none of it.\n",
            to_markdown(joined.family_compared, joined.family_pairs),
            "The headline figures of these runs:\n",
            markdown_table(_headline_cells(joined.family_figures), texts=2),
        ]
    parts += [
        *transfer_page(joined.transfers),
        "## The claims of the paper\n",
        "*reproduced* where the 95 % interval lies above zero and the mean reaches what is claimed; *opposite* where "
        "the interval lies below zero; else *not reproduced*. *not measured* where there is no such figure, or fewer "
        f"than {FEWEST_CLUSTERS} independent datasets. The claims about every dataset, distinct phases, features "
        "and updates have rules of their own, and that about time goes by the benchmark of overhead alone.\n",
        markdown_table((["claim", "measured", "verdict"], [list(entry.values()) for entry in joined.claims]), texts=3),
        "## Runs\n",
        markdown_table(_run_cells(runs), texts=3),
    ]
    return "\n".join(parts)


def _brief_table(comparisons: Sequence[Comparison], shifted: Collection[str]) -> str:
    """The first table of the page with its main columns alone: over all tasks, with no noise, with the highest
    rate of the first kind of noise, and the ``shifted`` conditions."""
    kinds = [noise for noise in comparisons[0].by_noise if noise.rate]
    shown = [f"noise {noise}" for noise in comparisons[0].by_noise if not noise.rate]
    shown += [f"noise {noise}" for noise in kinds if noise.kind == kinds[0].kind][-1:]
    header, rows = to_cells(comparisons)
    kept = [index for index, name in enumerate(header) if index < 4 or name in shown or name in shifted]
    cells = [header[index] for index in kept], [[row[index] for index in kept] for row in rows]
    return markdown_table(cells, [is_policy(item.method) for item in comparisons])


def _headline_cells(figures: Mapping[str, Figure]) -> Cells:
    rows = []
    for figure in figures.values():
        value, within, meaning = NOTHING, NOTHING, f"not measured: {figure.meaning}"
        if figure.value is not None:
            value = f"{figure.value:.2f}" if isinstance(figure.value, float) else str(figure.value)
            meaning = f"{figure.meaning}, against {label_of(figure.of)}" if figure.of else figure.meaning
        if figure.estimate is not None and figure.value == figure.estimate.mean:  # rather than a ratio
            value, within = signed(figure.estimate), interval(figure.estimate)
        rows.append([f"`{figure.name}`", meaning, value, within])
    return ["figure", "of what", "value", "95 % interval"], rows


def _run_cells(runs: JoinedRuns) -> Cells:
    rows = []
    for run in runs.all:
        about = _about(run, runs)
        apart = ", of a policy trained at another time" if about["trained_apart"] else ""
        score = about["selection_score"]
        rows.append(
            [
                f"{about['name']} ({about['transfer']} transfer{apart})" if about["transfer"] else about["name"],
                about["policy"],
                ", ".join(about["held_out"]),
                f"{len(about['trained_on'])} datasets",
                NOTHING if about["outer_step"] is None else str(about["outer_step"]),
                NOTHING if score is None else f"{100 * score:+.2f}",
            ]
        )
    header = ["run", "policy", "held out", "trained on", "outer steps", "points against CE on training tasks"]
    return header, rows
