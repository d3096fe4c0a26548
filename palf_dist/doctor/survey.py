"""Asks every node of a Ray for its facts, and the driver for what only it can say."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from palf_dist.config import RunConfig, TrackingConfig
from palf_dist.config_loading import is_search_config, load_config
from palf_dist.distributed import cluster
from palf_dist.doctor import node
from palf_dist.doctor.node import Listener, NodeFacts
from palf_dist.errors import ClusterError, PalfError
from palf_dist.redaction import redact
from palf_dist.search.config import SearchConfig, load_search_config
from palf_dist.storage import Storage, first_line, is_remote, is_uri, local_path

NODE_SECONDS = 90.0
"""How long a node may take to say what it knows: on a new node Ray first starts a worker process there."""
CLOCK_READINGS = 5
CONTENT = b"palf-dist doctor\n"
SURVEY_MARK = "palf_dist survey: "
"""What the line of a job's log that holds the survey starts with."""
MLFLOW_SECONDS = 5.0


@dataclass
class Survey:
    """All that ``judgement`` needs; plain data, so that it can come from a job as JSON."""

    nodes: list[NodeFacts] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)  # node -> why it told nothing
    run_dir: str | None = None
    unseen: list[str] = field(default_factory=list)  # nodes whose file in the run directory the driver does not see
    mlflow: str | None = None  # where it is
    mlflow_error: str | None = None
    room: int | None = None  # workers that fit; None: no configuration of a run was given
    workers: int | str | None = None  # that it asks for
    room_error: str | None = None

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Survey:
        """The opposite of ``dataclasses.asdict``."""
        nodes = [
            NodeFacts(**{**facts, "listeners": [Listener(**listener) for listener in facts["listeners"]]})
            for facts in data["nodes"]
        ]
        return cls(**{**data, "nodes": nodes})


def load_any_config(path: str | Path) -> RunConfig | SearchConfig:
    """The configuration of a run or a search. Raises ConfigError."""
    return load_search_config(path) if is_search_config(path) else load_config(path)


def take_survey(address: str | None, run_dir: str | None, config: RunConfig | SearchConfig | None) -> Survey:
    """Look at every node of the Ray at ``address`` (None: a private one on this machine). Raises ClusterError where it
    cannot be reached."""
    survey = Survey(run_dir=run_dir)
    if config is not None and config.tracking.enabled:
        survey.mlflow, survey.mlflow_error = ask_mlflow(config.tracking)
    with cluster.connected(address, 1):
        _ask_nodes(survey)
        if isinstance(config, RunConfig):
            _count_room(survey, config)
    return survey


class _Examiner:
    """An actor on the node that it looks at."""

    def look(self) -> NodeFacts:
        return node.look("token" if is_token_auth_enabled() else "disabled")

    def clock(self) -> float:
        return time.time()

    def write(self, run_dir: str, name: str) -> str | None:
        """Why a file cannot be written into the run directory."""
        self._made = _missing_folders(run_dir)
        try:
            _storage(run_dir).write(name, CONTENT)
        except (OSError, PalfError) as error:
            return redact(first_line(error))
        return None

    def remove(self, run_dir: str, name: str) -> None:
        """Undo ``write``, the folders that it made included."""
        with contextlib.suppress(OSError, PalfError):
            _storage(run_dir).delete(name)
            for folder in self._made:
                folder.rmdir()


def _ask_nodes(survey: Survey) -> None:
    examiner = ray.remote(_Examiner)
    alive = [entry for entry in ray.nodes() if entry["Alive"]]
    actors = {
        entry["NodeID"]: examiner.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(entry["NodeID"], soft=False)
        ).remote()
        for entry in alive
    }
    asked = {name: actor.look.remote() for name, actor in actors.items()}
    deadline = time.monotonic() + NODE_SECONDS
    try:
        for entry in alive:
            name = entry["NodeID"]
            try:
                facts = ray.get(asked[name], timeout=max(1.0, deadline - time.monotonic()))
                facts.skew, facts.skew_error = _skew(actors[name])
                facts.ray_gpus, facts.cpus = entry["Resources"].get("GPU", 0.0), entry["Resources"].get("CPU", 0.0)
                if survey.run_dir is not None:
                    _try_storage(survey, actors[name], facts)
                survey.nodes.append(facts)
            except (ray.exceptions.RayError, TimeoutError) as error:
                survey.silent[entry["NodeManagerAddress"]] = redact(str(error).strip().splitlines()[-1])
    finally:
        for actor in actors.values():
            ray.kill(actor)


def _skew(actor: Any) -> tuple[float, float]:
    """Clock of the actor's node minus ours, by the quickest of some readings, and how far that may be wrong."""
    readings = []
    for _ in range(CLOCK_READINGS):
        before = time.time()
        there = ray.get(actor.clock.remote(), timeout=10)
        after = time.time()
        readings.append(((after - before) / 2, there - (before + after) / 2))
    error, skew = min(readings)
    return skew, error


def _try_storage(survey: Survey, actor: Any, facts: NodeFacts) -> None:
    """Have the node write a file into the run directory, and see whether it is there for the driver too."""
    assert survey.run_dir is not None
    name = f"doctor-{uuid.uuid4().hex}"
    facts.storage = ray.get(actor.write.remote(survey.run_dir, name), timeout=60)
    if facts.storage is None and not _seen(survey.run_dir, name):
        survey.unseen.append(facts.host)
    ray.get(actor.remove.remote(survey.run_dir, name), timeout=60)


def _seen(run_dir: str, name: str) -> bool:
    try:
        return _storage(run_dir).read(name) == CONTENT
    except (OSError, PalfError):
        return False


def _storage(run_dir: str) -> Storage:
    return Storage(run_dir if is_uri(run_dir) else local_path(run_dir).as_uri())


def _missing_folders(run_dir: str) -> list[Path]:
    """Folders that have to be made for a run directory that is a path, the innermost first."""
    if is_remote(run_dir):
        return []
    path = local_path(run_dir)
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def ask_mlflow(tracking: TrackingConfig) -> tuple[str, str | None]:
    """Where this process would track, and why that cannot be reached; None where it answers or is a local store."""
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not uri.startswith(("http://", "https://")):
        return redact(uri), None
    try:
        with contextlib.closing(urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_SECONDS)):
            return redact(uri), None
    except (OSError, ValueError) as error:
        return redact(uri), redact(str(getattr(error, "reason", error)))


def _count_room(survey: Survey, config: RunConfig) -> None:
    survey.workers = config.distributed.workers
    if config.distributed.workers == 0:
        return
    try:
        share = cluster.share_of(config.distributed, cluster.nodes())
        survey.room = cluster.room(share)
    except ClusterError as error:
        survey.room_error = str(error)
