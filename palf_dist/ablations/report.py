"""What ablations came to: each variant's policy against the base's on the same held-out tasks, and the curve of the
number of meta-training tasks. ablations.md and ablations.json, and those of other files of variants, are written by
this module alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from palf_dist.ablations.config import BASE, Design
from palf_dist.ablations.runs import is_finished
from palf_dist.atomic import write_atomic
from palf_dist.config import RunConfig
from palf_dist.config_loading import config_differences
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.designs import ABLATIONS, design_of, look, published_designs, with_look
from palf_dist.evaluation.inference import Estimate
from palf_dist.evaluation.methods import REFERENCE
from palf_dist.evaluation.plots import BLACK, FIGURE_STYLE, POLICY_COLOUR, to_png
from palf_dist.evaluation.runs import read_run, unlike
from palf_dist.evaluation.statistics import TASK_KEYS, Comparison, compare
from palf_dist.evaluation.table import (
    certainty,
    extent,
    interval,
    label_of,
    markdown_table,
    number,
    signed,
    to_pair_records,
)
from palf_dist.evaluation.verdicts import FEWEST_CLUSTERS
from palf_dist.policies import policy_spec
from palf_dist.units import groups_seen

COLUMNS = (*TASK_KEYS, "origin", "accuracy")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """A policy that was meta-trained on so many different tasks."""

    tasks: int
    design: Design
    against: Comparison  # with tuned CE
    gains: Sequence[Comparison]  # over each of the points before, which saw fewer tasks


@dataclass(frozen=True)
class AblationsReport:
    """What ``make_ablations_report`` wrote."""

    files: tuple[Path, ...]  # the page first
    record: dict[str, Any]  # of ablations.json


def report_name(variants: Path) -> str:
    """What the report on a file of variants is called, so that those of several files go into one folder."""
    return variants.stem if variants.stem.startswith(ABLATIONS) else f"{ABLATIONS}-{variants.stem}"


def make_ablations_report(
    designs: Sequence[Design], run_dir: Path, output: Path, name: str = ABLATIONS
) -> AblationsReport:
    """Compare the base with all variants that are finished in ``run_dir``: NAME.md, NAME.json and NAME_tasks.png, the
    picture of the curve, in the folder ``output``.

    Every one of them is counted as a design, beside those that the files of earlier commands in ``output`` list. Raises
    RunDirectoryError for results that are damaged or not of the same tasks, and for an output that cannot be written.
    """
    published = published_designs(output)
    finished = [design for design in designs if all(is_finished(design, run_dir, fold) for fold in design.configs)]
    rows = {design.name: _rows(design, run_dir) for design in finished}
    _check_same_reference(rows)
    policies = {name: _of(found, "policy", name) for name, found in rows.items()}
    together = [*_of(rows[BASE], REFERENCE, REFERENCE), *(row for found in policies.values() for row in found)]
    against = {item.method: item for item in compare(together, REFERENCE)}
    groups: dict[str, list[Design]] = {}
    for design in finished[1:]:
        groups.setdefault(design.group, []).append(design)
    compared = {group: _paired(policies, BASE, [each.name for each in own]) for group, own in groups.items()}
    curve = _curve(finished, policies, against)
    seen = published
    for design in finished:
        datasets = {row["dataset"] for row in policies[design.name]}
        difference = number(against[design.name].overall.difference.mean)
        seen = with_look(seen, look(design.config, datasets, difference))
    record = {
        "base": _about(finished[0], against) | _design(finished[0].config),
        "groups": {
            group: [
                _about(design, against) | {"against_base": _against_base(item)}
                for design, item in zip(own, compared[group], strict=True)
            ]
            for group, own in groups.items()
        },
        "curve": [_of_point(point, curve) for point in curve],
        "curve_factor": curve[-1].tasks / curve[0].tasks if curve else None,
        "curve_monotone": _monotone(curve),
        "held_out_designs": len(seen),
        "designs": seen,
    }
    page = _page(finished, against, compared, curve, len(seen), name)
    picture = f"{name}_tasks.png"
    files = {
        f"{name}.md": page.encode(),
        f"{name}.json": (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(),
    }
    if curve:
        files[picture] = to_png(plot_curve(curve))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_atomic(output / file, content)
        if picture not in files:  # of other variants
            (output / picture).unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"--output {output}: cannot be written ({error.strerror}); name another folder"
        ) from error
    return AblationsReport(tuple(output / file for file in files), record)


def tasks_seen(config: RunConfig) -> int:
    """Different tasks that the meta-training of a configuration trains on."""
    return groups_seen(config) * config.tasks.group_size


@matplotlib.rc_context(FIGURE_STYLE)
def plot_curve(curve: Sequence[Point]) -> Figure:
    """The policy's difference to tuned cross-entropy by the number of meta-training tasks."""
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    estimates = [point.against.overall.difference for point in curve]
    tasks = [point.tasks for point in curve]
    axis.axhline(0, color=BLACK, linewidth=1)
    axis.errorbar(
        tasks,
        [e.mean for e in estimates],
        [[_arm(e.mean - e.low) for e in estimates], [_arm(e.high - e.mean) for e in estimates]],
        color=POLICY_COLOUR,
        marker="o",
        linewidth=2,
        elinewidth=1,
        capsize=3,
    )
    axis.set(xscale="log", xlabel="different tasks in meta-training", title="More tasks, a better policy?")
    axis.set_xticks(tasks, [f"{count:,}" for count in tasks])
    axis.set_xticks([], minor=True)
    axis.set_ylabel(f"points against {label_of(REFERENCE)}\n(95 % interval clustered by dataset)")
    return figure


