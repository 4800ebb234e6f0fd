"""A sweep whose study is in PostgreSQL: killed with its driver, and continued."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support.commands import command, kill_when, run_process
from tests.support.ports import free_port
from tests.support.postgres import PASSWORD, server
from tests.support.runs import losses

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow]


def _arguments(tmp_path: Path, url: str, *more: str) -> list[str]:
    return command(
        "sweep",
        "jobs/quickstart.yaml",
        f"storage={tmp_path}",
        "name=shared",
        f"search.storage={url}",
        "search.trials=3",
        "search.max_concurrent=1",
        "search.scheduler=null",
        "train.epochs=null",
        "train.max_examples=480",
        "train.eval_every_examples=240",
        "checkpoint.every_examples=80",
        *more,
    )


def test_a_killed_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTEST_PASSWORD", PASSWORD)
    with server() as url:
        sweep = tmp_path / "shared"
        kill_when(_arguments(tmp_path, url), sweep / "trials" / "trial-001" / "metrics.jsonl", 12)
        kept = losses(sweep / "trials" / "trial-000")
        again = run_process([*_arguments(tmp_path, url), "--resume"], 280)
        assert again.returncode == 0, again.stderr
    result = json.loads((sweep / "result.json").read_text())
    assert [row["status"] for row in result["trials"]] == ["completed"] * 3
    assert losses(sweep / "trials" / "trial-000") == kept
    assert "3 trials are kept" not in again.stdout
    assert "trial-000 started" not in again.stdout
    assert PASSWORD not in (sweep / "config.yaml").read_text()
    assert not (sweep / "study.db").exists()


def test_a_database_that_is_not_there_is_one_line_before_anything_is_spent(tmp_path: Path) -> None:
    begun = time.monotonic()
    url = f"postgresql://me@127.0.0.1:{free_port()}/db"
    done = run_process(_arguments(tmp_path, url), 120)
    assert done.returncode == 2
    (devices,) = done.stdout.splitlines()
    assert devices.startswith(("workers compute on CPUs: ", "each worker computes on "))
    assert done.stderr.startswith("error: search.storage=postgresql://me@127.0.0.1:")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "shared" / "config.yaml").exists()
