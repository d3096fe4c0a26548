"""What KubeRay 1.7 takes in a RayCluster and a RayJob, as JSON schema: no package carries its resource definitions.

Written after the field lists in ray-project/kuberay, ray-operator/apis/ray/v1/{raycluster,rayjob}_types.go, for the
fields that the manifests may want; any other is refused. Pod templates are Kubernetes' own: see ``pod_templates``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TEXT = {"type": "string", "minLength": 1}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG = {"type": "boolean"}
POD = {"type": "object", "required": ["spec"]}


def record(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": fields}


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
    return record(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=record("name", name=name, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=spec,
    )


HEAD = record(
    "template", template=POD, rayStartParams=TEXTS, resources=TEXTS, labels=TEXTS, serviceType=TEXT, enableIngress=FLAG
)
WORKERS = record(
    "groupName minReplicas maxReplicas template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    priority=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    resources=TEXTS,
    labels=TEXTS,
    template=POD,
)
CLUSTER = record(
    "headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=record("mode", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=record(
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        version={"enum": ["v1", "v2"]},
        resources={"type": "object"},
        securityContext={"type": "object"},
    ),
    suspend=FLAG,
    upgradeStrategy=record(type={"enum": ["Recreate", "None"]}),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = record(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={**COUNT, "minimum": 1},
    submitterConfig=record(backoffLimit=COUNT),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    metadata=TEXTS,
    suspend=FLAG,
    rayClusterSpec=CLUSTER,
)
SCHEMAS = {"RayCluster": resource("RayCluster", CLUSTER), "RayJob": resource("RayJob", JOB)}


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each pod of a manifest as a PodTemplate, which Kubernetes' own schema describes."""
    spec = cluster_spec(manifest)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": group["template"]}
