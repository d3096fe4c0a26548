"""From the facts to findings: what is right, what may become a problem, what is one, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from palf_dist.doctor.node import NodeFacts
from palf_dist.doctor.survey import Survey
from palf_dist.storage import is_remote

SKEW_SECONDS = 1.0
"""Clocks further apart than this make times in logs and leases on storage hard to read."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    status: Literal["ok", "warning", "problem"]
    message: str
    remedy: str = ""


def judge(survey: Survey, own: Mapping[str, str]) -> list[Finding]:
    """One or more findings for each check. ``own``: versions on the machine that asks (node.own_versions)."""
    findings = [*_nodes(survey), *_versions(survey, own), *_authentication(survey), *_ports(survey), *_gpus(survey)]
    findings += [*_storage(survey), *_mlflow(survey), *_clocks(survey), *_room(survey)]
    return findings


def _nodes(survey: Survey) -> list[Finding]:
    silent = [
        Finding("nodes", "problem", f"{host} told nothing: {why}", "look at that node: ray status, ray logs")
        for host, why in survey.silent.items()
    ]
    if not silent and [node.cpus for node in survey.nodes] == [0.0]:  # as the launchers' files have the head
        return [
            Finding(
                "nodes",
                "warning",
                f"only the head is there ({survey.nodes[0].host}), which gives no CPUs to workers",
                "where an autoscaler adds nodes for a run, ask again while one is on: nothing else was looked at",
            )
        ]
    return silent or [Finding("nodes", "ok", f"{len(survey.nodes)} node(s) answer")]


def _versions(survey: Survey, own: Mapping[str, str]) -> list[Finding]:
    findings = []
    minors = {_minor(node.versions["python"]) for node in survey.nodes}  # nodes send each other pickles; we send none
    for node in survey.nodes:
        for name, mine in own.items():
            theirs = node.versions[name]
            if theirs != mine:
                lenient = name == "python" and len(minors) == 1
                findings.append(
                    Finding(
                        "versions",
                        "warning" if lenient else "problem",
                        f"{node.host} has {name} {theirs}, this machine {mine}",
                        "install the same on every node (cluster/ has an image recipe): results are the same only with "
                        "the same versions",
                    )
                )
    return findings or [Finding("versions", "ok", ", ".join(f"{name} {number}" for name, number in own.items()))]


def _minor(version: str) -> str:
    """3.11 of 3.11.7."""
    return ".".join(version.split(".")[:2])


def _authentication(survey: Survey) -> list[Finding]:
    findings = []
    for node in survey.nodes:
        mode = node.token_file_mode
        if node.authentication == "disabled" and node.listeners:
            findings.append(
                Finding(
                    "authentication",
                    "problem",
                    f"{node.host}: disabled, and other machines can reach it: whoever does runs code there",
                    "start every node with RAY_AUTH_MODE=token and one token; see docs/security.md",
                )
            )
        elif mode is not None and mode & 0o077:
            findings.append(
                Finding(
                    "authentication",
                    "warning",
                    f"{node.host}: other users of the machine can read the token in {node.token_file} (mode {mode:o})",
                    f"chmod 600 {node.token_file}",
                )
            )
    modes = sorted({node.authentication for node in survey.nodes})
    return findings or [Finding("authentication", "ok", f"{', '.join(modes) or 'unknown'} on every node")]


def _ports(survey: Survey) -> list[Finding]:
    findings = []
    for node in survey.nodes:
        open_ports = [item for item in node.listeners if item.answers or node.authentication == "disabled"]
        if open_ports:
            listed = ", ".join(f"{item.port} ({item.process})" for item in open_ports)
            findings.append(
                Finding(
                    "ports",
                    "problem" if node.authentication == "disabled" else "warning",
                    f"{node.host}: listen beyond loopback and ask for no token: {listed}",
                    "keep the cluster's network private (firewall, security group, NetworkPolicy); with token "
                    "authentication what is left open are Ray's metrics",
                )
            )
    return findings or [Finding("ports", "ok", "nothing listens beyond loopback without asking for a token")]


