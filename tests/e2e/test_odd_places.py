"""Directories whose names mean something to a URL, and one too long for a socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import command, run_process

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("verb", "keys"),
    [
        ("train", ["parallel.workers=2"]),
        ("sweep", ["search.trials=2", "search.scheduler=null", "promote.max_overlap=1"]),
    ],
)
def test_an_odd_storage_and_a_long_tmpdir(tmp_path: Path, verb: str, keys: list[str]) -> None:
    storage = tmp_path / "a b?c=d#e%41{f}"
    temporary = tmp_path / ("x" * 90)
    temporary.mkdir()
    words = [verb, "jobs/quickstart.yaml", "name=odd", f"storage={storage}", *keys]
    words += ["train.max_examples=64", "train.eval_every_examples=32"]
    done = run_process(command(*words), 840, TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    assert json.loads((storage / "odd" / "result.json").read_text())["status"] == "completed"
    assert (storage / "odd" / "study.db").is_file() == (verb == "sweep")
    assert {path.name for path in tmp_path.iterdir()} == {storage.name, temporary.name}
