"""The Kubernetes manifests: rendered, against schemas, KubeRay's rules and Ray's own reader."""

import copy
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import validate_config

from jobs.cli import main, parse_stage
from jobs.needs import needs_of
from pipelines.preflight import capacity
from tests.infra import api_server
from tests.infra.kuberay_rules import findings

INFRA = Path(__file__).parents[2] / "infra"
OVERLAYS = sorted(path.name for path in (INFRA / "kuberay/overlays").iterdir())
KUBECTL = Path(sys.executable).with_name("kubectl")
# helm-chart/kuberay-operator/crds of KubeRay 1.7: megabytes that are not kept here.
CRDS = os.environ.get("KUBERAY_CRDS", "")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RAY_KINDS = ("RayJob", "RayCluster")


def rendered(overlay):
    asked = subprocess.run(
        [KUBECTL, "kustomize", INFRA / "kuberay/overlays" / overlay],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return list(yaml.safe_load_all(asked.stdout))


def ray_manifest(overlay):
    return next(m for m in rendered(overlay) if m["kind"] in RAY_KINDS)


def cluster_of(manifest):
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def check(manifest):
    return findings(manifest, ray_version=version("ray"))


def wrong_with(manifest):
    """The first thing that Kubernetes' schemas or KubeRay's rules object to; "": nothing."""
    checked = [manifest]
    if manifest["kind"] in RAY_KINDS:
        if found := check(manifest):
            return found[0]
        spec = cluster_of(manifest)
        checked = [
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"},
             "template": group["template"]}
            for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        ]  # fmt: skip
    try:
        for each in checked:
            kubernetes_validate.validate(each, "1.32", strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error.message)
    return ""


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_sound(overlay):
    for manifest in rendered(overlay):
        assert manifest["metadata"].get("namespace", "beit") == "beit"
        assert wrong_with(manifest) == ""


def kubectl(address, *command, stdin=None):
    return subprocess.run(
        [KUBECTL, "--server", address, *command],
        input=stdin, capture_output=True, text=True, check=False,
    )  # fmt: skip


def strict(schema):
    """A CRD's schema that refuses what a server would drop without a word: unknown keys."""
    closed = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    if "properties" in schema:
        closed["properties"] = {name: strict(s) for name, s in schema["properties"].items()}
        closed["additionalProperties"] = False
    if "items" in schema:
        closed["items"] = strict(schema["items"])
    return closed


@pytest.mark.skipif(not CRDS, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_fit_kuberays_own_schemas(overlay):
    manifest = ray_manifest(overlay)
    crd = yaml.load(Path(CRDS, f"ray.io_{manifest['kind'].lower()}s.yaml").read_text(), LOADER)
    served = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = strict(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)
    manifest["spec"]["entryPoint"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.validate(manifest, schema)


@pytest.mark.long
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_creates_every_overlay(overlay):
    """The real kubectl, on an emulated server that admits what Kubernetes and KubeRay would."""
    with api_server.started(wrong_with) as (address, objects):
        create = ["create", "--validate=false"]
        done = kubectl(address, *create, "-k", str(INFRA / "kuberay/overlays" / overlay))
        assert done.returncode == 0, done.stderr
        assert sorted(each["kind"] for each in objects.values()) == sorted(
            each["kind"] for each in rendered(overlay)
        )
        manifest = ray_manifest(overlay)
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        got = kubectl(address, "get", f"{kind}.ray.io", name, "-n", "beit", "-o", "json")
        assert json.loads(got.stdout)["spec"] == manifest["spec"]

        # Again, a version, a name or a namespace that is none: refused, each for its reason.
        for fault, said in (
            ({}, "already exists"),
            ({"apiVersion": "ray.io/v2"}, "no matches for kind"),
            ({"metadata": {**manifest["metadata"], "name": "B" * 60}}, "is invalid: name"),
            ({"metadata": {**manifest["metadata"], "namespace": "other"}}, "not found"),
        ):
            planted = yaml.safe_dump({**manifest, **fault})
            refused = kubectl(address, *create, "-f", "-", stdin=planted)
            assert refused.returncode != 0
            assert said in refused.stderr


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_autoscaler_reads_what_is_meant(overlay):
    manifest = ray_manifest(overlay)
    spec = cluster_of(manifest)
    as_cluster = {"kind": "RayCluster", "metadata": manifest["metadata"], "spec": spec}
    as_cluster["metadata"]["namespace"] = "beit"
    config = _derive_autoscaling_config_from_ray_cr(as_cluster)
    validate_config(config)
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        seen = config["available_node_types"][group["groupName"]]["resources"]
        assert seen["CPU"] == int(limits["cpu"])
        assert seen.get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))


