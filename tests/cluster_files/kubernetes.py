"""Judges the objects of cluster/k8s: by their schemas, with unknown fields refused, and by rules
that no schema states. Some of the rules are KubeRay's, whose operator checks them in code when an
object is there already; the others are ours.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "cluster" / "k8s"
CRDS = Path(__file__).parent / "crds.tar.xz"
"""Of KubeRay 1.7.0 and Kueue (Apache-2.0), as their authors publish them."""
KUBERNETES = "1.34"
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
Object = dict[str, Any]


def expanded(folder: Path) -> list[Object]:
    """What `kubectl apply -k FOLDER` would send."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def chosen(tmp_path: Path, overlay: str, start: str, components: list[str]) -> list[Object]:
    """An overlay after the edits that its comments name; `start` is train, sweep or cluster."""
    shutil.copytree(K8S, tmp_path / "k8s", dirs_exist_ok=True)
    folder = tmp_path / "k8s" / "overlays" / overlay
    edited = yaml.safe_load((folder / "kustomization.yaml").read_text())
    edited["resources"] = ["../../base"] + ([f"../../{start}"] if start != "cluster" else [])
    edited["components"] = [f"../../{name}" for name in components]
    if start == "cluster":
        del edited["replacements"]
        del edited["patches"][-1]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(edited))
    return expanded(folder)


@cache
def schemas() -> dict[tuple[str, str], Object]:
    """Of custom objects, by apiVersion and kind."""
    found = {}
    with tarfile.open(CRDS) as archive:
        for member in archive.getmembers():
            crd = yaml.load(archive.extractfile(member), yaml.CSafeLoader)["spec"]  # type: ignore[arg-type]
            for version in crd["versions"]:
                key = (f"{crd['group']}/{version['name']}", crd["names"]["kind"])
                found[key] = _strict(version["schema"]["openAPIV3Schema"])
    return found


def _strict(schema: Any) -> Any:
    """As JSON schema. The API server drops unknown fields: a dropped field is a lost setting."""
    if not isinstance(schema, dict):
        return [_strict(each) for each in schema] if isinstance(schema, list) else schema
    made = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        made["type"] = ["integer", "string"]
    closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def problems(objects: list[Object]) -> list[str]:
    """Everything that is wrong with them, one line each."""
    found = []
    for each in objects:
        name = f"{each['kind']} {each['metadata']['name']}"
        found += [f"{name}: {line}" for line in (*_by_schema(each), *_by_rule(each))]
    return found


def _by_schema(thing: Object) -> Iterator[str]:
    custom = schemas().get((thing["apiVersion"], thing["kind"]))
    if custom is not None:
        for error in jsonschema.Draft7Validator(custom).iter_errors(thing):
            yield f"{error.json_path}: {error.message}"
        return
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


def _by_rule(thing: Object) -> Iterator[str]:
    spec = thing.get("spec", {})
    if thing["kind"] == "RayJob":
        yield from _job(thing["metadata"]["name"], spec)
    cluster = spec.get("rayClusterSpec", {}) if thing["kind"] == "RayJob" else spec
    if thing["kind"] in ("RayJob", "RayCluster"):
        if "headGroupSpec" not in cluster:
            yield "it has no cluster"
        else:
            yield from _cluster(cluster)


def _job(name: str, spec: Object) -> Iterator[str]:
    ends = spec.get("shutdownAfterJobFinishes", False)
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield "its name is no DNS label of at most 47 characters"
    if spec.get("deletionStrategy", {}).get("deletionRules") and ends:
        yield "deletionRules and shutdownAfterJobFinishes exclude each other"
    if not ends and (spec.get("ttlSecondsAfterFinished") or spec.get("suspend")):
        yield "ttlSecondsAfterFinished and suspend need shutdownAfterJobFinishes"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "SidecarMode" and {
        "submitterConfig",
        "submitterPodTemplate",
        "clusterSelector",
    } & set(spec):
        yield "SidecarMode has no submitter of its own and no clusterSelector"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "InteractiveMode cannot retry: no backoffLimit"
    if spec.get("backoffLimit") and not {"--resume auto", "--wait-lock"} <= set(
        re.findall(r"--resume auto|--wait-lock", spec.get("entrypoint", ""))
    ):
        yield "backoffLimit runs the entrypoint again, which needs --resume auto and --wait-lock"


def _cluster(spec: Object) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"
    if str(spec.get("rayVersion")) != RAY:
        yield f"rayVersion is {spec.get('rayVersion')}, the packages have {RAY}"
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head takes work: num-cpus is not 0"
    if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield "the dashboard is open to the outside"
    for group in [head, *workers]:
        where = group.get("groupName", "head")
        yield from (f"{where}: {line}" for line in _group(group, spec))
    keys = [_ray(group)[1].get("envFrom") for group in [head, *workers]]
    if any(each != keys[0] for each in keys):
        yield "head and workers differ in envFrom"


def _ray(group: Object) -> tuple[Object, Object]:
    pod = group["template"]["spec"]
    return pod, pod["containers"][0]


def _group(group: Object, spec: Object) -> Iterator[str]:
    start = group.get("rayStartParams", {})
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        yield "resources stand in rayStartParams and in resources"
    if "labels" in start:
        yield "labels belong to the group, not to rayStartParams"
    pod, ray = _ray(group)
    scales = spec.get("enableInTreeAutoscaling")
    if scales and pod.get("restartPolicy", "Never") != "Never":
        yield "the autoscaler (v2) needs restartPolicy Never"
    if scales and group.get("suspend"):
        yield "a group cannot be suspended under the autoscaler"
    if not scales and group.get("maxReplicas", 0) and "replicas" not in group:
        yield "without the autoscaler nobody sets replicas"
    memory = [
        v["name"] for v in pod.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"
    ]
    if not any(
        m["mountPath"] == "/dev/shm" and m["name"] in memory for m in ray.get("volumeMounts", [])
    ):
        yield "/dev/shm is no memory"
    for container in pod["containers"]:
        resources = container.get("resources", {})
        if not resources.get("limits") or resources.get("limits") != resources.get("requests"):
            yield f"{container['name']}: requests differ from limits"
        context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        if not (
            context.get("runAsNonRoot")
            and context.get("allowPrivilegeEscalation") is False
            and context.get("capabilities", {}).get("drop") == ["ALL"]
            and context.get("seccompProfile", {}).get("type") == "RuntimeDefault"
        ):
            yield f"{container['name']}: not what the Pod Security Standard `restricted` asks for"
    for variable in ray.get("env", []):
        if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]) and variable.get("value"):
            yield f"{variable['name']} is written in the clear"
    waits = {v["name"]: int(v["value"]) for v in ray.get("env", []) if v["name"].startswith("RAY_")}
    if pod.get("terminationGracePeriodSeconds", 30) <= max(waits.values(), default=30):
        yield "terminationGracePeriodSeconds is no longer than what a stopped run may take"


def copy_of(objects: list[Object], kind: str) -> Object:
    """A copy of the first object of a kind, to be spoilt."""
    return copy.deepcopy(next(each for each in objects if each["kind"] == kind))
