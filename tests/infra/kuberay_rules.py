"""What KubeRay itself and this project ask of a manifest, beyond what a schema can say.

KubeRay validates names, modes and groups in its operator (ray-operator/pkg/../validation.go), so a
manifest that passes every schema may still be refused, or accepted and never start.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# The operator appends to these names; Kubernetes allows 63.
MAX_NAME = {"RayCluster": 52, "RayJob": 47, "RayCronJob": 36}
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
# Longer than RAY_JOB_STOP_WAIT_TIME_S: a pod that is deleted lets the stage save first.
MIN_GRACE_SECONDS = 90
# All that may stand in the spec of each kind: the operator drops other keys without a word.
KEYS = {
    "RayJob": {
        "entrypoint", "submissionMode", "submitterConfig", "backoffLimit", "rayClusterSpec",
        "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "runtimeEnvYAML", "metadata",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend", "jobId",
        "activeDeadlineSeconds", "submitterPodTemplate", "clusterSelector", "deletionStrategy",
        "preRunningDeadlineSeconds",
    },
    "RayCluster": {
        "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions",
        "headGroupSpec", "workerGroupSpecs", "gcsFaultToleranceOptions", "suspend", "managedBy",
        "headServiceAnnotations", "upgradeStrategy",
    },
}  # fmt: skip


def findings(manifest: Mapping[str, Any], *, ray_version: str) -> list[str]:
    """Everything that is wrong with a RayJob or RayCluster."""
    return list(_check(manifest, ray_version))


def _check(manifest: Mapping[str, Any], ray_version: str) -> Iterator[str]:
    kind, name, spec = manifest["kind"], manifest["metadata"]["name"], manifest["spec"]
    if manifest.get("apiVersion") != "ray.io/v1":
        yield f"apiVersion {manifest.get('apiVersion')!r}"
    if len(name) > MAX_NAME[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name!r}"
    yield from (f"unknown key {key}" for key in sorted(spec.keys() - KEYS[kind]))
    cluster = spec
    if kind == "RayJob":
        yield from _check_job(spec)
        cluster = spec.get("rayClusterSpec", {})
        yield from (f"unknown key {key}" for key in sorted(cluster.keys() - KEYS["RayCluster"]))
    yield from _check_cluster(cluster, ray_version)


def _check_job(spec: Mapping[str, Any]) -> Iterator[str]:
    if not spec.get("entrypoint", "").strip():
        yield "no entrypoint"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r}"
    if mode == "SidecarMode":
        yield "SidecarMode: the submitter takes the job with it (kuberay issue 4285)"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit below 0"
    if spec.get("clusterSelector") and spec.get("backoffLimit"):
        yield "backoffLimit with clusterSelector"
    if spec.get("deletionStrategy") and spec.get("shutdownAfterJobFinishes"):
        yield "deletionStrategy with shutdownAfterJobFinishes"


def _check_cluster(spec: Mapping[str, Any], ray_version: str) -> Iterator[str]:
    if spec.get("rayVersion") != ray_version:
        yield f"rayVersion {spec.get('rayVersion')!r}, the package has {ray_version}"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "no token asked for"
    head = spec.get("headGroupSpec", {})
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "work may land on the head"
    groups = spec.get("workerGroupSpecs", [])
    names = [group.get("groupName") for group in groups]
    if len(set(names)) != len(names) or not all(names):
        yield f"group names {names}"
    for name, group in [("head", head), *zip(names, groups, strict=True)]:
        if not isinstance(group.get("rayStartParams"), Mapping):
            yield f"{name}: no rayStartParams"
        if name != "head":
            yield from _check_size(name, group)
        yield from _check_pod(name, group.get("template", {}).get("spec", {}))


def _check_size(name: str, group: Mapping[str, Any]) -> Iterator[str]:
    low, count, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
    numbers = all(isinstance(value, int) for value in (low, count, high))
    if not numbers or not 0 <= low <= count <= high or high == 0:  # type: ignore[operator]
        yield f"{name}: replicas {low} <= {count} <= {high}"


def _check_pod(name: str, pod: Mapping[str, Any]) -> Iterator[str]:
    containers = pod.get("containers", [])
    if not containers:
        yield f"{name}: no container"
        return
    container = containers[0]
    if pod.get("terminationGracePeriodSeconds", 30) < MIN_GRACE_SECONDS:
        yield f"{name}: no time to save before it is killed"
    if name != "head" and pod.get("automountServiceAccountToken") is not False:
        yield f"{name}: gets a service account token"
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    if not limits.get("cpu") or not limits.get("memory") or limits != requests:
        yield f"{name}: Ray counts limits, Kubernetes requests: they must be equal"
    gpus = limits.get("nvidia.com/gpu")
    tolerated = any(t.get("key") == "nvidia.com/gpu" for t in pod.get("tolerations", []))
    if gpus and not tolerated:
        yield f"{name}: GPU nodes are not tolerated"
    if gpus and "cuda" not in container.get("image", ""):
        yield f"{name}: a GPU under an image without CUDA"
    mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
    volumes = {v["name"]: v for v in pod.get("volumes", [])}
    shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    if shared.get("medium") != "Memory":
        yield f"{name}: no memory at /dev/shm"
    if container.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield f"{name}: may run as root"
    for variable in container.get("env", []):
        secret = re.search(r"SECRET|PASSWORD|TOKEN|KEY", variable.get("name", ""))
        if secret and "value" in variable:
            yield f"{name}: {variable['name']} is written down; refer to a secret"
