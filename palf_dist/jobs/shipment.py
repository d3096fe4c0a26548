"""What a submitted job takes along: the resolved configuration, small dataset files, a policy; and its command line.

Everything is checked here, before anything is sent. Values that the user gave with --set are in the configuration
file, never in the entry point or the metadata, which everybody who may look at the cluster's jobs can read.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pyarrow.fs as pafs

from palf_dist.architecture_config import ModuleConfig
from palf_dist.config import DatasetSource, RunConfig
from palf_dist.config_loading import dump_config
from palf_dist.errors import ConfigError, DataError
from palf_dist.policies.policy_file import PolicyArtefact, save_policy
from palf_dist.redaction import has_credentials
from palf_dist.run_directory import CONFIG
from palf_dist.search.config import SearchConfig
from palf_dist.search.targets.config import LossWeightsConfig
from palf_dist.storage import is_uri, local_path
from palf_dist.tasks.files import parquet_files

CommandName = Literal["meta-train", "tune", "evaluate"]
MOST_BYTES = 64 << 20
"""Dataset files of up to so many bytes, all together, go with the job: the head keeps them in its memory."""
DATA, POLICY = "data", "policy"


@dataclass(frozen=True)
class Shipment:
    """A folder to be sent, and what is to be done in it."""

    command: CommandName
    arguments: tuple[str, ...]  # of ``palf-dist COMMAND`` on the cluster
    name: str  # of the run
    run_dir: str | None
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def resumable(self) -> bool:
        """Whether it goes on when it is submitted again; an evaluation that is not kept begins anew."""
        return self.run_dir is not None

    def entrypoint(self, version: str, max_restarts: int) -> str:
        """The shell command of the job. ``version``: of palf_dist here, which the cluster must have too."""
        own = ["--for-version", version, *(("--max-restarts", str(max_restarts)) if max_restarts else ())]
        return shlex.join(["python", "-m", "palf_dist.jobs", *own, self.command, *self.arguments])


@dataclass
class Packer:
    """Fills ``folder``, which is empty."""

    folder: Path
    notes: list[str] = field(default_factory=list)
    _bytes: int = 0

    def meta_train(self, config: RunConfig | None, run_dir: str | None, resume: str | None, as_json: bool) -> Shipment:
        """``config`` may be None where ``resume`` is given: the run has its own. Raises ConfigError and DataError."""
        arguments, where = self._run(run_dir, resume)
        if config is not None:
            arguments = [*self._write(self._run_config(config)), *arguments]
        return self._shipment("meta-train", [*arguments, *_json(as_json)], config.name if config else "resume", where)

    def tune(
        self,
        config: SearchConfig | None,
        run_dir: str | None,
        resume: str | None,
        time_budget: str | None,
        as_json: bool,
    ) -> Shipment:
        """As ``meta_train``."""
        arguments, where = self._run(run_dir, resume)
        local_path(where)  # a search cannot be kept elsewhere
        if config is not None:
            arguments = [*self._write(self._search_config(config)), *arguments]
        if time_budget is not None:
            arguments += ["--time-budget", time_budget]
        return self._shipment("tune", [*arguments, *_json(as_json)], config.name if config else "resume", where)

    def evaluate(
        self,
        config: RunConfig | None,
        policy: PolicyArtefact | None,
        run_dir: str | None,
        resume: str | None,
        as_json: bool,
        *,
        quick: bool = False,
    ) -> Shipment:
        """``policy`` goes along. ``run_dir``: None where nothing is kept. ``config`` and ``policy`` may be None where
        ``resume`` is given: the evaluation has its own."""
        arguments, where = ([], None) if run_dir is None and resume is None else self._run(run_dir, resume)
        if config is not None:
            arguments = [*self._write(self._run_config(config)), *arguments]
        if policy is not None:
            save_policy(self.folder / POLICY, policy)
            arguments = [POLICY, *arguments]
        options = [*(["--quick"] if quick else []), *_json(as_json)]
        name = f"{config.name}-evaluate" if config else "resume"
        return self._shipment("evaluate", [*arguments, *options], name, where)

    def configuration(self, config: RunConfig | SearchConfig) -> list[str]:
        """The options that name a configuration which goes along by itself, without its data."""
        return self._write(config)

    def _shipment(self, command: CommandName, arguments: Sequence[str], name: str, run_dir: str | None) -> Shipment:
        return Shipment(command, tuple(arguments), name, run_dir, tuple(self.notes))

    def _run(self, run_dir: str | None, resume: str | None) -> tuple[list[str], str]:
        """The option that names the run directory, and its name."""
        option, where = ("--run-dir", run_dir) if resume is None else ("--resume", resume)
        if run_dir is not None and resume is not None:
            raise ConfigError(f"--run-dir {run_dir}: a resumed run goes on in its own folder; leave --run-dir out")
        if where is None:
            raise ConfigError(
                "--run-dir: name where the run is kept, a URI such as s3://BUCKET/RUN or a folder that every node of "
                "the cluster shares; the job's own folder is gone when the job is"
            )
        refuse_secrets(option, where)
        if not is_uri(where):
            if not Path(where).is_absolute():
                raise ConfigError(
                    f"{option} {where}: a relative path means nothing on a cluster; name a URI such as s3://BUCKET/RUN "
                    "or the absolute path of a folder that every node shares"
                )
            self.notes.append(
                f"{where} is a path on the cluster: unless it is a folder that the nodes share, the run is lost with "
                "the node that its driver is on"
            )
        return [option, where], where

    def _write(self, config: RunConfig | SearchConfig) -> list[str]:
        tracking = config.tracking
        if tracking.enabled and tracking.uri is None:
            self.notes.append(
                "tracking.uri is not given: MLflow is where MLFLOW_TRACKING_URI says on the cluster, and lost with the "
                "job where that says nothing"
            )
        elif tracking.enabled and tracking.uri is not None:
            refuse_secrets("tracking.uri", tracking.uri)
        path = self.folder / CONFIG
        path.write_text(dump_config(config), encoding="utf-8")
        path.chmod(0o600)
        return ["--config", CONFIG]

    def _run_config(self, config: RunConfig) -> RunConfig:
        """The configuration as the cluster reads it: on the cluster itself, with the paths of the files that go
        along."""
        self._modules_stay("tasks.architectures", config)
        data = config.data
        moved = {
            part: tuple(self._along(f"data.{part}.{index}", source) for index, source in enumerate(getattr(data, part)))
            for part in ("train", "held_out")
        }
        return config.model_copy(
            update={
                "data": data.model_copy(update=moved),
                "distributed": config.distributed.model_copy(update={"address": "auto"}),
            }
        )

    def _search_config(self, config: SearchConfig) -> SearchConfig:
        target = config.target
        if isinstance(target, LossWeightsConfig):
            self._stays("target.dataset", target.dataset)
            if "cache" not in target.model_fields_set:  # the default is this machine's
                target = target.model_copy(update={"cache": None})
        else:
            self._modules_stay("target.base.tasks.architectures", target.base)
            for part in ("train", "held_out"):
                for index, source in enumerate(getattr(target.base.data, part)):
                    self._stays(f"target.base.data.{part}.{index}", source)
        cluster = config.distributed.model_copy(update={"address": "auto"})
        return config.model_copy(update={"target": target, "distributed": cluster})

    def _along(self, where: str, source: DatasetSource) -> DatasetSource:
        """The dataset with its files beside the configuration, where they are small files of this machine."""
        if source.path is None or is_uri(source.path):
            refuse_secrets(f"{where}.path", source.path or "")
            return source
        try:
            _, files = parquet_files(source.path)
        except DataError:
            if Path(source.path).is_absolute():
                return self._stays(where, source)
            raise
        size = sum(file.size for file in files)
        if self._bytes + size > MOST_BYTES:
            if Path(source.path).is_absolute():
                return self._stays(where, source)
            raise DataError(
                f"{where}.path: {source.path} has {size >> 20} MiB, and a job takes {MOST_BYTES >> 20} MiB of data "
                "along; put it where the cluster reads it, and name its URI or its absolute path there"
            )
        self._bytes += size
        return source.model_copy(update={"path": self._copied(source.name, files)})

    def _copied(self, name: str, files: Sequence[pafs.FileInfo]) -> str:
        """The same for the same dataset, however often it is submitted: a resumed run compares its paths."""
        target = self.folder / DATA / name.replace("/", "_")
        while target.exists():  # a/b after a_b
            target = target.with_name(f"{target.name}_")
        target.mkdir(parents=True)
        for index, file in enumerate(files):
            shutil.copyfile(file.path, target / f"{index:05d}.parquet")
        return f"{DATA}/{target.name}"

    def _modules_stay(self, where: str, config: RunConfig) -> None:
        for index, architecture in enumerate(config.tasks.architectures):
            if isinstance(architecture, ModuleConfig):
                module = architecture.factory.partition(":")[0]
                self.notes.append(
                    f"{where}.{index}.factory: {module} is not sent; install it on every node, or put it on PYTHONPATH"
                )

    def _stays(self, where: str, source: DatasetSource) -> DatasetSource:
        if source.path is not None and not is_uri(source.path):
            self.notes.append(f"{where}.path: {source.path} is not sent; every node must have it under that path")
        else:
            refuse_secrets(f"{where}.path", source.path or "")
        return source


def new_job_id(name: str) -> str:
    return f"palf-{name}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"


def refuse_secrets(name: str, uri: str) -> None:
    """Raises ConfigError for a URI with a password or keys in it, which would stand in the job's description."""
    if has_credentials(uri):
        raise ConfigError(
            f"{name}: holds a password or a key, which everybody who may look at the cluster's jobs could read; leave "
            "it out, and give it to the cluster's nodes in their environment (for instance AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY)"
        )


def _json(wanted: bool) -> list[str]:
    return ["--json"] if wanted else []
