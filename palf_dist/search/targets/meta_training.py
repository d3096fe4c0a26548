"""Target: a meta-training. The outer search around it varies fields of its configuration."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from palf_dist import units
from palf_dist.atomic import replacing_folder
from palf_dist.checkpoint import copy_checkpoint, latest_checkpoint
from palf_dist.config import RunConfig
from palf_dist.config_loading import dump_config, load_config
from palf_dist.distributed.cluster import worker_share
from palf_dist.distributed.driver import evaluate_policy, train_policy
from palf_dist.errors import ClusterError, ConfigError
from palf_dist.evaluation.derived import held_out
from palf_dist.evaluation.table import to_records
from palf_dist.progress import Progress
from palf_dist.run_directory import BEST, CONFIG
from palf_dist.search.domains import Domain
from palf_dist.search.targets.config import MetaTrainingConfig, absolute
from palf_dist.search.trial import Parameters, Report, TrialContext
from palf_dist.tasks.cache import cache_folder
from palf_dist.tasks.datasets import load_all
from palf_dist.tasks.encoded import fingerprints
from palf_dist.tasks.family import check_tasks

RUN, ARTEFACT, LOG = "run", "policy", "progress.log"
"""In the folder of a trial: its run directory, its best policy with the configuration of it, and what a run says."""


class MetaTrainingTarget:
    """A trial is one meta-training. Its error is minus the selection score: the mean accuracy of the policy above that
    of plain cross-entropy, which may well be negative. The best artefact is a policy with its configuration."""

    error_name = "minus_selection_score"

    def __init__(self, config: MetaTrainingConfig) -> None:
        """Finds its files again from any working folder."""
        data = config.base.data
        places = {
            "train": tuple(map(absolute, data.train)),
            "held_out": tuple(map(absolute, data.held_out)),
            "cache": str(cache_folder(data.cache)),
        }
        base = config.base.model_copy(update={"data": data.model_copy(update=places)})
        self.config = config.model_copy(update={"base": base})
        self.fingerprints: dict[str, str] = {}

    def check(self) -> None:
        """Raises the DataError or ConfigError that every trial would."""
        datasets = load_all(self.config.base.data)
        check_tasks(self.config.base, datasets)
        self.fingerprints = fingerprints(datasets)

    def space(self) -> dict[str, Domain]:
        return dict(self.config.space)

    def weight_space(self) -> None:
        """The loss is not linear in any field of a configuration."""

    def reports(self) -> int:
        return self.config.reports

    def bundles(self) -> list[dict[str, float]]:
        """A process that drives, and one bundle for each of its workers, which then join the trial's placement group.

        GPUs are counted once this process is connected to Ray. Raises ClusterError where the cluster can never give
        what the workers need.
        """
        distributed = self.config.base.distributed
        if distributed.workers == 0:
            return [{"CPU": float(distributed.threads)}]
        assert distributed.workers != "auto", "MetaTrainingConfig refuses it"
        try:
            share = worker_share(distributed)
        except ClusterError as error:
            raise ClusterError(str(error).replace("distributed.", "target.base.distributed.", 1)) from None
        worker = {"CPU": float(share.cpus)} | ({"GPU": share.gpus} if share.gpus else {})
        return [{"CPU": 1.0}, *(dict(worker) for _ in range(distributed.workers))]

    def run(self, parameters: Parameters, context: TrialContext) -> Iterator[Report]:
        """What the run says is in progress.log of the trial's folder."""
        try:
            config = self.config.trial(parameters)
        except ConfigError as error:  # values that only together are wrong: this trial fails, not the search
            raise ValueError(str(error)) from error
        run_dir, artefact = context.folder / RUN, context.folder / ARTEFACT
        if context.start_from is not None:
            self._take_over(run_dir, config, context.start_from)
        with (context.folder / LOG).open("a", encoding="utf-8") as log:
            progress = Progress(Console(file=log, width=200))
            selections = train_policy(config, run_dir, progress=progress, stop=context.stop)
            with contextlib.closing(selections):
                for selection in selections:
                    with replacing_folder(artefact) as folder:
                        shutil.copytree(run_dir / BEST, folder, dirs_exist_ok=True)
                        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
                    newest = latest_checkpoint(run_dir)
                    assert newest is not None, "there is one at every selection"
                    yield Report(
                        step=-(-selection.version // units.select_every(config)),
                        error=0.0 - selection.score,
                        metrics={name: value for name, value in selection.metrics.items() if math.isfinite(value)},
                        artefact=artefact,
                        checkpoint=newest.folder,
                        done=selection.last,
                    )

    def finish(self, best: Path) -> dict[str, Any]:
        """The held-out comparison of the best policy. Raises PolicyFileError where ``best`` cannot be read."""
        config = load_config(best / CONFIG)
        rows = evaluate_policy(config, best, progress=Progress(Console(quiet=True)))
        return {"held_out": to_records(held_out(rows)[0])}

    def _take_over(self, run_dir: Path, config: RunConfig, checkpoint: Path) -> None:
        """Make ``run_dir`` a run that has come as far as the checkpoint of another one, under ``config``."""
        assert not self.config.unchangeable, "a scheduler that changes trials must refuse these fields"
        with replacing_folder(run_dir) as folder:
            (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
            copy_checkpoint(checkpoint, folder)