def _gpus(survey: Survey) -> list[Finding]:
    findings = [finding for node in survey.nodes if (finding := _gpus_of(node)) is not None]
    total = sum(node.ray_gpus for node in survey.nodes)
    return findings or [Finding("gpus", "ok", f"{total:g} GPU(s) for workers" if total else "none; workers use CPUs")]


def _gpus_of(node: NodeFacts) -> Finding | None:
    if node.gpus and node.torch_gpus == 0:
        return Finding(
            "gpus",
            "problem" if node.ray_gpus else "warning",
            f"{node.host}: has {node.gpus} GPU(s), and its torch {node.versions['torch']} can use none",
            "install a build of torch for this GPU's driver on the node",
        )
    if node.gpus and not node.ray_gpus:
        return Finding(
            "gpus",
            "warning",
            f"{node.host}: has {node.gpus} GPU(s), and Ray gives out none of them",
            f"start Ray there with --num-gpus={node.gpus}, or leave it so if they are meant for something else",
        )
    if node.ray_gpus > node.gpus:
        return Finding(
            "gpus",
            "problem",
            f"{node.host}: Ray gives out {node.ray_gpus:g} GPU(s), and the machine shows {node.gpus}",
            "start Ray there with the number of GPUs that nvidia-smi -L lists",
        )
    return None


def _storage(survey: Survey) -> list[Finding]:
    if survey.run_dir is None:
        return [Finding("storage", "ok", "not asked; --run-dir tries a run directory from every node")]
    findings = [
        Finding(
            "storage",
            "problem",
            f"{node.host} cannot write {survey.run_dir}: {node.storage}",
            "check that the path or bucket exists and that the node has the credentials and the rights for it",
        )
        for node in survey.nodes
        if node.storage is not None
    ]
    findings += [
        Finding(
            "storage",
            "warning",
            f"{host}: what it writes to {survey.run_dir} the driver's node does not see",
            "use a URI such as s3://BUCKET/RUN or a folder that all nodes share: with a folder of each node's own, a "
            "driver that is started on another node does not find the run",
        )
        for host in survey.unseen
    ]
    kind = "object storage" if is_remote(survey.run_dir) else "folder"
    return findings or [Finding("storage", "ok", f"{survey.run_dir} ({kind}) can be written from every node")]


def _mlflow(survey: Survey) -> list[Finding]:
    if survey.mlflow is None:
        return [Finding("mlflow", "ok", "not asked; --config names a run whose tracking is tried")]
    if survey.mlflow_error is not None:
        return [
            Finding(
                "mlflow",
                "warning",
                f"{survey.mlflow} does not answer the driver: {survey.mlflow_error}",
                "check tracking.uri and the network; a run goes on without it and delivers later",
            )
        ]
    return [Finding("mlflow", "ok", survey.mlflow)]


def _clocks(survey: Survey) -> list[Finding]:
    findings = [
        Finding(
            "clocks",
            "warning",
            f"{node.host}: its clock is {node.skew:+.1f} s off the driver's",
            "synchronise the clocks (chrony, systemd-timesyncd)",
        )
        for node in survey.nodes
        if abs(node.skew) - node.skew_error > SKEW_SECONDS
    ]
    most = max((abs(node.skew) for node in survey.nodes), default=0.0)
    return findings or [Finding("clocks", "ok", f"at most {most:.2f} s apart")]


def _room(survey: Survey) -> list[Finding]:
    if survey.room_error is not None:
        return [Finding("room", "problem", survey.room_error, "lower distributed.workers, or add nodes")]
    if survey.workers is None:
        return [Finding("room", "ok", "not asked; --config names a run whose workers are counted")]
    if survey.room is None:
        return [Finding("room", "ok", "workers: 0 runs in the driver's process")]
    if survey.room == 0:
        remedy = "add nodes; workers: auto waits for them"
        return [Finding("room", "warning", "no node has room for a worker now", remedy)]
    return [Finding("room", "ok", f"for {survey.room} worker(s); the configuration asks for {survey.workers}")]
