"""One search from its configuration to its result. Ray Tune only executes it: the truth is the ledger."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.tune
from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler

from palf_dist.atomic import write_atomic
from palf_dist.config_loading import dump_config
from palf_dist.distributed.cluster import changed_environment, connected, nodes
from palf_dist.distributed.session import signals_stop
from palf_dist.errors import ConfigError, SearchError
from palf_dist.progress import Progress
from palf_dist.run_directory import BEST, CONFIG, create_run_directory, discard_unused, locked, open_run_directory
from palf_dist.search.anytime import ANYTIME, Anytime, Best
from palf_dist.search.capacity import trials_at_once
from palf_dist.search.config import NOT_LINEAR, SearchConfig
from palf_dist.search.fingerprints import check_unchanged, keep
from palf_dist.search.ledger import ENDINGS, Ledger
from palf_dist.search.proposals import OptunaSearcher, RandomSearcher, Searcher
from palf_dist.search.recorder import MLFLOW_STATUS, Halt, Recorder, ending_of
from palf_dist.search.schedulers import Population, make_scheduler, replay
from palf_dist.search.targets import make_target as target_of
from palf_dist.search.targets.config import LossWeightsConfig, TargetConfig
from palf_dist.search.trainable import STOP_FILE, TrialProcess
from palf_dist.search.trial import Target
from palf_dist.search.trial_queue import TrialQueue
from palf_dist.search.tuneloss_proposals import TuneLossSearch
from palf_dist.tasks.cache import cache_folder
from palf_dist.tracking import SearchTracker, open_search_tracker

if TYPE_CHECKING:
    from palf_dist.search.report import SearchReport

OPTUNA_AT_ONCE = 4
"""Trials that TPE proposes without having heard of one another, unless the configuration says otherwise."""
TUNE_FOLDER = ".tune"
"""Ray Tune's own storage; emptied when a search begins and when it ends, and never read."""
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to the driver
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}


@dataclass
class SearchResult:
    """What a search came to."""

    run_dir: Path
    error_name: str = "error"  # of the target
    best: Best | None = None
    final: dict[str, Any] = field(default_factory=dict)  # what the target says of the best; empty when interrupted
    conclusion: dict[str, Any] = field(default_factory=dict)  # what the searcher says
    trials: dict[str, int] = field(default_factory=dict)  # by ending, or "unfinished"
    trainings: int = 0  # trials that have reported
    gradient_evaluations: int | None = None  # where the target counts them
    seconds: float = 0.0  # of work on the search, all its processes together
    mlflow_run_id: str | None = None
    report: SearchReport | None = None  # none when interrupted
    out_of_time: bool = False
    interrupted: bool = False

    def record(self) -> dict[str, Any]:
        """As plain data, for --json."""
        best = self.best
        return {
            "run_dir": str(self.run_dir),
            "best_parameters": best and best.parameters,
            **self._error(),
            "best_trial": best and best.trial,
            **self.conclusion,
            **self.final,
            "trainings": self.trainings,
            "gradient_evaluations": self.gradient_evaluations,
            "trials": self.trials,
            "seconds": round(self.seconds, 1),
            "page": str(self.report.page) if self.report else None,
            "mlflow_run_id": self.mlflow_run_id,
            "out_of_time": self.out_of_time,
            "interrupted": self.interrupted,
        }

    def _error(self) -> dict[str, float | None]:
        """The best error under its name, with its own sign where it is minus something."""
        error = None if self.best is None else self.best.error
        if not self.error_name.startswith("minus_"):
            return {self.error_name: error}
        return {self.error_name.removeprefix("minus_"): None if error is None else 0.0 - error}


