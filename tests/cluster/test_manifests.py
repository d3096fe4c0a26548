"""The files that launch clusters: right by Ray's, KubeRay's and Kubernetes' schemas, true to the lock file and to our
commands, and without secrets."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import mlflow.environment_variables
import pyarrow
import pytest
import ray
import yaml
from ray._private.authentication.authentication_token_setup import _get_default_token_path
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from palf_dist.cli_jobs import STOP_SECONDS
from palf_dist.cli_shared import load_run_config
from palf_dist.jobs.entry import COMMANDS
from tests.cluster.kuberay_schema import SCHEMAS, cluster_spec, pod_templates

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
CLOUDS = [ROOT / "ray_cluster.yaml", CLUSTER / "gcp.yaml", CLUSTER / "azure.yaml"]
LAUNCHED = [*CLOUDS, CLUSTER / "on_premises.yaml"]
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCRIPTS = [CLUSTER / "environment.sh", CLUSTER / "set_up_node.sh"]
DOCKERFILE = CLUSTER / "Dockerfile"
SHARED = "# From here on the same in every variant"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
IMAGE_FOLDER = "/opt/palf_dist/"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def instructions(word: str) -> list[str]:
    """The arguments of each such instruction in the Dockerfile."""
    return re.findall(rf"^{word} (.*)$", DOCKERFILE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", LAUNCHED, ids=name_of)
def test_ray_takes_the_launchers_file(path: Path) -> None:
    config = prepare_config(load(path))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    if path in CLOUDS:
        assert head["max_workers"] == 0 and head["resources"] == {"CPU": 0, "GPU": 0}
    else:
        assert config["max_workers"] == len(config["provider"]["worker_ips"])


def test_ray_refuses_a_field_that_it_does_not_know() -> None:
    config = load(CLOUDS[0])
    config["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("path", CLOUDS, ids=name_of)
def test_spot_goes_before_on_demand_and_both_are_bounded(path: Path) -> None:
    config = load(path)
    spot, fallback = (config["available_node_types"][name] for name in ("gpu_spot", "gpu_on_demand"))
    assert spot["priority"] > fallback.get("priority", 0)
    assert spot["resources"] == fallback["resources"] and spot["resources"]["GPU"] > 0
    assert spot["node_config"] != fallback["node_config"]
    for group in (spot, fallback):
        assert 0 == group["min_workers"] < group["max_workers"] <= config["max_workers"]


def test_the_head_on_aws_has_a_role_that_can_start_the_workers() -> None:
    """Not Ray's own, which may not pass on the workers' role; nor may it look up what an image's alias stands for."""
    types = load(ROOT / "ray_cluster.yaml")["available_node_types"]
    roles = {name: group["node_config"]["IamInstanceProfile"]["Name"] for name, group in types.items()}
    assert roles["gpu_spot"] == roles["gpu_on_demand"] != roles["head"]
    assert all(group["node_config"]["ImageId"].startswith("ami-") for group in types.values())


def test_the_variants_share_what_nodes_get_and_start() -> None:
    assert len({path.read_text().split(SHARED)[1] for path in LAUNCHED}) == 1


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_start_takes_the_options(role: str) -> None:
    stop, start = load(CLOUDS[0])[f"{role}_start_ray_commands"]
    assert stop == "ray stop"
    words = shlex.split(start.split(";")[1])
    assert words[:2] == ["ray", "start"]
    options = ray_cli.commands["start"].make_context("ray start", words[2:]).params
    assert options["disable_usage_stats"]
    if role == "head":
        assert options["head"] and options["num_cpus"] == options["num_gpus"] == 0
        assert options["dashboard_host"] == "127.0.0.1"
    else:
        assert options["address"] == "$RAY_HEAD_IP:6379"


