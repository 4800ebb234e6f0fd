"""A job is submitted from a host that is no part of the cluster, with and without its token; the
head is killed under it and another one takes its address.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.multihost.hosts import DASHBOARD, Hosts, why_not
from tests.support.commands import ROOT
from tests.support.runs import losses

pytestmark = [pytest.mark.multihost, pytest.mark.timeout(900)]
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
CLIENT = 3
STEPS, KILLED_AFTER = 200, 30
CONFIG = """\
name: far
storage: {storage}
data:
  train: {{path: rows.jsonl, prompt: instruction, completion: response}}
  validation: 0.2
train:
  batch_size: 4
  lr: 1e-3
  lr_schedule: constant
  max_examples: {examples}
  eval_every_examples: 100000
parallel: {{workers: 2}}
checkpoint: {{every_examples: 40}}
tracking: {{to: []}}
"""


@dataclass
class Site:
    """The hosts, and a project and a storage that all of them see."""

    hosts: Hosts
    project: Path
    storage: Path

    def start(self, *arguments: str, **environment: str | None) -> subprocess.Popen[str]:
        """A command on the host outside; a variable that is None is not set there."""
        every = {**self.hosts.environment, "HOME": str(self.project), **environment}
        return subprocess.Popen(
            [
                *self.hosts.on(CLIENT, "raytune_ft"),
                *arguments,
                f"--address=http://{self.hosts.address(1)}:{DASHBOARD}",
            ],
            cwd=self.project,
            env={name: value for name, value in every.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, code: int, **environment: str | None) -> str:
        """Its output, once it has ended with `code`."""
        process = self.start(*arguments, **environment)
        output = process.communicate(timeout=400)[0]
        assert process.returncode == code, output
        return output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    project, storage = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("shared")
    lines = ROWS.read_text().splitlines(keepends=True)[:60]
    (project / "rows.jsonl").write_text("".join(lines))
    (project / "run.yaml").write_text(CONFIG.format(storage=storage, examples=4 * STEPS))
    with Hosts(Path(tmp_path_factory.mktemp("r")), 2, idle=1, dashboard=True) as started:
        yield Site(started, project, storage)


@pytest.mark.parametrize(
    ("token", "words"), [("0" * 64, "refuses the token"), (None, "asks for a token")]
)
def test_strangers_are_refused_in_one_line(site: Site, token: str | None, words: str) -> None:
    output = site.run("submit", "run.yaml", code=2, RAY_AUTH_TOKEN=token, RAY_AUTH_MODE=None)
    assert output.startswith(f"error: --address=http://{site.hosts.address(1)}:")
    assert output.count("\n") == 1
    assert words in output
    assert "RAY_AUTH_TOKEN" in output
    assert not (site.storage / "far").exists()


def test_the_head_is_killed_and_another_one_takes_its_place(site: Site) -> None:
    process = site.start("submit", "run.yaml", "--retry", "1", RAY_AUTH_MODE=None)
    run_dir, deadline = site.storage / "far", time.monotonic() + 400
    try:
        while not (run_dir / "metrics.jsonl").is_file() or len(losses(run_dir)) < KILLED_AFTER:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for host in (1, 2):  # the node of a lost head ends as well
            site.hosts.kill(host)
            assert site.hosts.processes(host) == []
        done = len(losses(run_dir))
        assert KILLED_AFTER <= done < STEPS
        time.sleep(5)
        assert process.poll() is None
        for host in (1, 2):
            site.hosts.start(host)
        output = process.communicate(timeout=300)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert "retry 1 of 1" in output
    assert "submitted job far-2" in output
    assert site.hosts.environment["RAY_AUTH_TOKEN"] not in output
    assert json.loads((run_dir / "result.json").read_text())["status"] == "completed"
    assert len(losses(run_dir)) == STEPS
    assert "SUCCEEDED" in site.run("status", "far", code=0)


def test_a_cluster_without_a_token_is_refused(site: Site) -> None:
    """Last of all: the head asks for none afterwards."""
    for host in (1, 2):
        site.hosts.kill(host)
    site.hosts.environment["RAY_AUTH_MODE"] = "disabled"
    site.hosts.start(1)
    output = site.run("submit", "run.yaml", "name=open", code=2)
    assert output.count("\n") == 1
    assert all(word in output for word in (site.hosts.address(1), "no token", "--insecure"))
    output = site.run("submit", "run.yaml", "name=open", "--insecure", "--no-follow", code=0)
    assert "raytune-ft logs open --follow" in output
    site.run("stop", "open", code=0)
