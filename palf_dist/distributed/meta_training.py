"""The outer steps of one run and everything that is written while they go on.

The truth of a run is here and in its checkpoints; workers hold nothing that cannot be done again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palf_dist import units
from palf_dist.checkpoint import Checkpoint, prune, save_checkpoint
from palf_dist.distributed import phases
from palf_dist.distributed.kept_units import discard
from palf_dist.distributed.pool import Broadcast
from palf_dist.distributed.session import Session, Stopped, most_in_flight
from palf_dist.faults import fault_point
from palf_dist.meta_learner import MetaLearner, StepReport
from palf_dist.metrics_log import MetricsLog
from palf_dist.policies import policy_spec
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from palf_dist.run_directory import BEST, RESULTS
from palf_dist.tasks.encoded import fingerprints
from palf_dist.tracking import Tracker
from palf_dist.trajectory import to_parquet, write_trajectory
from palf_dist.types import Contribution, Unit
from palf_dist.workplace import Workplace

SELECTION_SCORE = "selection_score"

UNWRITTEN_BYTES = 256 << 20
"""Trajectories that wait in memory for a disk that takes nothing: thousands of units. With more the run has to end."""


@dataclass(frozen=True)
class Best:
    """The policy of the best selection score so far."""

    policy: np.ndarray
    version: int
    score: float


@dataclass(frozen=True)
class Selection:
    """A policy on its way, scored."""

    version: int  # outer steps taken
    score: float
    last: bool  # there are no more outer steps
    metrics: dict[str, float]  # of the outer step before it


@dataclass(frozen=True)
class _Snapshot:
    """The arguments of ``save_checkpoint``."""

    version: int
    arrays: dict[str, np.ndarray]
    state: dict[str, Any]
    carried: dict[str, dict[str, np.ndarray]]


class MetaTraining:
    """Takes the outer steps of a run, from its beginning or from a checkpoint.

    Synchronous mode: an outer step is the sum of ``groups_per_step`` contributions, all of the newest policy.
    Asynchronous mode: an outer step is one contribution, applied as it arrives.
    """

    def __init__(
        self,
        session: Session,
        place: Workplace,
        tracker: Tracker,
        checkpoint: Checkpoint | None,
        *,
        compared: bool = True,
        tuned: Mapping[str, Any] | None = None,
    ) -> None:
        """``compared``: the held-out comparison follows. ``tuned``: see ``phases.prepare``."""
        self._session, self._place, self._tracker = session, place, tracker
        self._run_dir = place.folder
        self._config = session.config
        self._unwritten: dict[Unit, bytes] = {}  # trajectories that the disk did not take
        session.on_arrival = self._keep_trajectory
        self.learner = MetaLearner(self._config, units.initial_policy(self._config))
        self._carried: dict[int, dict[str, np.ndarray]] = {}
        self._best: Best | None = None
        self._best_written: Best | None = None
        self._issued = 0  # asynchronous mode: units issued since the run began
        if checkpoint is None:
            self.prepared: dict[str, Any] = phases.prepare(session, compared=compared, tuned=tuned)
        else:
            self._restore(checkpoint)
        self._log = MetricsLog(place.folder, next_step=self.learner.version)
        self._whole = self._snapshot()
        self._saved = None if checkpoint is None else self._whole
        if checkpoint is None:
            self._save()
        self._reissued_logged = session.reissued
        self._refused_logged = dict(self.learner.refused)

    @property
    def best(self) -> Best:
        assert self._best is not None, "there is one once ``run`` has been called"
        return self._best

    @property
    def policy_file(self) -> Path:
        return self._run_dir / BEST / "policy.safetensors"

    def run(self) -> Generator[Selection, None, None]:
        """Take all outer steps that are left, with a pause after each that ends with a selection; a run that goes on
        first gives the last one again. Raises Stopped, with everything saved, when the user wants to end, and
        StorageError where the disk does not take the last checkpoint."""
        config = self._config
        steps = config.meta_learner.outer_steps
        orderly = False
        try:
            self._session.progress.begin("meta-training", steps, self.learner.version)
            if self._best is None:
                self._select()
                self._whole = self._snapshot()
            if self.learner.version < steps:  # of a run whose last checkpoint was lost: what follows may differ
                self._place.attempt(lambda: (self._run_dir / RESULTS).unlink(missing_ok=True))
            logged = self._log.latest(SELECTION_SCORE)
            if logged is not None:
                yield self._selection(*logged)
            while self.learner.version < steps:
                began = time.monotonic()
                if config.distributed.mode == "sync":
                    contributions, report = self._sync_step()
                else:
                    contributions, report = self._async_step()
                metrics = self._finish_step(contributions, report, began)
                if SELECTION_SCORE in metrics:
                    yield self._selection(report.outer_step, metrics)
            orderly = True
        except Stopped:
            orderly = True
            raise
        finally:
            self._save(insist=orderly)
            self._place.attempt(self._log.close)

    def keep(self) -> None:
        """Have the newest whole step and the best policy on the disk. To be called while ``run`` pauses. Raises
        StorageError where it does not take them."""
        self._save(insist=True)

    def _sync_step(self) -> tuple[list[Contribution], StepReport]:
        work = units.meta_gradient_units(self._config, self.learner.version)
        contributions = self._session.gather(work, self._broadcast(), self._carried)
        self._carried = {item.unit.group: item.carried for item in contributions if item.carried is not None}
        return contributions, self.learner.apply(contributions)

    def _async_step(self) -> tuple[list[Contribution], StepReport]:
        """Keep every worker busy with the newest policy until a contribution makes a step; late ones are refused."""
        learner, version = self.learner, self.learner.version
        broadcast = self._broadcast()
        while True:
            # never more than there are steps left, so that no work is in flight when the last one is taken
            room = min(self._session.pool.capacity, self._config.meta_learner.outer_steps - version)
            if self._config.distributed.workers == "auto":
                room = min(room, most_in_flight(self._config.distributed))
            while self._session.in_flight < room:
                self._session.pool.submit(self._next_unit(), broadcast)
            contribution = self._session.next()
            report = learner.apply_one(contribution)
            if learner.version > version:
                return [contribution], report
            self._session.progress.status.refused = dict(learner.refused)

    def _next_unit(self) -> Unit:
        step, group = divmod(self._issued, self._config.meta_learner.groups_per_step)
        self._issued += 1
        return units.meta_gradient_units(self._config, step)[group]

    def _finish_step(self, contributions: list[Contribution], report: StepReport, began: float) -> dict[str, float]:
        """Write down an outer step that was taken, select and save where it is time for that; the step's metrics."""
        step, version = report.outer_step, self.learner.version
        fault_point("driver_after_apply", Unit("driver", step, 0))
        status = self._session.progress.status
        status.outer_loss, status.refused = report.outer_loss, dict(self.learner.refused)
        metrics = self._metrics(report)
        if version % units.select_every(self._config) == 0 or version == self._config.meta_learner.outer_steps:
            metrics[SELECTION_SCORE] = self._select()
        metrics["seconds"] = time.monotonic() - began
        self._log.append(step, metrics)
        self._session.metrics.outer_step(metrics, [step - item.policy_version for item in contributions])
        self._tracker.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step)
        self._whole = self._snapshot()
        if version % self._config.checkpoint.every == 0:
            self._save()
        self._session.progress.advance(version)
        return metrics

    def _selection(self, outer_step: int, metrics: dict[str, float]) -> Selection:
        last = outer_step + 1 == self._config.meta_learner.outer_steps
        return Selection(outer_step + 1, metrics[SELECTION_SCORE], last, metrics)

    def _metrics(self, report: StepReport) -> dict[str, float]:
        """One row of metrics.parquet; counts are those of this step, late contributions before it included."""
        refused = {cause: count - self._refused_logged[cause] for cause, count in self.learner.refused.items()}
        reissued = self._session.reissued - self._reissued_logged
        self._refused_logged, self._reissued_logged = dict(self.learner.refused), self._session.reissued
        return {
            "outer_loss": report.outer_loss,
            **report.terms,
            "gradient_norm": report.gradient_norm,
            "learning_rate": report.learning_rate,
            "applied": report.applied,
            "reissued": reissued,
            **{f"refused_{cause}": count for cause, count in refused.items()},
            "workers_alive": self._session.pool.alive,
        }

    def _select(self) -> float:
        """Score the policy as it is now and keep it where no earlier one was better; the initial one takes part."""
        broadcast = self._broadcast()
        score = phases.selection_score(self._session, broadcast)
        self._session.progress.status.selection_score = score
        if self._best is None or score >= self._best.score:
            self._best = Best(broadcast.policy, broadcast.version, score)
            self._place.attempt(self._write_best)
        return score

    def _broadcast(self) -> Broadcast:
        return Broadcast(self.learner.policy.copy(), self.learner.version, self.prepared)

    def artefact(self) -> PolicyArtefact:
        """The best policy. Its card holds nothing that depends on where or how the run was done."""
        config, best, datasets = self._config, self.best, self._session.datasets
        card = {
            "run": config.name,
            "seed": config.seed,
            "outer_step": best.version,
            "selection_score": best.score,
            "trained_on": [source.name for source in config.data.train],
            "origins": sorted({origin for source in config.data.train for origin in datasets[source.name].origins}),
            "held_out": [source.name for source in config.data.held_out],
            "architectures": [item.model_dump(mode="json") for item in config.tasks.architectures],
            "inner_steps": config.inner.steps,
            "ema": config.inner.ema,
        }
        mean, std = (np.array(self.prepared[name], np.float32) for name in ("feature_mean", "feature_std"))
        return PolicyArtefact(policy_spec(config.policy), best.policy, mean, std, card)

    def _snapshot(self) -> _Snapshot:
        """All that a resumed run needs. Taken after whole outer steps only, with their selection and their log."""
        best = self._best
        state = {
            "datasets": fingerprints(self._session.datasets),
            "prepared": self.prepared,
            "best": None if best is None else {"version": best.version, "score": best.score},
            "reissued": self._session.reissued,
            "issued": self._issued,
        }
        arrays = self.learner.state()
        if best is not None:
            arrays["best_policy"] = best.policy
        return _Snapshot(self.learner.version, arrays, state, {str(g): inner for g, inner in self._carried.items()})

    def _keep_trajectory(self, contribution: Contribution) -> None:
        """Write down what a contribution brings along, applied or refused later, so that nobody has to hold it."""
        table, contribution.trajectory = contribution.trajectory, None
        if table is None:  # of another kind of unit, or the worker has written it
            return
        content = to_parquet(table)
        if not self._place.attempt(lambda: write_trajectory(self._run_dir, contribution.unit, content)):
            self._unwritten[contribution.unit] = content
            if sum(map(len, self._unwritten.values())) > UNWRITTEN_BYTES:
                self._place.insist(self._write)

    def _save(self, *, insist: bool = False) -> None:
        """Write the newest whole step as a checkpoint, once, and all that could not be written before. A disk that
        takes nothing is only told, unless we ``insist``: the next checkpoint tries again."""
        if self._whole is not self._saved:
            fault_point("driver_before_checkpoint", Unit("driver", self._whole.version, 0))
        if not self._place.attempt(self._write, whole=True) and insist:
            self._place.insist(self._write)
        self._place.publish()

    def _write(self) -> None:
        """What was logged before a checkpoint is durable first."""
        for unit in list(self._unwritten):
            write_trajectory(self._run_dir, unit, self._unwritten[unit])
            del self._unwritten[unit]
        whole = self._whole
        if whole is not self._saved:
            self._log.compact()
            save_checkpoint(self._run_dir, whole.version, whole.arrays, whole.state, whole.carried)
            prune(self._run_dir, self._config.checkpoint.keep)
            self._saved = whole
            discard(self._place)  # what was prepared is in the checkpoint
        self._write_best()

    def _write_best(self) -> None:
        if self._best is not self._best_written:
            save_policy(self.policy_file.parent, self.artefact())
            self._best_written = self._best

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.learner.load_state(checkpoint.learner)
        state = checkpoint.state
        self.prepared = state["prepared"]
        if state["best"] is not None:
            self._best = Best(checkpoint.learner["best_policy"], **state["best"])
        self._carried = {int(group): inner for group, inner in checkpoint.carried.items()}
        self._issued = state["issued"]
        self._session.reissued_before = state["reissued"]