def test_nodes_get_the_token_and_all_that_the_installation_reads() -> None:
    mounts = load(CLOUDS[0])["file_mounts"]
    token = "~/" + str(_get_default_token_path().relative_to(Path.home()))
    assert mounts.pop(token) == token
    assert all((ROOT / local).exists() and remote == f"~/palf_dist/{local}" for remote, local in mounts.items())
    copied = {source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]}
    needed = {"palf_dist", "constraints.txt", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert needed <= set(mounts.values()) and needed <= copied
    (set_up,) = load(CLOUDS[0])["setup_commands"]
    assert set_up.split()[1].removeprefix("~/palf_dist/") == name_of(CLUSTER / "set_up_node.sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_bash_can_read_the_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


def exported() -> dict[str, str]:
    """What environment.sh sets, with what it offers in comments."""
    return dict(re.findall(r"^(?:# )?export (\w+)=(\S+)", SCRIPTS[0].read_text(), re.MULTILINE))


def test_the_environment_asks_for_the_token_and_leads_to_the_installation(tmp_path: Path) -> None:
    script = f". {SCRIPTS[0]}; echo $RAY_AUTH_MODE $PATH"
    run = subprocess.run(
        ["bash", "-euc", script],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"token {tmp_path}/palf_dist/.venv/bin:")


@cache
def read_by(name: str) -> bool:
    """Whether a program that we start reads the environment variable."""
    if name.startswith("RAY_"):
        gcs = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
        return name.encode() in gcs.read_bytes() or name == "RAY_USAGE_STATS_ENABLED"
    if name.startswith("PALF_"):
        return any(f'"{name}"' in path.read_text() for path in (ROOT / "palf_dist").rglob("*.py"))
    if name.startswith("MLFLOW_"):
        return hasattr(mlflow.environment_variables, name)
    libraries = Path(pyarrow.__file__).parent.glob("libarrow.so*")
    return any(name.encode() in library.read_bytes() for library in libraries)


def test_every_variable_is_read_by_somebody() -> None:
    names = set(exported()) - {"PATH"}
    for path in KUBERAY:
        names |= set(re.findall(r"\{name: ([A-Za-z_]+), value:", path.read_text()))
    names |= {word.split("=")[0] for line in instructions("ENV") for word in line.split()}
    names -= {"PATH", "PIP_CONSTRAINT", "PIP_NO_CACHE_DIR"}
    assert {"RAY_AUTH_MODE", "PALF_CACHE", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"} <= names
    assert [name for name in sorted(names) if not read_by(name)] == []
    assert not read_by("RAY_health_check_timeout_s") and not read_by("PALF_NOTHING") and not read_by("AWS_NOTHING")


def test_lost_nodes_are_noticed_equally_soon_everywhere() -> None:
    tuned = {name: value for name, value in exported().items() if "health_check" in name}
    assert len(tuned) == 4
    for path in KUBERAY:
        for template in pod_templates(load(path)):
            env = {entry["name"]: entry["value"] for entry in template["template"]["spec"]["containers"][0]["env"]}
            assert tuned.items() <= env.items()


def test_no_file_holds_a_secret() -> None:
    for path in [*LAUNCHED, *KUBERAY, *SCRIPTS, DOCKERFILE, ROOT / ".dockerignore"]:
        text = path.read_text()
        assert "RAY_AUTH_TOKEN" not in text, path  # it comes from the file or from the Secret
        assert not re.search(r"[0-9a-fA-F]{32}|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), path
        assert not re.search(r"(?i)(password|secret_access_key|api_key)\s*[:=]", text), path


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_kuberay_takes_the_manifest(path: Path) -> None:
    manifest = load(path)
    jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]]).validate(manifest)
    for template in pod_templates(manifest):
        kubernetes_validate.validate(template, kubernetes_validate.latest_version(), strict=True)
    wrong = copy.deepcopy(template)
    wrong["template"]["spec"]["containers"][0]["livenessProbe"]["httpPost"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="httpPost"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", KUBERAY, ids=name_of)
def test_pods_have_no_privileges_and_bounds(path: Path) -> None:
    spec = cluster_spec(load(path))
    assert spec["enableInTreeAutoscaling"] and spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for template in pod_templates(load(path)):
        pod = template["template"]["spec"]
        (container,) = pod["containers"]
        assert "restartPolicy" not in pod  # the operator's own, as Ray's autoscaler wants it
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert container["readinessProbe"]["httpGet"]["path"] and container["livenessProbe"]["httpGet"]["path"]
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in spec["workerGroupSpecs"]]
    assert all(limits["nvidia.com/gpu"] == 1 for limits in gpus)


def test_the_jobs_cluster_is_the_one_that_stays() -> None:
    cluster, job = (load(CLUSTER / "kuberay" / f"ray_{kind}.yaml") for kind in ("cluster", "job"))
    assert cluster["spec"].pop("upgradeStrategy") == {"type": "Recreate"}  # the job's is replaced with the job
    assert cluster_spec(job) == cluster["spec"]
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["submitterConfig"]["backoffLimit"] > 0


def test_the_jobs_command_can_be_run() -> None:
    from typer.main import get_command

    from palf_dist.cli import app

    python, script, *arguments = shlex.split(load(CLUSTER / "kuberay" / "ray_job.yaml")["spec"]["entrypoint"])
    assert python == "python" and f"COPY jobs {IMAGE_FOLDER}jobs" in DOCKERFILE.read_text()
    source = (ROOT / script.removeprefix(IMAGE_FOLDER)).read_text()
    (command,) = re.findall(r'main\("(.*)"\)', source)
    assert command in COMMANDS
    index = arguments.index("--max-restarts")
    assert int(arguments[index + 1]) > 0
    del arguments[index : index + 2]
    options = get_command(app).commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    assert options["run_dir"].startswith("s3://") and options["resume"] is None
    config = ROOT / str(options["config"]).removeprefix(IMAGE_FOLDER)
    settings = load_run_config(config, options["overrides"], None, None)
    assert settings.distributed.workers == "auto" and settings.distributed.gpus_per_worker == 1


def test_the_job_has_as_long_to_save_as_a_submitted_one() -> None:
    environment = yaml.safe_load(load(CLUSTER / "kuberay" / "ray_job.yaml")["spec"]["runtimeEnvYAML"])
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}


def test_versions_are_those_of_the_lock_and_of_the_package() -> None:
    tags = set()
    for path in KUBERAY:
        spec = cluster_spec(load(path))
        assert spec["rayVersion"] == LOCK["ray"]
        tags |= {template["template"]["spec"]["containers"][0]["image"] for template in pod_templates(load(path))}
    assert tags == {f"palf-dist:{PROJECT['version']}"}
    assert f"-t palf-dist:{PROJECT['version']} " in DOCKERFILE.read_text()
    minor = int(re.findall(r"^ARG PYTHON=3\.(\d+)$", DOCKERFILE.read_text(), re.MULTILINE)[0])
    assert f">=3.{minor}" == PROJECT["requires-python"]  # what CI tests
    assert "torch" in LOCK and "PIP_CONSTRAINT=/build/constraints.txt" in DOCKERFILE.read_text()
    assert 'PIP_CONSTRAINT="$PWD/constraints.txt"' in SCRIPTS[1].read_text()


def test_the_image_gets_what_it_copies_and_runs_without_root() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]}
    assert copied == let_through and all((ROOT / source).exists() for source in copied)
    (user,) = instructions("USER")
    assert int(user) > 0 and any(f"--uid {user} " in line for line in instructions("RUN"))
