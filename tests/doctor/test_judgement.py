from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from palf_dist.doctor.judgement import Finding, judge
from palf_dist.doctor.node import Listener, NodeFacts
from palf_dist.doctor.survey import Survey

OWN = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "palf-dist": "0.1.0"}
NODE = NodeFacts("a", OWN, "token", cpus=2)


def findings(survey: Survey) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in judge(survey, OWN):
        found.setdefault(finding.check, []).append(finding)
    return found


def test_nothing_to_find() -> None:
    found = findings(Survey([NODE, replace(NODE, host="b")], run_dir="s3://bucket/run", mlflow="http://m", workers=0))
    assert list(found) == [
        *("nodes", "versions", "authentication", "ports", "gpus", "storage", "mlflow", "clocks", "room"),
    ]
    assert {finding.status for check in found.values() for finding in check} == {"ok"}


@pytest.mark.parametrize(
    ("change", "check", "status", "message"),
    [
        ({"versions": {**OWN, "ray": "2.59.0"}}, "versions", "problem", "b has ray 2.59.0, this machine 2.60.0"),
        ({"versions": {**OWN, "palf-dist": "not installed"}}, "versions", "problem", "palf-dist not installed"),
        ({"versions": {**OWN, "python": "3.11.9"}}, "versions", "warning", "b has python 3.11.9"),
        ({"versions": {**OWN, "python": "3.12.1"}}, "versions", "problem", "b has python 3.12.1"),
        (
            {"authentication": "disabled", "listeners": [Listener(6379, "gcs_server", False)]},
            "authentication",
            "problem",
            "b: disabled, and other machines can reach it",
        ),
        (
            {"authentication": "disabled", "listeners": [Listener(6379, "gcs_server", False)]},
            "ports",
            "problem",
            "listen beyond loopback and ask for no token: 6379 (gcs_server)",
        ),
        ({"listeners": [Listener(6379, "gcs_server", False)]}, "ports", "ok", "nothing listens beyond loopback"),
        ({"listeners": [Listener(44217, "python", True)]}, "ports", "warning", "ask for no token: 44217 (python)"),
        ({"token_file": "/t", "token_file_mode": 0o640}, "authentication", "warning", "the token in /t (mode 640)"),
        ({"token_file": "/t", "token_file_mode": 0o600}, "authentication", "ok", "token on every node"),
        ({"gpus": 2, "torch_gpus": 0, "ray_gpus": 2.0}, "gpus", "problem", "its torch 2.13.0 can use none"),
        ({"gpus": 2, "torch_gpus": 0}, "gpus", "warning", "its torch 2.13.0 can use none"),
        ({"gpus": 2, "torch_gpus": 2}, "gpus", "warning", "Ray gives out none of them"),
        ({"gpus": 1, "torch_gpus": 1, "ray_gpus": 2.0}, "gpus", "problem", "Ray gives out 2 GPU(s)"),
        ({"gpus": 2, "torch_gpus": 2, "ray_gpus": 2.0}, "gpus", "ok", "2 GPU(s) for workers"),
        ({"storage": "Access denied"}, "storage", "problem", "b cannot write s3://bucket/run: Access denied"),
        ({"skew": -3.0, "skew_error": 0.1}, "clocks", "warning", "its clock is -3.0 s off"),
        ({"skew": 3.0, "skew_error": 2.5}, "clocks", "ok", "3.00 s apart"),
    ],
)
def test_what_is_wrong_with_a_node(change: dict[str, object], check: str, status: str, message: str) -> None:
    other = replace(NODE, host="b", **change)  # type: ignore[arg-type]
    [finding] = findings(Survey([NODE, other], run_dir="s3://bucket/run"))[check]
    assert finding.status == status and message in finding.message
    assert (finding.remedy == "") == (status == "ok"), "whatever is not right has a remedy"


@pytest.mark.parametrize(
    ("change", "check", "status", "message"),
    [
        ({"silent": {"10.0.0.2": "no palf_dist"}}, "nodes", "problem", "10.0.0.2 told nothing: no palf_dist"),
        ({"nodes": [replace(NODE, cpus=0.0)]}, "nodes", "warning", "only the head is there (a)"),
        ({"unseen": ["b"]}, "storage", "warning", "b: what it writes to /run the driver's node does not see"),
        ({"mlflow": "http://m", "mlflow_error": "timed out"}, "mlflow", "warning", "does not answer the driver"),
        ({"room_error": "5 workers are more", "workers": 5}, "room", "problem", "5 workers are more"),
        ({"room": 0, "workers": "auto"}, "room", "warning", "no node has room"),
        ({"room": 8, "workers": "auto"}, "room", "ok", "for 8 worker(s); the configuration asks for auto"),
    ],
)
def test_what_is_wrong_with_a_cluster(change: dict[str, object], check: str, status: str, message: str) -> None:
    [finding] = findings(replace(Survey([NODE], run_dir="/run"), **change))[check]  # type: ignore[arg-type]
    assert finding.status == status and message in finding.message
    assert (finding.remedy == "") == (status == "ok")


def test_another_python_than_that_of_all_nodes_only_warns() -> None:
    nodes = [replace(NODE, host=host, versions={**OWN, "python": "3.12.1"}) for host in "ab"]
    assert [finding.status for finding in findings(Survey(nodes))["versions"]] == ["warning", "warning"]


def test_a_survey_comes_through_json() -> None:
    survey = Survey([replace(NODE, listeners=[Listener(1, "raylet", True)])], {"b": "why"}, "s3://b/r", room=3)
    assert Survey.from_plain(json.loads(json.dumps(asdict(survey)))) == survey