def _rows(design: Design, run_dir: Path) -> Rows:
    """Those of all folds."""
    return [
        {"method": row["method"], **{name: row.get(name) for name in COLUMNS}}
        for fold in design.configs
        for row in read_run(str(design.folder(run_dir, fold))).rows
    ]


def _of(rows: Rows, method: str, name: str) -> Rows:
    """The rows of a method, under another name."""
    return [{**row, "method": name} for row in rows if row["method"] == method]


def _check_same_reference(rows: Mapping[str, Rows]) -> None:
    """Designs share tasks and tuned values."""
    for name, of in rows.items():
        if unlike(of, rows[BASE]) is not None or unlike(rows[BASE], of) is not None:
            raise RunDirectoryError(
                f"{name}: {REFERENCE} has other results there than in {BASE}, so its tasks or tuned values are not the "
                "same; have both made by one version on one kind of machine"
            )


def _paired(policies: Mapping[str, Rows], reference: str, names: Sequence[str]) -> list[Comparison]:
    """Each of these policies against another one, their p-values corrected together."""
    compared = compare([row for name in (reference, *names) for row in policies[name]], reference)
    found = {item.method: item for item in compared}
    return [found[name] for name in names]


def _curve(designs: Sequence[Design], policies: Mapping[str, Rows], against: Mapping[str, Comparison]) -> list[Point]:
    """The designs that differ from the base in the number of tasks alone, by rising number; none where there are no
    two."""
    free = ("name", "tasks.pool")
    chosen = [design for design in designs if not config_differences(designs[0].config, design.config, free)]
    chosen.sort(key=lambda design: tasks_seen(design.config))
    points: list[Point] = []
    for design in chosen if len(chosen) > 1 else ():
        gains = [gain for before in points for gain in _paired(policies, before.design.name, [design.name])]
        points.append(Point(tasks_seen(design.config), design, against[design.name], gains))
    return points


def _monotone(curve: Sequence[Point]) -> bool | None:
    """Whether no point lies significantly below any before it: slow harm shows over several of them alone. None where
    there is nothing to tell it by, or too few independent datasets."""
    gains = [gain.overall.difference for point in curve for gain in point.gains]
    if not gains or any(gain.clusters < FEWEST_CLUSTERS or math.isnan(gain.high) for gain in gains):
        return None
    return all(gain.high >= 0 for gain in gains)


def _last(point: Point) -> Estimate | None:
    """Its gain over the point just before."""
    return point.gains[-1].overall.difference if point.gains else None


def _arm(length: float) -> float:
    return 0.0 if math.isnan(length) else length


def _about(design: Design, against: Mapping[str, Comparison]) -> dict[str, Any]:
    overall = against[design.name].overall
    return {
        "name": design.name,
        "set": dict(design.changes),
        "accuracy": number(overall.value),
        "meta_training_tasks": tasks_seen(design.config),
        "diff_vs_tuned_ce": _estimate(overall.difference),
    }


