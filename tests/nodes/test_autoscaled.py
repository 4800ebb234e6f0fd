"""A cluster that begins with no worker, grows for what runs on it, and shrinks again."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.conftest import write_config
from tests.support.autoscaled import Autoscaled
from tests.support.commands import ROOT, command, run_process

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
NODES = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    with Autoscaled(most=NODES) as cluster:
        yield cluster


@pytest.fixture
def config(tmp_path: Path) -> Path:
    train = {"max_examples": 1600, "batch_size": 4, "eval_every_examples": 400}
    return write_config(tmp_path, "grown", train, 6, {"log_uniform": [1e-4, 1e-2]})


def counted(
    cluster: Autoscaled, arguments: list[str]
) -> tuple[subprocess.CompletedProcess[str], list[tuple[int, int]]]:
    """The ended process, and how many nodes were (in use, there) from its start until none was."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=os.environ | cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = [cluster.nodes()]
    while process.poll() is None:
        seen.append(cluster.nodes())
        time.sleep(0.5)
    text = process.communicate()[0]
    deadline = time.monotonic() + 90
    while seen[-1][1] > 0 and time.monotonic() < deadline:
        time.sleep(0.5)
        seen.append(cluster.nodes())
    return subprocess.CompletedProcess(arguments, process.returncode, text, ""), seen


@pytest.mark.parametrize("execution", ["isolated", "packed"])
def test_a_sweep_from_zero_nodes_and_back(
    cluster: Autoscaled, config: Path, tmp_path: Path, execution: str
) -> None:
    done, seen = counted(cluster, command("sweep", str(config), f"search.execution={execution}"))
    assert done.returncode == 0, done.stdout[-3000:]
    result = json.loads((tmp_path / "runs/grown/result.json").read_text())
    assert (result["status"], result["execution"]) == ("completed", execution)
    assert (tmp_path / "runs/grown/promoted/model").is_dir()
    assert seen[0] == (0, 0)
    assert max(there for _, there in seen) == NODES
    assert max(used for used, _ in seen) == NODES  # those that joined later worked too
    assert seen[-1] == (0, 0)
    assert "waiting up to 15 min for nodes" in done.stdout
    assert "nodes have joined" in done.stdout


def test_nodes_that_never_come(cluster: Autoscaled, config: Path, tmp_path: Path) -> None:
    """More workers than the autoscaler may start."""
    asked = ["parallel.workers=3", "parallel.wait_for_nodes=12s"]
    begun = time.monotonic()
    done = run_process(command("train", str(config), *asked), 300, **cluster.environment)
    assert done.returncode == 2
    assert time.monotonic() - begun > 12
    (line,) = [line for line in done.stderr.splitlines() if line]
    for words in ("parallel.workers=3", "needs 3 CPU", "the cluster has", "after 12 s of waiting"):
        assert words in line
    assert "parallel.wait_for_nodes" in line
    assert not (tmp_path / "runs/grown").exists()
