"""The report of a search: its pictures, the best trials, and one self-contained HTML page that holds them all.

Everything is read from the run directory, so a report can be made at any time, also of a search that is under way.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from palf_dist.atomic import replacing_folder
from palf_dist.config_loading import dump_config, is_search_config
from palf_dist.errors import RunDirectoryError
from palf_dist.evaluation.page import render_page
from palf_dist.evaluation.plots import to_png
from palf_dist.evaluation.report import PAGE, read_table
from palf_dist.run_directory import CONFIG, REPORT, open_run_directory
from palf_dist.search.anytime import ANYTIME, Best, parameters_used, read_best
from palf_dist.search.config import SearchConfig, load_search_config
from palf_dist.search.domains import Domain, LogRange
from palf_dist.search.ledger import Ledger, TrialRecord, trial_name
from palf_dist.search.pictures import Tried, plot_anytime, plot_parallel
from palf_dist.search.targets.config import MetaTrainingConfig, TargetConfig

BEST_TRIALS = 20
"""Trials in the table of the page."""

CAPTIONS = {
    "anytime": "What stopping the search at any moment would have given: the lowest error so far.",
    "parallel": "Every trial as a line through its parameters to its lowest error. Where the dark lines meet, the "
    "parameter matters; where they spread, it does not.",
}


@dataclass(frozen=True)
class SearchReport:
    """What ``make_search_report`` wrote. Pictures that a partial search cannot give yet are left out."""

    folder: Path
    page: Path
    pictures: tuple[Path, ...]
    best: Best | None
    headline: str  # one sentence about the best, for those who print it


def is_search(run_dir: str | Path) -> bool:
    """Whether the folder is the run directory of a search, rather than of a meta-training."""
    config = Path(run_dir, CONFIG)
    return config.is_file() and is_search_config(config)


def make_search_report(run_dir: str | Path, space: Mapping[str, Domain] | None = None) -> SearchReport:
    """Write the report of a search into its folder ``report``, which is replaced as a whole.

    ``space`` is what was searched, where the target is not the one of the configuration.

    Raises RunDirectoryError when the folder is not that of a search or one of its files cannot be read, ConfigError
    when its configuration is damaged.
    """
    run_dir = open_run_directory(run_dir)
    if not is_search(run_dir):
        raise RunDirectoryError(f"run directory: {run_dir} holds no search, but a meta-training")
    config = load_search_config(run_dir / CONFIG)
    space = space or _space(config.target)
    best = read_best(run_dir)
    curve = read_table(run_dir / ANYTIME)
    with contextlib.closing(Ledger(run_dir)) as ledger:
        trials = list(ledger.trials.values())

    pictures: dict[str, bytes] = {}
    if curve is not None and curve.num_rows:
        pictures["anytime"] = to_png(plot_anytime(curve))
    tried = {record.number: _lowest(record) for record in trials if record.reports}
    if tried:
        winner = None if best is None else Tried(best.parameters, best.error)
        pictures["parallel"] = to_png(plot_parallel(space, list(tried.values()), winner))

    files = {f"{name}.png": data for name, data in pictures.items()}
    files[PAGE] = _page(config, trials, tried, list(space), best, pictures).encode()
    folder = run_dir / REPORT
    with replacing_folder(folder) as temporary:
        for name, data in files.items():
            (temporary / name).write_bytes(data)
    drawn = tuple(folder / name for name in files if name.endswith(".png"))
    return SearchReport(folder, folder / PAGE, drawn, best, _headline(best))


def _space(target: TargetConfig) -> Mapping[str, Domain]:
    """What the configuration has searched."""
    if isinstance(target, MetaTrainingConfig):
        return target.space
    return {name: LogRange(low=low, high=high) for name, (low, high) in target.ranges.items()}


def _lowest(record: TrialRecord) -> Tried:
    """The lowest error that a trial has reported, NaN where none is finite, and the parameters it had then."""
    finite = [report for report in record.reports if math.isfinite(report.error)]
    report = min(finite, key=lambda report: report.error, default=record.reports[0])
    return Tried(parameters_used(record.parameters, report), report.error)


def _page(
    config: SearchConfig,
    trials: Sequence[TrialRecord],
    tried: Mapping[int, Tried],
    names: Sequence[str],
    best: Best | None,
    pictures: Mapping[str, bytes],
) -> str:
    finite = [record for record in trials if record.number in tried and math.isfinite(tried[record.number].error)]
    ranked = sorted(finite, key=lambda record: tried[record.number].error)[:BEST_TRIALS]
    return render_page(
        "search.html.j2",
        pictures,
        CAPTIONS,
        name=config.name,
        headline=_headline(best),
        facts=_facts(config, trials),
        header=["trial", "lowest error", "outcome", *names],
        rows=[
            (
                "policy" if best is not None and record.number == best.trial else "",
                _cells(record, tried[record.number], names),
            )
            for record in ranked
        ],
        best=None if best is None else json.dumps(asdict(best), indent=2),
        configuration=dump_config(config),
    )


def _cells(record: TrialRecord, lowest: Tried, names: Sequence[str]) -> list[str]:
    values = [lowest.parameters[name] for name in names]
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return [record.name, f"{lowest.error:.5g}", record.ending or "unfinished", *texts]


def _headline(best: Best | None) -> str:
    if best is None:
        return "No trial has reported a finite error yet."
    trainings = "the first training" if best.trainings == 1 else f"{best.trainings} trainings"
    return (
        f"The lowest error is {best.error:.5g}, of trial {trial_name(best.trial)}, found with {trainings} in "
        f"{best.seconds:.0f} seconds of work."
    )


def _facts(config: SearchConfig, trials: Sequence[TrialRecord]) -> dict[str, str]:
    endings = Counter(record.ending or "unfinished" for record in trials)
    facts = {
        "target": config.target.kind.replace("_", " "),
        "searcher": config.searcher,
        "scheduler": config.scheduler.kind,
        "trials": f"{len(trials)} of {config.trials}",
        "of these": ", ".join(f"{count} {ending}" for ending, count in endings.most_common()) or "none",
    }
    if cost := sum(record.cost for record in trials):
        facts["gradient evaluations"] = f"{cost:,.0f}"
    return facts
