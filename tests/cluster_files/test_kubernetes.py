"""cluster/k8s: every choice that its comments offer is expanded and judged, spoilt objects too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install .[cluster]")
if shutil.which("kubectl") is None:
    pytest.skip("no kubectl, which expands kustomizations", allow_module_level=True)

from raytune_ft.config.load import load_config  # noqa: E402
from tests.cluster_files.kubernetes import (  # noqa: E402
    K8S,
    Object,
    chosen,
    copy_of,
    expanded,
    problems,
)

OVERLAYS = ("cpu-smoke", "gke", "eks")
COMPONENTS = ([], ["storage/s3"], ["queue/kueue"], ["queue/volcano"], ["storage/s3", "queue/kueue"])


@pytest.fixture(scope="module")
def train() -> list[Object]:
    return expanded(K8S / "overlays" / "gke")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_as_it_stands(overlay: str) -> None:
    objects = expanded(K8S / "overlays" / overlay)
    assert problems(objects) == []
    kinds = sorted(each["kind"] for each in objects)
    assert kinds == [
        *("ConfigMap", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "RayJob"),
        "ServiceAccount",
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("start", ["train", "sweep", "cluster"])
def test_every_choice(tmp_path: Path, overlay: str, start: str) -> None:
    for components in COMPONENTS:
        objects = chosen(tmp_path, overlay, start, components)
        assert problems(objects) == []
        ray = [each for each in objects if each["apiVersion"] == "ray.io/v1"]
        assert [each["kind"] for each in ray] == ["RayCluster" if start == "cluster" else "RayJob"]
        assert all(each["metadata"]["namespace"] == "raytune-ft" for each in ray)
        labels = ray[0]["metadata"]["labels"]
        assert ("kueue.x-k8s.io/queue-name" in labels) == ("queue/kueue" in components)
        assert ("volcano.sh/queue-name" in labels) == ("queue/volcano" in components)


def test_kueue_has_room_for_the_job(tmp_path: Path) -> None:
    """A job larger than its quota waits for ever."""
    objects = chosen(tmp_path, "gke", "train", ["queue/kueue"])
    (queue,) = (each for each in objects if each["kind"] == "ClusterQueue")
    spec = copy_of(objects, "RayJob")["spec"]["rayClusterSpec"]
    groups = [(spec["headGroupSpec"], 1)] + [(g, g["replicas"]) for g in spec["workerGroupSpecs"]]
    needs: dict[str, float] = {}
    for group, count in groups:
        for name, amount in group["template"]["spec"]["containers"][0]["resources"][
            "requests"
        ].items():
            needs[name] = needs.get(name, 0) + count * float(str(amount).removesuffix("Gi"))
    quota = {
        each["name"]: float(each["nominalQuota"].removesuffix("Gi"))
        for each in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    }
    assert quota.keys() == needs.keys()
    assert all(quota[name] >= needs[name] for name in needs)


@pytest.mark.parametrize("file", sorted(K8S.rglob("run.yaml")), ids=lambda file: file.parent.name)
def test_the_configs_load(file: Path) -> None:
    load_config(file)


def _head(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def _worker(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def _container(group: Any) -> Any:
    return group["template"]["spec"]["containers"][0]


DEFECTS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a field that KubeRay has not": (
        "RayJob",
        lambda o: o["spec"].update(backOffLimit=3),
        "backOffLimit",
    ),
    "a field that a pod has not": (
        "RayJob",
        lambda o: _container(_head(o)).update(volumemounts=[]),
        "volumemounts",
    ),
    "a value of another type": (
        "RayJob",
        lambda o: o["spec"].update(backoffLimit="3"),
        "is not of type 'integer'",
    ),
    "a field that a claim has not": (
        "PersistentVolumeClaim",
        lambda o: o["spec"].update(accessMode="x"),
        "accessMode",
    ),
    "a policy with a port of a wrong type": (
        "NetworkPolicy",
        lambda o: o["spec"].update(policyTypes="Egress"),
        "policyTypes",
    ),
    "two ways to delete": (
        "RayJob",
        lambda o: o["spec"].update(
            deletionStrategy={
                "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]
            }
        ),
        "exclude each other",
    ),
    "a time to live of what stays": (
        "RayJob",
        lambda o: o["spec"].update(shutdownAfterJobFinishes=False),
        "ttlSecondsAfterFinished",
    ),
    "a submitter beside a sidecar": (
        "RayJob",
        lambda o: o["spec"].update(submissionMode="SidecarMode", submitterConfig={}),
        "SidecarMode",
    ),
    "a retry of what waits for people": (
        "RayJob",
        lambda o: o["spec"].update(submissionMode="InteractiveMode"),
        "InteractiveMode",
    ),
    "a retry that begins anew": (
        "RayJob",
        lambda o: o["spec"].update(entrypoint="raytune-ft train /config/run.yaml"),
        "--resume auto",
    ),
    "a name that is too long": (
        "RayJob",
        lambda o: o["metadata"].update(name="a" * 48),
        "47 characters",
    ),
    "a job without a cluster": ("RayJob", lambda o: o["spec"].pop("rayClusterSpec"), "no cluster"),
    "an open cluster": (
        "RayJob",
        lambda o: o["spec"]["rayClusterSpec"].pop("authOptions"),
        "not token",
    ),
    "another Ray than in the image": (
        "RayJob",
        lambda o: o["spec"]["rayClusterSpec"].update(rayVersion="2.9.0"),
        "rayVersion",
    ),
    "work on the head": (
        "RayJob",
        lambda o: _head(o)["rayStartParams"].pop("num-cpus"),
        "num-cpus",
    ),
    "a public dashboard": (
        "RayJob",
        lambda o: _head(o).update(serviceType="LoadBalancer"),
        "open to the outside",
    ),
    "a pod that restarts": (
        "RayJob",
        lambda o: _worker(o)["template"]["spec"].update(restartPolicy="Always"),
        "restartPolicy",
    ),
    "resources twice": (
        "RayJob",
        lambda o: _head(o).update(resources={"CPU": "0"}),
        "resources stand in",
    ),
    "labels in the wrong place": (
        "RayJob",
        lambda o: _worker(o)["rayStartParams"].update(labels="a=b"),
        "labels belong",
    ),
    "no shared memory": (
        "RayJob",
        lambda o: _container(_worker(o))["volumeMounts"].pop(),
        "/dev/shm",
    ),
    "requests below limits": (
        "RayJob",
        lambda o: _container(_worker(o))["resources"]["requests"].update(memory="1Gi"),
        "requests differ",
    ),
    "keys in the head alone": (
        "RayJob",
        lambda o: _container(_worker(o)).pop("envFrom"),
        "envFrom",
    ),
    "a key in the clear": (
        "RayJob",
        lambda o: _container(_head(o))["env"].append({"name": "HF_TOKEN", "value": "hf"}),
        "in the clear",
    ),
    "no time to save": (
        "RayJob",
        lambda o: _head(o)["template"]["spec"].pop("terminationGracePeriodSeconds"),
        "terminationGrace",
    ),
    "a container of root": (
        "RayJob",
        lambda o: _worker(o)["template"]["spec"].pop("securityContext"),
        "restricted",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str, train: list[Object]) -> None:
    kind, spoil, expected = DEFECTS[name]
    spoilt = copy_of(train, kind)
    assert problems([spoilt]) == []
    spoil(spoilt)
    assert any(expected in line for line in problems([spoilt])), problems([spoilt])


def test_a_field_that_a_queue_has_not_is_found(tmp_path: Path) -> None:
    objects = chosen(tmp_path, "gke", "train", ["queue/kueue"])
    queue = copy_of(objects, "ClusterQueue")
    queue["spec"]["cohortname"] = "all"
    assert any("cohortname" in line for line in problems([queue]))
