"""The report of a run: pictures, the held-out table, and one self-contained HTML page that holds them all.

Everything is read from the run directory, so a report can be made at any time, also of a run that is not finished.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from palf_dist.atomic import replacing_folder
from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config, load_config
from palf_dist.errors import PolicyFileError, RunDirectoryError
from palf_dist.evaluation import plots
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.inner_runs import dataset_facts
from palf_dist.evaluation.interpretation import Interpretation, interpret
from palf_dist.evaluation.interpretation_plots import pictures as interpretation_pictures
from palf_dist.evaluation.interpretation_tables import tables as interpretation_tables
from palf_dist.evaluation.methods import REFERENCE
from palf_dist.evaluation.page import render_page
from palf_dist.evaluation.statistics import Comparison
from palf_dist.evaluation.table import (
    Cells,
    extent,
    is_policy,
    label_of,
    measure_notes,
    table_notes,
    to_cells,
    to_markdown,
    to_measure_cells,
    to_pair_cells,
    to_pair_records,
    to_records,
)
from palf_dist.policies.meta_learned import needs_parameters
from palf_dist.policies.policy_file import PolicyArtefact, load_policy
from palf_dist.run_directory import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    REPORT,
    RESULTS,
    TRAJECTORIES,
    no_run,
    open_run_directory,
)
from palf_dist.storage import Storage, first_line, join
from palf_dist.storage_mirror import pull
from palf_dist.trajectory import read_trajectories, trajectory_steps
from palf_dist.usage import usage

PAGE, TABLE_MARKDOWN, TABLE_JSON = "index.html", "table.md", "table.json"

LAST_STEPS = 10
"""Outer steps whose trajectories are shown: the last ones, where the policy hardly moves any more."""

CAPTIONS = {
    "held_out": "What each loss is worth on datasets that meta-training never saw. Points right of the line beat "
    "tuned cross-entropy; a bar that crosses it settles nothing, one that reaches the frame goes on.",
    "noise": "The same by label noise: the policy and the best of the other methods.",
    "alpha": "What the policy does while an inner model trains, over the last outer steps.",
    "controls": "The same by family, label noise and architecture: each control that the policy moves, the mean over "
    "tasks. Bands: one standard error of that mean to each side, clustered by dataset; none with one dataset. Dotted: "
    "the boundaries of the paper's phases.",
    "phases": "The two moments at which three constants fit the mean controls best, with the interval when datasets "
    "are drawn anew. Where a line with one bend explains as much, the controls change gradually, and there are no "
    "phases.",
    "importance": "Which state features move the controls: permutation importance on the states of the last outer "
    "steps, by the selected policy.",
    "outer_loss": "Meta-training: the outer loss that the meta-learner minimises, and the score that picks the policy.",
}


@dataclass(frozen=True)
class ReportPaths:
    """What ``make_report`` wrote. Pictures and tables that a partial run cannot give yet are left out."""

    folder: Path | str
    page: Path | str
    pictures: tuple[Path | str, ...]
    tables: tuple[Path | str, ...]  # table.md and table.json, or nothing
    comparisons: tuple[Comparison, ...]  # the held-out comparison, for those who print it

    def moved(self, to: Callable[[Path], Path | str]) -> ReportPaths:
        """The same files at another place: ``to`` gives where each one of this machine is there, a path or a URI."""
        folder, page, *files = (to(Path(path)) for path in (self.folder, self.page, *self.pictures, *self.tables))
        pictures = len(self.pictures)
        return ReportPaths(folder, page, tuple(files[:pictures]), tuple(files[pictures:]), self.comparisons)


def make_report(run_dir: str | Path, location: str | Path | None = None) -> ReportPaths:
    """Write the report of a run into its folder ``report``, which is replaced as a whole.

    ``location``: the URI of the run, where ``run_dir`` is a copy without the trajectories, which are read from there.
    Raises RunDirectoryError when the folder is not a run or one of its files cannot be read, ConfigError when its
    configuration is damaged.
    """
    run_dir = open_run_directory(run_dir)
    config = load_config(run_dir / CONFIG)
    metrics = read_table(run_dir / METRICS)
    results = read_table(run_dir / RESULTS)
    comparisons, pairs = held_out(results) if results is not None and results.num_rows else ([], [])
    card = _policy_card(run_dir / BEST / "policy.json")

    pictures: dict[str, bytes] = {}
    if comparisons:
        pictures |= comparison_pictures(comparisons)
    interpretation = None
    if (last := last_trajectories(location or run_dir)) is not None:
        pictures["alpha"] = plots.to_png(plots.plot_alpha(last))
        facts = dataset_facts(last["dataset"].unique().to_pylist(), config.data.train)
        interpretation = interpret(last, config, facts, [_best_policy(run_dir)])
        pictures |= interpretation_pictures(interpretation)
    if metrics is not None and metrics.num_rows:
        pictures["outer_loss"] = plots.to_png(plots.plot_outer_loss(metrics))

    files = {f"{name}.png": data for name, data in pictures.items()}
    if comparisons:
        files[TABLE_MARKDOWN] = to_markdown(comparisons, pairs).encode()
        tables = {"held_out": to_records(comparisons), "pairs": to_pair_records(pairs)}
        files[TABLE_JSON] = (json.dumps(tables, indent=2) + "\n").encode()
    page = _page(run_dir, location or run_dir, config, metrics, comparisons, pairs, interpretation, card, pictures)
    files[PAGE] = page.encode()
    folder = run_dir / REPORT
    with replacing_folder(folder) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
    return ReportPaths(
        folder=folder,
        page=folder / PAGE,
        pictures=tuple(folder / name for name in files if name.endswith(".png")),
        tables=tuple(folder / name for name in files if name.startswith("table.")),
        comparisons=tuple(comparisons),
    )


def make_remote_report(uri: str) -> ReportPaths:
    """As ``make_report``, for a run under a URI, which may be at work.

    Raises RunDirectoryError also where the storage gives or takes nothing.
    """
    storage = Storage(uri)
    with tempfile.TemporaryDirectory(prefix="palf-report-") as folder:
        pull(storage, Path(folder), leave_out=(TRAJECTORIES, REPORT, CHECKPOINTS))
        if not Path(folder, CONFIG).exists():
            raise no_run(uri)
        made = make_report(folder, uri)
        try:
            for path in (*made.pictures, *made.tables, made.page):  # the page shows what lies beside it
                storage.write(f"{REPORT}/{Path(path).name}", Path(path).read_bytes())
        except OSError as error:
            raise RunDirectoryError(f"run directory: {uri} takes no report ({first_line(error)}); try again") from error
        return made.moved(lambda path: join(uri, path.relative_to(folder).as_posix()))


def read_table(path: Path) -> pa.Table | None:
    """The Parquet file, or None where the run has not written it yet."""
    if not path.exists():
        return None
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RunDirectoryError(
            f"run directory: {path} cannot be read ({error}); restore or remove that file"
        ) from error


def comparison_pictures(comparisons: Sequence[Comparison]) -> dict[str, bytes]:
    """The pictures of a held-out comparison as PNG, by name; ``CAPTIONS`` has what they show."""
    return {
        "held_out": plots.to_png(plots.plot_held_out(comparisons)),
        "noise": plots.to_png(plots.plot_noise(comparisons)),
    }


def last_trajectories(run_dir: str | Path) -> pa.Table | None:
    """Trajectories of the ``LAST_STEPS`` outer steps of a run at a path or a URI; None where it has none."""
    try:
        steps = trajectory_steps(run_dir)
        table = read_trajectories(run_dir, steps=steps[-LAST_STEPS:])
    except (OSError, pa.ArrowException) as error:
        place = f"{run_dir}, {TRAJECTORIES}"
        raise RunDirectoryError(f"run directory: {place} cannot be read ({first_line(error)}); try again") from error
    return table if table.num_rows else None


def _page(
    run_dir: Path,
    location: str | Path,
    config: RunConfig,
    metrics: pa.Table | None,
    comparisons: Sequence[Comparison],
    pairs: Sequence[Comparison],
    interpretation: Interpretation | None,
    card: dict[str, Any] | None,
    pictures: dict[str, bytes],
) -> str:
    policy = f"{BEST}/policy.safetensors"
    has_use = (run_dir / policy).exists() and not needs_parameters(config.policy)
    looks = [
        "policy" if is_policy(item.method) else "reference" if item.method == REFERENCE else "" for item in comparisons
    ]
    tables = []
    if comparisons:
        tables.append(_table("Held-out comparison", to_cells(comparisons), looks, table_notes(comparisons)))
        tables.append(_table("By other measures", to_measure_cells(comparisons), looks, measure_notes(comparisons)))
    if pairs:
        tables.append(
            _table(f"The {label_of(pairs[0].method)} against each", to_pair_cells(pairs), [""] * len(pairs), [])
        )
    for item in interpretation_tables(interpretation) if interpretation else ():
        tables.append(_table(item.title, item.cells, [""] * len(item.cells[1]), item.notes, item.texts))
    facts = _facts(config, metrics, card)
    if interpretation is not None and not interpretation.curves:
        facts["what the policy does"] = f"not measured: {interpretation.not_measured['curves']}"
    return render_page(
        "report.html.j2",
        pictures,
        CAPTIONS,
        name=config.name,
        headline=headline_sentence(comparisons),
        facts=facts,
        tables=tables,
        usage=usage(join(location, policy)) if has_use else None,
        policy=None if card is None else json.dumps(card, indent=2, sort_keys=True),
        configuration=dump_config(config),
    )


def _table(title: str, cells: Cells, looks: Sequence[str], notes: Sequence[str], texts: int = 1) -> dict[str, Any]:
    """A table as the page's template asks for it; ``looks`` are the classes of its rows, ``texts`` how many of its
    first columns are words."""
    header, rows = cells
    return {
        "title": title,
        "header": header,
        "rows": list(zip(looks, rows, strict=True)),
        "notes": notes,
        "texts": texts,
    }


def headline_sentence(comparisons: Sequence[Comparison]) -> str:
    """What the policy is worth on held-out datasets, in words."""
    if not comparisons:
        return "There are no held-out results yet: the evaluation comes at the end of the run."
    policy = next((item for item in comparisons if is_policy(item.method)), None)
    if policy is None:
        return "The policy was not among the methods compared."
    estimate = policy.overall.difference
    if not estimate.tasks:
        return "The policy has no finite result on any held-out task."
    interval = "no interval with one dataset"
    if estimate.clusters > 1:
        interval = f"95 % interval {estimate.low:+.2f} to {estimate.high:+.2f}, clustered by dataset"
    return (
        f"The {label_of(policy.method)} reaches {policy.overall.value:.1f} % on held-out datasets: "
        f"{estimate.mean:+.2f} points against {label_of(REFERENCE)} ({interval}), "
        f"over {extent(policy)}."
    )


def _facts(config: RunConfig, metrics: pa.Table | None, card: dict[str, Any] | None) -> dict[str, str]:
    sums = {} if metrics is None else {name: pc.sum(metrics[name]).as_py() or 0 for name in metrics.column_names}
    facts = {
        "outer steps": f"{0 if metrics is None else metrics.num_rows} of {config.meta_learner.outer_steps}",
        "tasks per outer step": str(config.meta_learner.groups_per_step * config.tasks.group_size),
        "meta-trained on": ", ".join(source.name for source in config.data.train),
        "held out": ", ".join(source.name for source in config.data.held_out),
        "estimator": f"{config.estimator.kind}, outer loss {config.outer_loss.kind.replace('_', ' ')}",
        "workers": f"{config.distributed.workers or 'in process'}, {config.distributed.mode}",
    }
    if "applied" in sums:
        facts["contributions"] = _contributions(sums)
    if "seconds" in sums:
        facts["time in outer steps"] = f"{sums['seconds'] / 60:.1f} minutes"
    if card is not None:
        about = card["card"]
        facts["policy"] = (
            f"taken after {about['outer_step']} outer steps, {100 * about['selection_score']:+.2f} points against "
            f"{label_of(REFERENCE)} on fresh training tasks"
        )
    return facts


def _contributions(sums: dict[str, float]) -> str:
    refused = {name.removeprefix("refused_"): int(sums[name]) for name in sums if name.startswith("refused_")}
    causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in refused.items() if count)
    counts = f"{sums['applied']:.0f} applied, {sums['reissued']:.0f} reissued, {sum(refused.values())} refused"
    return f"{counts} ({causes})" if causes else counts


def _best_policy(run_dir: Path) -> PolicyArtefact | None:
    """None where there is none yet, or for a moment of a run at work its two files do not fit together."""
    try:
        return load_policy(run_dir / BEST)
    except PolicyFileError:
        return None


def _policy_card(path: Path) -> dict[str, Any] | None:
    """The policy file's own description, or None where no policy has been selected yet."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise RunDirectoryError(f"run directory: {path} is not JSON ({error}); restore or remove that file") from error