def _design(config: RunConfig) -> dict[str, Any]:
    """What tells whether the base is the design of other results."""
    spec = policy_spec(config.policy)
    return {
        "digest": design_of(config),
        "policy": spec.kind,
        "basis": list(spec.basis),
        "window": config.estimator.window,
    }


def _against_base(item: Comparison) -> dict[str, Any]:
    """A variant's policy against the base's; their names stand elsewhere."""
    (record,) = to_pair_records([item])
    named = {name: value for name, value in record.items() if name not in ("method", "against")}
    return named | {"clusters": item.overall.difference.clusters}


def _of_point(point: Point, curve: Sequence[Point]) -> dict[str, Any]:
    return {
        "name": point.design.name,
        "tasks": point.tasks,
        "diff_vs_tuned_ce": _estimate(point.against.overall.difference),
        "gains": {
            before.design.name: _estimate(gain.overall.difference)
            for before, gain in zip(curve, point.gains, strict=False)  # those before it
        },
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    ends = [number(estimate.low), number(estimate.high)]
    return {
        "difference": number(estimate.mean),
        "se": number(estimate.se),
        "ci95": None if None in ends else ends,
        "tasks": estimate.tasks,
        "clusters": estimate.clusters,
    }


def _page(
    designs: Sequence[Design],
    against: Mapping[str, Comparison],
    groups: Mapping[str, Sequence[Comparison]],
    curve: Sequence[Point],
    looks: int,
    name: str,
) -> str:
    """NAME.md."""
    base, config = against[BASE], designs[0].config
    changes = {design.name: design.words for design in designs}
    parts = [
        f"# Ablations: {config.name}\n",
        f"Written by `palf-dist ablate`, never by hand; [{name}.json]({name}.json) has all figures, and "
        "docs/evaluation.md explains them.\n",
        f"The base reaches {base.overall.value:.1f} % on held-out datasets, {signed(base.overall.difference)} points "
        f"against {label_of(REFERENCE)}, over {extent(base)}. Every other line is the paired difference of a variant's "
        "policy to the base's, in points of accuracy (standard error clustered by dataset): below zero where the "
        "change does harm. p is corrected by Holm within each table. The error is that of the tasks; what another "
        "seed of the meta-training does is in it only where a table has other seeds.\n",
        f"Reported, and never used to choose. Designs judged on held-out datasets so far, all of these among them: "
        f"{looks}.\n",
    ]
    for group, items in groups.items():
        rows = [
            [
                item.method,
                changes[item.method],
                signed(item.overall.difference),
                interval(item.overall.difference),
                *certainty(item)[1:],
                signed(against[item.method].overall.difference),
            ]
            for item in items
        ]
        header = ["variant", "change", "against the base", "95 % interval", "p (Holm)", "won-tied-lost"]
        parts += [
            f"## {group.capitalize()}\n",
            markdown_table(([*header, f"against {label_of(REFERENCE)}"], rows), texts=2),
        ]
    if curve:
        few = f"not judged: that takes {FEWEST_CLUSTERS} independent datasets, and an error"
        verdict = {True: "monotone within error", False: "not monotone", None: few}
        factor = curve[-1].tasks / curve[0].tasks
        rows = [
            [
                point.design.name,
                f"{point.tasks:,}",
                signed(point.against.overall.difference),
                interval(point.against.overall.difference),
                *((signed(gain), interval(gain)) if (gain := _last(point)) else ("-", "-")),
            ]
            for point in curve
        ]
        header = ["variant", "tasks", f"against {label_of(REFERENCE)}", "95 % interval", "over the line above"]
        parts += [
            "## Different tasks in meta-training\n",
            f"Over a factor of {factor:.3g} the gain is {verdict[_monotone(curve)]}. Monotone is a curve of which no "
            "line lies significantly below any above it. The tasks are those that meta-gradients are taken on. Each "
            "run also reads fresh tasks of the training datasets, which no pool holds: "
            f"{config.evaluation.select_tasks} to pick its best policy, others for its calibration and, for all runs "
            "together, to tune.\n",
            markdown_table(([*header, "95 % interval"], rows)),
            f"![More tasks, a better policy?]({name}_tasks.png)\n",
        ]
    return "\n".join(parts)
