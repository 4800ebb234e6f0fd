"""A cluster whose nodes have GPUs: every command plans and reserves one for each worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import command, run_process
from tests.support.head import Head, start_head

pytestmark = [pytest.mark.e2e, pytest.mark.ray]
LINE = "each worker computes on a GPU: the nodes that suit have 2"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = start_head(gpus=2)
    yield head
    head.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "plan"])
def test_auto_is_one_gpu_a_worker(head: Head, tmp_path: Path, name: str) -> None:
    """The GPUs are of Ray alone, so that a worker has one reserved that torch does not see."""
    changes = [f"storage={tmp_path}"]
    done = run_process(command(name, "jobs/quickstart.yaml", *changes), 240, **head.environment)
    assert LINE in done.stdout, done.stdout + done.stderr
    if name == "plan":
        assert done.returncode == 0, done.stderr
        assert "GPU: 1" in done.stdout
        return
    assert done.returncode == 2, done.stderr
    assert re.search(r"GPU=1 and torch .* sees no GPU on node \S+; install", done.stderr)