def tune(
    config: SearchConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    time_budget: float | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    make_target: Callable[[TargetConfig], Target] = target_of,
) -> SearchResult:
    """Search in ``run_dir``: a new or empty folder, or with ``resume`` that of an earlier search.

    best/ and anytime.parquet are valid at any moment from the first report on. The search ends after ``config.trials``
    trials, or after ``time_budget`` seconds with the best so far. The first SIGINT or SIGTERM, or ``stop``, ends it
    with ``interrupted`` set, and ``resume`` goes on: no finished trial is lost or done again, unfinished ones go on.
    The caller sees to it that a resumed search has the configuration that it began with, but for ``config.RESUMABLE``.
    Raises the PalfErrors of the configuration, the target, the directory and the cluster; SearchError when no trial
    has come to anything.
    """
    began = time.monotonic()
    result = SearchResult(open_run_directory(run_dir) if resume else create_run_directory(run_dir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(result.run_dir))
        stack.callback(discard_unused, result.run_dir)  # a mistake found before the search began leaves nothing behind
        shown = stack.enter_context(progress or Progress())
        shown.begin("preparing the target", 1)
        target = make_target(config.target)
        _check(config, target)
        check_unchanged(result.run_dir, target.fingerprints)
        result.error_name = target.error_name
        shown.begin("starting Ray", 1)
        stack.enter_context(changed_environment(TUNE_SETTINGS))
        cpus = sum(bundle.get("CPU", 0.0) for bundle in target.bundles())
        stack.enter_context(connected(config.distributed.address, round(cpus * (config.concurrent or 1))))
        bundles = target.bundles()
        at_once = trials_at_once(bundles, nodes(), _wanted_at_once(config))
        write_atomic(result.run_dir / CONFIG, dump_config(config).encode())
        keep(result.run_dir, target.fingerprints)
        deadline = None if time_budget is None else began + time_budget
        halt = Halt(
            result.run_dir, stop or threading.Event(), deadline, lambda: trials_at_once(bundles, nodes(), wanted=1)
        )
        stack.enter_context(signals_stop(halt.stop, shown))
        tracker = open_search_tracker(
            result.run_dir, name=config.name, tracking=config.tracking, params=config.model_dump(mode="json")
        )
        status = "FAILED"
        try:
            _search(config, target, at_once, halt, tracker, shown, result)
            status = "KILLED" if result.interrupted else "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if (result.run_dir / ANYTIME).exists():
                tracker.log_artifact(result.run_dir / ANYTIME)
            tracker.close(status)
            result.mlflow_run_id = tracker.run_id
    return result


def _check(config: SearchConfig, target: Target) -> None:
    """Raises ConfigError where the target cannot be searched in this way."""
    if config.searcher == "tuneloss" and target.weight_space() is None:
        raise ConfigError(f"searcher: {NOT_LINEAR}")
    make_scheduler(config.scheduler, target)


def _wanted_at_once(config: SearchConfig) -> int:
    """Trials at once, if they fit. A searcher that learns from every trial waits for what it is to learn from."""
    by_searcher = {"tuneloss": 1, "optuna": min(OPTUNA_AT_ONCE, config.trials), "random": config.trials}
    return config.concurrent or by_searcher[config.searcher]


def _make_searcher(config: SearchConfig, target: Target, known: int) -> Searcher:
    if config.searcher == "random":
        return RandomSearcher(target.space(), config.seed)
    if config.searcher == "optuna":
        return OptunaSearcher(target.space(), config.seed, known)
    weights = target.weight_space()
    assert weights is not None
    on_the_fly = isinstance(config.target, LossWeightsConfig) and config.target.on_the_fly
    return TuneLossSearch(weights, config.seed, on_the_fly)


def _search(
    config: SearchConfig,
    target: Target,
    at_once: int,
    halt: Halt,
    tracker: SearchTracker,
    progress: Progress,
    result: SearchResult,
) -> None:
    """Fill ``result``, also when the user stops the search half-way."""
    run_dir = result.run_dir
    with contextlib.closing(Ledger(run_dir)) as ledger:
        _end_what_has_ended(ledger, tracker)
        searcher = _make_searcher(config, target, len(ledger.trials))
        for event, record in list(ledger.moves):
            if event == "created":
                searcher.adopt(record)
            else:
                searcher.tell(record)
        anytime = Anytime(run_dir)
        anytime.write_curve(ledger.history)
        scheduler = make_scheduler(config.scheduler, target)
        replay(scheduler, ledger.trials.values())
        population = scheduler if isinstance(scheduler, Population) else None
        queue = TrialQueue(ledger, searcher, config.trials, None if population else at_once)
        progress.begin("search", max(config.trials, len(ledger.trials)), ledger.ended)
        if not queue.is_finished() and not halt.over:
            recorder = Recorder(ledger, anytime, searcher, population, halt, tracker, progress)
            _execute(target, run_dir, queue, scheduler, recorder, halt)
        if halt.fatal is not None:
            raise SearchError(halt.fatal)
        _conclude(config, ledger, anytime, searcher, halt, result)
    if not result.interrupted:
        judging = threading.Event()
        judging.set()  # nothing here needs to be saved: the first signal already ends it
        with signals_stop(judging, progress):
            _judge(target, tracker, progress, result)


def _end_what_has_ended(ledger: Ledger, tracker: SearchTracker) -> None:
    """End the trials whose last report an earlier process had noted when it was killed, but not their end."""
    for record in list(ledger.unfinished()):
        if (ending := ending_of(record)) is not None:
            tracker.child(record.name, record.parameters).close(MLFLOW_STATUS[ending[0]])
            ledger.end(record.number, *ending)


def _judge(target: Target, tracker: SearchTracker, progress: Progress, result: SearchResult) -> None:
    """What the target says of the best, and the report. A search that is killed here does it again when resumed."""
    run_dir = result.run_dir
    progress.begin("judging the best", 1)
    result.final = target.finish(run_dir / BEST)
    # Unless told otherwise, matplotlib writes its list of fonts into the home folder when it is imported.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder(None) / "matplotlib"))
    from palf_dist.search.report import make_search_report

    result.report = make_search_report(run_dir, target.space())
    for path in (run_dir / CONFIG, run_dir / BEST, result.report.folder):
        tracker.log_artifact(path, path.name if path.is_dir() else "")


def _execute(
    target: Target, run_dir: Path, queue: TrialQueue, scheduler: TrialScheduler, recorder: Recorder, halt: Halt
) -> None:
    """Have Ray Tune run the trials of the queue, until there are no more or the search is to halt."""
    storage, stop_file = run_dir / TUNE_FOLDER, run_dir / STOP_FILE
    stop_file.unlink(missing_ok=True)
    try:
        shutil.rmtree(storage, ignore_errors=True)
        ray.tune.run(
            ray.tune.with_parameters(TrialProcess, target=target, run_dir=run_dir),
            name="search",
            storage_path=str(storage),
            search_alg=queue,
            scheduler=scheduler,
            stop=halt,
            callbacks=[recorder],
            resources_per_trial=PlacementGroupFactory(target.bundles()),
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
        )
    finally:
        shutil.rmtree(storage, ignore_errors=True)
        stop_file.unlink(missing_ok=True)


def _conclude(
    config: SearchConfig, ledger: Ledger, anytime: Anytime, searcher: Searcher, halt: Halt, result: SearchResult
) -> None:
    records = ledger.trials.values()
    result.best, result.trainings, result.seconds = anytime.best, ledger.trainings, ledger.seconds_noted
    counts = Counter(record.ending or "unfinished" for record in records)
    result.trials = {ending: counts[ending] for ending in (*ENDINGS, "unfinished")}
    cost = sum(record.cost for record in records)
    result.gradient_evaluations = round(cost) if cost else None
    result.conclusion = searcher.conclusion()
    result.interrupted = halt.stop.is_set()
    result.out_of_time = halt.over and not result.interrupted and ledger.ended < config.trials
    if result.best is None and result.out_of_time:
        raise SearchError("--time-budget: it was over before the first report; resume the search with more time")
    if result.best is None and not result.interrupted:
        failed = next(
            (f"; trial {record.name} failed with\n{record.message}" for record in records if record.message), ""
        )
        raise SearchError(f"no trial has come to anything: {ledger.ended} of {len(ledger.trials)} ended{failed}")