def configured(overlay, folder):
    """The stage and configuration of a RayJob, read as its driver does in the head's pod."""
    manifests = rendered(overlay)
    manifest = next(each for each in manifests if each["kind"] == "RayJob")
    program, stage, *flags = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "beit"
    # Files are those that are mounted.
    maps = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "ConfigMap"}
    pod = cluster_of(manifest)["headGroupSpec"]["template"]["spec"]
    volumes = {each["name"]: each.get("configMap", {}).get("name") for each in pod["volumes"]}
    for mount in pod["containers"][0]["volumeMounts"]:
        for name, text in maps.get(volumes[mount["name"]], {}).get("data", {}).items():
            (folder / name).write_text(text)
            place = f"{mount['mountPath']}/{name}"
            flags = [str(folder / name) if flag == place else flag for flag in flags]
    return manifest, stage, flags


@pytest.mark.parametrize("overlay", ["tokenize", "pretrain", "pipeline"])
def test_the_entrypoint_parses_and_fits_its_own_groups(overlay, tmp_path, capsys):
    manifest, stage, flags = configured(overlay, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([stage, *flags, "--print_config"])
    assert ended.value.code == 0
    assert "s3://beit" in capsys.readouterr().out
    config = parse_stage(stage, flags)
    needs = needs_of(stage, config)
    nodes = []
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        node = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0))}
        nodes += [node] * group["maxReplicas"]
    assert [capacity.shortages(bundles, nodes) for bundles in needs.bundles if bundles] == [
        [] for bundles in needs.bundles if bundles
    ]
    encoders = getattr(getattr(config, "tokenize", config), "encoders", None)
    if encoders:  # no worker is there when the driver starts: it takes what is asked for
        gpus = sum(node["GPU"] for node in nodes)
        assert (encoders.num_gpus, encoders.max_actors) == (1, gpus)
    # The server of the pods' variables.
    assert not any(place.field.startswith("tracking") for place in needs.places)


def _faults():
    def head(m):
        return cluster_of(m)["headGroupSpec"]

    def worker(m):
        return cluster_of(m)["workerGroupSpecs"][0]

    def container(m):
        return worker(m)["template"]["spec"]["containers"][0]

    return {
        "a name too long": lambda m: m["metadata"].update(name="b" * 48),
        "a name with a capital": lambda m: m["metadata"].update(name="Beit"),
        "an old version": lambda m: cluster_of(m).update(rayVersion="2.9.0"),
        "a misspelt key": lambda m: m["spec"].update(entryPoint="x"),
        "a misspelt cluster key": lambda m: cluster_of(m).update(workers=[]),
        "no entrypoint": lambda m: m["spec"].update(entrypoint=" "),
        "an unknown mode": lambda m: m["spec"].update(submissionMode="Sidecar"),
        "the sidecar": lambda m: m["spec"].update(submissionMode="SidecarMode"),
        "ttl without shutdown": lambda m: m["spec"].update(shutdownAfterJobFinishes=False),
        "a negative retry": lambda m: m["spec"].update(backoffLimit=-1),
        "fewer than the least": lambda m: worker(m).update(minReplicas=3),
        "a negative most": lambda m: worker(m).update(maxReplicas=-1),
        "no start parameters": lambda m: worker(m).pop("rayStartParams"),
        "work on the head": lambda m: head(m)["rayStartParams"].clear(),
        "no token": lambda m: cluster_of(m).pop("authOptions"),
        "no grace": lambda m: worker(m)["template"]["spec"].update(
            terminationGracePeriodSeconds=30
        ),
        "unequal limits": lambda m: container(m)["resources"]["requests"].update(cpu="1"),
        "no shared memory": lambda m: container(m).update(volumeMounts=[]),
        "GPU nodes not tolerated": lambda m: worker(m)["template"]["spec"].update(tolerations=[]),
        "a GPU under a CPU image": lambda m: container(m).update(image="beit-ray:cpu"),
        "root": lambda m: container(m).pop("securityContext"),
        "a secret written down": lambda m: container(m).update(
            env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]
        ),
        "a service account token": lambda m: worker(m)["template"]["spec"].pop(
            "automountServiceAccountToken"
        ),
        "two groups of one name": lambda m: cluster_of(m)["workerGroupSpecs"].append(worker(m)),
    }


@pytest.mark.parametrize("fault", _faults())
def test_a_planted_fault_is_found(fault):
    manifest = copy.deepcopy(ray_manifest("pretrain"))
    assert check(manifest) == []
    _faults()[fault](manifest)
    assert len(check(manifest)) == 1
