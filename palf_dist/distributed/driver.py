"""One meta-training run from its configuration to its report: the same for no worker, a laptop's and a cluster's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from palf_dist import units
from palf_dist.atomic import write_atomic
from palf_dist.checkpoint import Checkpoint, latest_checkpoint
from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config
from palf_dist.distributed import phases
from palf_dist.distributed.kept_units import discard
from palf_dist.distributed.meta_training import MetaTraining, Selection
from palf_dist.distributed.pool import Broadcast, RunnerFactory
from palf_dist.distributed.session import Session, Stopped, open_session
from palf_dist.errors import DataError, PolicyFileError, RunDirectoryError
from palf_dist.evaluation.methods import check_methods
from palf_dist.evaluation.results_file import results_bytes
from palf_dist.policies import policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, load_policy, policy_bytes, save_policy, trained_on
from palf_dist.progress import Progress
from palf_dist.run_directory import BEST, CHECKPOINTS, CONFIG, REPORT, RESULTS
from palf_dist.tasks.cache import cache_folder
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.encoded import EncodedDataset, fingerprints
from palf_dist.tasks.family import check_tasks
from palf_dist.tracking import NullTracker, Tracker, open_tracker
from palf_dist.workplace import Workplace, open_workplace

if TYPE_CHECKING:
    from palf_dist.evaluation.report import ReportPaths


@dataclass
class RunResult:
    """What a run came to. ``policy`` is None and ``rows`` empty where it was interrupted before there were any.

    Where the run directory is a URI, so are ``run_dir``, ``policy`` and the paths in ``report``.
    """

    run_dir: Path | str
    outer_steps: int = 0  # taken since the run began
    policy: Path | str | None = None
    contributions: dict[str, Any] = field(default_factory=lambda: {"applied": 0, "reissued": 0, "refused": {}})
    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.parquet
    report: ReportPaths | None = None
    mlflow_run_id: str | None = None
    interrupted: bool = False


def meta_train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    tuned: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    make_runner: RunnerFactory = units.Runner,
) -> RunResult:
    """Meta-train, evaluate and report in ``run_dir``: a new or empty folder or URI, or with ``resume`` that of an
    earlier run. ``tuned``: learning rates and L2 strengths that another run found, see ``phases.prepare``.

    The first SIGINT or SIGTERM, or ``stop``, ends the run with a checkpoint and ``interrupted`` set; ``resume`` goes
    on. In synchronous mode the result is then what it would have been. The caller sees to it that a resumed run has the
    configuration it began with. Raises the PalfErrors of the configuration, the data, the directory and the cluster,
    and StorageError where the results could not be written.
    """
    with _open(config, run_dir, resume, progress, stop, make_runner) as (session, place, checkpoint):
        result = RunResult(place.location)
        tracker = open_tracker(place.folder, config)
        if place.shared:
            tracker.set_tags({"palf_dist.run_dir": place.shared})
        status = "FAILED"
        try:
            _train_and_report(session, place, tracker, checkpoint, result, tuned)
            status = "KILLED" if result.interrupted else "FINISHED"
        finally:
            tracker.close(status)
            result.mlflow_run_id = tracker.run_id
        place.finish()
    return result


def train_policy(
    config: RunConfig,
    run_dir: str | Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    make_runner: RunnerFactory = units.Runner,
) -> Generator[Selection, None, None]:
    """Meta-train in ``run_dir``, from the beginning or from where an earlier call ended, and pause at every selection:
    best/ and the newest checkpoint are then up to date. Nothing is evaluated, reported or tracked at the end.

    Ends early, with a checkpoint, once ``stop`` is set. The last selection of an earlier call is given again first.
    Raises as ``meta_train``.
    """
    resume = (Path(run_dir) / CONFIG).is_file()
    with _open(config, run_dir, resume, progress, stop, make_runner) as (session, place, checkpoint):
        try:
            training = MetaTraining(session, place, NullTracker(), checkpoint, compared=False)
            with contextlib.closing(training.run()) as selections:
                for selection in selections:
                    training.keep()
                    yield selection
        except Stopped:
            return


@contextlib.contextmanager
def _open(
    config: RunConfig,
    run_dir: str | Path,
    resume: bool,
    progress: Progress | None,
    stop: threading.Event | None,
    make_runner: RunnerFactory,
) -> Iterator[tuple[Session, Workplace, Checkpoint | None]]:
    """A session on a run directory that is held for it, and the checkpoint to go on from."""
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress or Progress())
        cache = cache_folder(config.data.cache)
        place = stack.enter_context(open_workplace(run_dir, resume=resume, cache=cache, on_event=shown.event))
        checkpoint = latest_checkpoint(place.folder)
        if checkpoint is None and (place.folder / BEST).exists():
            raise RunDirectoryError(
                f"run directory: {run_dir} keeps an evaluation (it has a policy and no checkpoint); go on with "
                f"palf-dist evaluate --resume {run_dir}, or name the folder of a meta-training"
            )
        shown.begin("loading datasets", len(config.data.train) + len(config.data.held_out))
        datasets = load_all(config.data)
        if checkpoint:
            _check_unchanged(checkpoint, datasets)
        check_tasks(config, datasets)
        check_methods(config, datasets)
        stop = stop or threading.Event()
        session = stack.enter_context(open_session(config, datasets, shown, stop, make_runner, place))
        if not resume:
            place.insist(lambda: write_atomic(place.folder / CONFIG, dump_config(config).encode()))
            place.publish()
        yield session, place, checkpoint


def evaluate_policy(
    config: RunConfig,
    policy: str | Path | PolicyArtefact,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    make_runner: RunnerFactory = units.Runner,
) -> list[dict[str, Any]]:
    """Rows of the held-out comparison of ``config`` for a policy, a file or a loaded one. Raises PolicyFileError where
    the two do not fit, DataError where the policy was trained on rows of a held-out dataset.

    Tasks may be of other architectures or horizons than those of the meta-training. However long a run, the policy is
    asked as often as it was there, as ``AdaptiveLoss`` does. ``run_dir``: a new or empty folder or URI that keeps the
    rows with configuration and policy, as the directory of a run; with ``resume`` that of an evaluation of the same
    policy and configuration, which then goes on. A Ctrl-C, or ``stop``, raises KeyboardInterrupt.
    """
    artefact = policy if isinstance(policy, PolicyArtefact) else load_policy(policy)
    if artefact.spec != policy_spec(config.policy):
        named = "policy" if policy is artefact else policy
        raise PolicyFileError(
            f"{named}: not a policy of this configuration's policy section; name the run's own config"
        )
    stop = stop or threading.Event()
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(progress or Progress())
        place = None
        if run_dir is not None:
            cache = cache_folder(config.data.cache)
            place = stack.enter_context(open_workplace(run_dir, resume=resume, cache=cache, on_event=shown.event))
            if resume:
                _check_evaluation(place, artefact)
                if (rows := _finished_rows(place)) is not None:
                    place.finish()
                    return rows
        datasets = load_all(config.data)
        _check_held_out([datasets[source.name] for source in config.data.held_out], artefact.card)
        check_tasks(config, datasets)
        check_methods(config, datasets)
        used = _at_use(config, artefact.refresh_in(config.inner.steps))
        session = stack.enter_context(open_session(used, datasets, shown, stop, make_runner, place))
        if place is not None:
            folder = place.folder
            if not resume:
                place.insist(lambda: write_atomic(folder / CONFIG, dump_config(config).encode()))
            place.insist(lambda: save_policy(folder / BEST, artefact))
            place.publish()
        normalisation = {"feature_mean": artefact.mean.tolist(), "feature_std": artefact.std.tolist()}
        try:
            prepared = {**phases.tune(session), **normalisation}
            rows = _compare(session, place, Broadcast(artefact.phi, 0, prepared), config, artefact)
        except Stopped:
            raise KeyboardInterrupt from None
        if place is not None:
            place.finish()
    return rows


def _compare(
    session: Session, place: Workplace | None, broadcast: Broadcast, config: RunConfig, policy: PolicyArtefact
) -> list[dict[str, Any]]:
    """Rows of the held-out comparison, which ``place`` keeps with the configuration and the card of ``policy``; those
    that are there, where it was finished before."""
    if place is None:
        return phases.evaluate(session, broadcast)
    rows = _finished_rows(place)
    if rows is None:
        rows = phases.evaluate(session, broadcast)
        contents = results_bytes(rows, config, policy.card)
        place.insist(lambda: write_atomic(place.folder / RESULTS, contents))
        discard(place)
    return rows


def _finished_rows(place: Workplace) -> list[dict[str, Any]] | None:
    """Of a comparison that was finished before; None where there is none, or where its file is damaged."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(place.folder / RESULTS).to_pylist()
    except (pa.ArrowException, OSError):
        return None
    discard(place)
    return rows


