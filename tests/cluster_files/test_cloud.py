"""cluster/cloud: Ray's own reading of the files and, for AWS, everything that `ray up` does before
the first machine, against a mock of AWS. For GCP there is no mock: the file is held to the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLOUD = Path(__file__).parents[2] / "cluster" / "cloud"
FILES = sorted(CLOUD.glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(file.read_text())
    return loaded


def problems(config: dict[str, Any]) -> list[str]:
    """What Ray's schema refuses, and what it allows and we do not."""
    found = []
    try:
        validate_config(prepare_config(config))
    except Exception as error:  # noqa: BLE001  (jsonschema's, ValueError, KeyError...)
        found.append(f"{type(error).__name__}: {error}")
        return found
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    hosts = re.findall(r"--dashboard-host=(\S+)", " ".join(starts))
    if hosts != ["127.0.0.1"]:
        found.append(f"the dashboard listens on {hosts}")
    if "~/.ray/auth_token" not in config.get("file_mounts", {}):
        found.append("no token on the machines")
    if "--env RAY_AUTH_MODE=token" not in config["docker"]["run_options"]:
        found.append("the token is not asked for")
    types = config["available_node_types"]
    if types[config["head_node_type"]]["resources"].get("CPU") != 0:
        found.append("the head takes work")
    for name, each in types.items():
        if config["provider"]["type"] == "aws" and "SecurityGroupIds" not in each["node_config"]:
            found.append(f"{name}: Ray would make a group with port 22 open to everybody")
        if config["provider"]["type"] == "gcp" and "networkInterfaces" not in each["node_config"]:
            found.append(f"{name}: the default network lets in SSH from everywhere")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_reads_it(file: Path) -> None:
    assert problems(read(file)) == []


def _open_group(config: dict[str, Any]) -> object:
    node = config["available_node_types"]["gpu"]["node_config"]
    return node.pop("SecurityGroupIds", None) or node.pop("networkInterfaces")


DEFECTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key that Ray has not": (lambda c: c.update(idle_timeout_minute=1), "idle_timeout_minute"),
    "a value of another type": (
        lambda c: c.update(max_workers="4"),
        "'4' is not of type 'integer'",
    ),
    "a head that is not defined": (lambda c: c.update(head_node_type="big"), "head_node_type"),
    "a dashboard for everybody": (
        lambda c: c["head_start_ray_commands"].append("ray start --head --dashboard-host=0.0.0.0"),
        "dashboard",
    ),
    "no token": (lambda c: c.pop("file_mounts"), "no token"),
    "a head that trains": (
        lambda c: c["available_node_types"]["head"].update(resources={}),
        "head",
    ),
    "a network for everybody": (_open_group, "gpu: "),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str, file: Path) -> None:
    spoil, expected = DEFECTS[name]
    config = read(file)
    spoil(config)
    assert any(expected in line for line in problems(config)), problems(config)


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """EC2 and IAM of nobody; `ray up` writes its key for SSH into the home directory."""
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    with moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        yield boto3.resource("ec2", region_name="us-west-2")


def bootstrapped(ec2: Any, config: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The config as machines would be asked for, and the rules that anybody comes in by."""
    from ray.autoscaler._private.aws.config import bootstrap_aws

    made = bootstrap_aws(prepare_config(config))
    rules = [
        rule
        for group in ec2.security_groups.all()
        for rule in group.ip_permissions
        if any(each["CidrIp"] == "0.0.0.0/0" for each in rule["IpRanges"])
    ]
    return made, rules


@pytest.mark.slow
def test_ray_up_on_aws_opens_nothing(aws: Any) -> None:
    (vpc,) = aws.vpcs.all()
    group = aws.create_security_group(GroupName="ours", Description="ours", VpcId=vpc.id).id
    config = yaml.safe_load((CLOUD / "aws.yaml").read_text().replace("sg-GROUP", group))
    made, rules = bootstrapped(aws, config)
    types = made["available_node_types"]
    assert {name: each["node_config"]["SecurityGroupIds"] for name, each in types.items()} == {
        name: [group] for name in ("head", "gpu", "gpu-spot")
    }
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"] == {}  # found by instance type when the cluster starts
    assert all(each["node_config"]["KeyName"] for each in types.values())
    assert rules == []


@pytest.mark.slow
def test_the_group_that_ray_makes_is_found_to_be_open(aws: Any) -> None:
    config = read(CLOUD / "aws.yaml")
    for each in config["available_node_types"].values():
        del each["node_config"]["SecurityGroupIds"]
    _, rules = bootstrapped(aws, config)
    assert [rule["FromPort"] for rule in rules] == [22]
