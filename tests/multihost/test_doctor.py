"""Three hosts: `doctor` finds nothing while they are well, and then each defect that is planted.

The hosts share one disk and one clock, so what a host has for itself is planted where its processes
meet it: mounts that only they see, and modules that only they import.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.multihost.hosts import DASHBOARD, PORT, Hosts, why_not

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(900)]
SECRET = "hf_canary_of_the_hub"
CONFIG = """\
name: far
model: {path: somebody/model}
data:
  train: {path: rows.jsonl, prompt: instruction, completion: response}
parallel: {workers: 3}
"""
# A clock that is ahead, and a file system whose locks keep nobody out.
STRANGE = """\
import fcntl
import time
of_the_host = time.time
time.time = lambda: of_the_host() + 45
fcntl.flock = lambda *arguments: None
"""
Row = tuple[str, str, str, str, str]


@dataclass
class Site:
    """The hosts; a project of the first, and a storage that all of them see."""

    hosts: Hosts
    project: Path
    storage: Path

    def doctor(self, *arguments: str, code: int, host: int = 1) -> list[Row]:
        """The rows of the table, once the command has ended with `code`."""
        done = subprocess.run(
            [*self.hosts.on(host, "raytune_ft"), "doctor", *arguments],
            cwd=self.project,
            env=self.hosts.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        output = done.stdout + done.stderr
        print(output)
        assert done.returncode == code, output
        assert SECRET not in output
        assert self.hosts.environment["RAY_AUTH_TOKEN"] not in output
        assert not list(self.storage.iterdir())
        return rows_of(output)

    @property
    def address(self) -> str:
        return f"--address={self.hosts.address(1)}:{PORT}"


def rows_of(output: str) -> list[Row]:
    """Cells that are folded over several lines are one again."""
    rows: list[list[str]] = []
    for line in output.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    return [tuple(row) for row in rows]  # type: ignore[misc]


def defects(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row[1] == "defect":
            found.setdefault(row[0], []).append(row)
            assert row[4], row  # the remedy
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    project, storage = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("shared")
    (project / "run.yaml").write_text(CONFIG)
    hosts = Hosts(Path(tmp_path_factory.mktemp("r")), 3)
    hosts.environment["HF_TOKEN"] = SECRET
    with hosts:
        yield Site(hosts, project, storage)


def test_three_hosts_that_are_well(site: Site) -> None:
    rows = site.doctor("run.yaml", f"storage={site.storage}", site.address, code=0)
    assert defects(rows) == {}
    well = {row[0] for row in rows if row[1] in ("ok", "warning")}
    assert {"versions", "auth", "clocks", "storage", "locks", "ports", "all-reduce"} <= well
    assert {"disk", "shm", "ray", "environment", "nodes", "gpus"} <= well


def test_what_is_planted_is_found(site: Site, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Eight defects at once, on two of the hosts."""
    hosts, folder = site.hosts, site.project
    strange = folder / "strange"
    installed = strange / "transformers-4.0.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n"
    )
    (strange / "sitecustomize.py").write_text(STRANGE)
    cache = folder / "cache"
    cache.mkdir()
    for host in (2, 3):
        hosts.kill(host)
    paths = f"{strange}:{hosts.environment['PYTHONPATH']}"
    hosts.start(2, environment={"PYTHONPATH": paths})
    hosts.start(
        3,
        before=f"mount --bind {site.storage} {site.storage} && "
        f"mount -o remount,bind,ro {site.storage} && mount -t tmpfs -o size=1m none {cache} && "
        "unset HF_TOKEN",
        environment={"HF_HOME": str(cache)},
    )
    second = begin_a_second_ray(hosts, 3, tmp_path_factory.mktemp("s"))
    traffic_control(hosts, 3, "add", "tbf", "rate", "20mbit", "burst", "64kb", "latency", "400ms")
    try:
        rows = site.doctor("run.yaml", f"storage={site.storage}", site.address, code=1)
    finally:
        traffic_control(hosts, 3, "delete")
        second.terminate()
        second.wait()
    found = defects(rows)
    nodes = {check: {row[2].split()[0] for row in each} for check, each in found.items()}
    two, three = hosts.address(2), hosts.address(3)
    assert nodes == {
        "versions": {two},
        "clocks": {two},
        "locks": {two, three},
        "storage": {three},
        "disk": {three},
        "ray": {three},
        "environment": {"all"},
        "all-reduce": {three},
    }
    assert any("transformers is 4.0.0" in row[3] for row in found["versions"])
    assert re.search(r"the clock is 4[45]\S* s ahead", found["clocks"][0][3])
    assert any("two processes can hold one" in row[3] for row in found["locks"])
    assert "Read-only file system" in found["storage"][0][3]
    assert "models of the hub" in found["disk"][0][3]
    assert str(cache) in found["disk"][0][3].replace(" ", "")
    assert f"{hosts.address(3)}:7000" in found["ray"][0][3]
    assert f"HF_TOKEN on node {three}" in found["environment"][0][3]
    assert "is slow" in found["all-reduce"][0][3]


def traffic_control(hosts: Hosts, host: int, act: str, *rule: str) -> None:
    words = ["tc", "qdisc", act, "dev", "eth0", "root", *rule]
    subprocess.run([*hosts.enter(host), *words], check=True)


def begin_a_second_ray(hosts: Hosts, host: int, directory: Path) -> subprocess.Popen[bytes]:
    """Also a node with all CPUs, on the same host."""
    words = ["start", "--head", "--block", "--port=7000", "--include-dashboard=false"]
    process = subprocess.Popen(
        [
            *hosts.on(host, "ray.scripts.scripts"),
            *words,
            f"--node-ip-address={hosts.address(host)}",
            f"--num-cpus={os.cpu_count()}",
            "--object-store-memory=100000000",
            f"--temp-dir={directory}",
        ],
        env=hosts.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if b"Ray runtime started" in line:
            return process
    raise AssertionError("the second Ray does not start")


def test_a_blocked_path_between_two_hosts(site: Site) -> None:
    hosts = site.hosts
    block = ["ip", "-n", hosts.namespace(2), "route", "add", "blackhole", hosts.address(3)]
    subprocess.run(block, check=True)
    try:
        rows = site.doctor(site.address, code=1)
    finally:
        block[4] = "delete"
        subprocess.run(block, check=True)
    found = defects(rows)
    pairs = {(row[2].split()[0], row[3]) for row in found["ports"]}
    for node, peer in ((2, 3), (3, 2)):
        assert any(
            each == hosts.address(node) and f"cannot connect to {hosts.address(peer)} " in text
            for each, text in pairs
        ), pairs
    assert hosts.address(1) not in {node for node, _ in pairs}
    assert "all-reduce" in found


def test_a_cluster_without_a_token(site: Site) -> None:
    """Last of all; also as a job, which another host sends to the dashboard."""
    for host in (1, 2, 3):
        site.hosts.kill(host)
    site.hosts.environment["RAY_AUTH_MODE"] = "disabled"
    site.hosts.dashboard = True
    site.hosts.start(1)
    found = defects(site.doctor(site.address, code=1))
    assert list(found) == ["auth"]
    assert "--insecure" in found["auth"][0][4]
    rows = site.doctor(site.address, "--insecure", code=0)
    assert [row[1] for row in rows if row[0] == "auth"] == ["warning"]
    url = f"--address=http://{site.hosts.address(1)}:{DASHBOARD}"
    found = defects(site.doctor("run.yaml", f"storage={site.storage}", url, host=2, code=1))
    assert list(found) == ["auth"]