def _check_evaluation(place: Workplace, policy: PolicyArtefact) -> None:
    """Raises RunDirectoryError where what is to be resumed is no evaluation, or one of another policy. One that was
    killed before its policy was there begins now."""
    if (place.folder / CHECKPOINTS).exists():
        raise RunDirectoryError(
            f"run directory: {place.location} holds a meta-training; go on with palf-dist meta-train --resume "
            f"{place.location}, or name the folder of an evaluation"
        )
    try:
        kept = load_policy(place.folder / BEST)
    except PolicyFileError:
        return
    if policy_bytes(kept) != policy_bytes(policy):
        raise RunDirectoryError(
            f"run directory: {place.location} keeps an evaluation of another policy; leave the policy out to go on "
            "with it, or choose another folder with --run-dir"
        )


def _at_use(config: RunConfig, refresh: int) -> RunConfig:
    """The configuration of runs under a finished policy, however long: no meta-gradient is taken there, and so no
    memory has to be there for one."""
    policy = config.policy.model_copy(update={"refresh": refresh})
    return config.model_copy(update={"policy": policy, "estimator": config.estimator.model_copy(update={"window": 1})})


def _check_unchanged(checkpoint: Checkpoint, datasets: Mapping[str, EncodedDataset]) -> None:
    """Raises DataError for a dataset that is not as it was when the checkpoint was written."""
    before = checkpoint.state["datasets"]
    for name, now in fingerprints(datasets).items():
        if now != before[name]:
            raise DataError(
                f"{name}: the dataset has changed since the run began (then {before[name]}, now {now}); restore its "
                "file, or start a new run with another --run-dir"
            )


def _check_held_out(held_out: Sequence[EncodedDataset], card: Mapping[str, Any]) -> None:
    """Raises DataError for a held-out dataset that the policy of this card was trained on."""
    for dataset in held_out:
        if trained_on(card, dataset.name, dataset.origins):
            raise DataError(
                f"data.held_out: the policy was trained on rows of {dataset.name} (origin {dataset.origin}; it was "
                f"trained on {', '.join(card['trained_on'])}); name a dataset that it has never seen"
            )


def _train_and_report(
    session: Session,
    place: Workplace,
    tracker: Tracker,
    checkpoint: Checkpoint | None,
    result: RunResult,
    tuned: Mapping[str, Any] | None,
) -> None:
    """Fill ``result``, also when the user stops the run half-way."""
    run_dir = place.folder
    for message in checkpoint.skipped if checkpoint else ():
        session.progress.event(message)
    training: MetaTraining | None = None
    try:
        training = MetaTraining(session, place, tracker, checkpoint, tuned=tuned)
        for _ in training.run():
            pass
        best = training.best
        broadcast = Broadcast(best.policy, best.version, training.prepared)
        result.rows = _compare(session, place, broadcast, session.config, training.artefact())
    except Stopped:
        result.interrupted = True
    if training is None:
        return
    learner = training.learner
    result.outer_steps = learner.version
    result.contributions = {
        "applied": learner.applied,
        "reissued": session.reissued,
        "refused": dict(learner.refused),
    }
    if training.policy_file.exists():
        result.policy = place.at(training.policy_file)
    if not result.interrupted:
        place.finish()  # the report reads trajectories from there
        place.insist(lambda: _report(session.config, place, result))
        for path in (run_dir / CONFIG, training.policy_file.parent, run_dir / REPORT):
            tracker.log_artifact(path, path.name if path.is_dir() else "")


def _report(config: RunConfig, place: Workplace, result: RunResult) -> None:
    # Unless told otherwise, matplotlib writes its list of fonts into the home folder when it is imported.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder(config.data.cache) / "matplotlib"))
    from palf_dist.evaluation.report import make_report

    made = make_report(place.folder, place.location)
    result.report = made.moved(place.at)
