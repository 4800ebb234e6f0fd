"""`ray job submit` on a cluster of its own: what works, and what is refused before it starts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT, run_process
from tests.support.head import RAY, start_head
from tests.support.ports import free_port
from tests.support.runs import losses

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the dashboard of a head node."""
    head = start_head(free_port(), environment={"RAY_JOB_STOP_WAIT_TIME_S": "60"})
    try:
        yield head.url
    finally:
        head.kill()


def _submit(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    job = ["python", "jobs/sweep.py", "jobs/quickstart.yaml", *arguments]
    return run_process(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT), "--", *job],
        600,
        **ENVIRONMENT,
    )


def test_a_sweep_in_a_job(address: str, tmp_path: Path) -> None:
    done = _submit(address, f"storage={tmp_path}", "name=job", "search.trials=3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "job" / "result.json").read_text())
    assert result["status"] == "completed"
    assert len(result["trials"]) == 3
    measured = json.loads((tmp_path / "job" / "promoted" / "evaluation.json").read_text())
    assert measured["promoted"]["eval_loss"] < measured["base"]["eval_loss"]
    assert (tmp_path / "job" / "promoted" / "model" / "model.safetensors").is_file()


def test_a_storage_that_the_job_takes_along_is_refused(address: str) -> None:
    done = _submit(address, "name=job")
    assert done.returncode != 0
    assert "error: storage=runs" in done.stdout
    assert "RAYTUNE_FT_STORAGE" in done.stdout


def test_the_log_ends_with_the_error(address: str, tmp_path: Path) -> None:
    done = _submit(address, f"storage={tmp_path}", "train.batchsize=8")
    assert done.returncode != 0
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # Ray shows the end of a failed job's log once more in its summary.
    errors = {line for line in lines if line.startswith("error: ")}
    assert errors == {"error: train.batchsize is not a key; did you mean train.batch_size?"}
    assert "Traceback" not in done.stdout


def test_a_stopped_job_saves_its_last_step_and_goes_on(address: str, tmp_path: Path) -> None:
    job = ["python", "jobs/train.py", "jobs/quickstart.yaml", "name=stopped"]
    job += [f"storage={tmp_path}", "parallel.workers=2", "train.epochs=20"]
    job += ["checkpoint.every_examples=1000000"]
    # A copy of a working directory that has changed lies elsewhere, and a resume keeps its paths.
    rows = ROOT / "jobs" / "data" / "tiny_instructions"
    job += [f"data.{split}.path={rows / split}.jsonl" for split in ("train", "test")]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT)]
    begun = run_process(
        [*submit, "--submission-id", "to-stop", "--no-wait", "--", *job], 300, **ENVIRONMENT
    )
    assert begun.returncode == 0, begun.stderr
    run_dir = tmp_path / "stopped"
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 7:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run_process([RAY, "job", "stop", "--address", address, "to-stop"], 120, **ENVIRONMENT)
    assert json.loads((run_dir / "result.json").read_text())["status"] == "interrupted"
    done = len(losses(run_dir))
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{done:06d}"

    again = run_process([*submit, "--", *job, "--resume"], 600, **ENVIRONMENT)
    assert again.returncode == 0, again.stdout[-3000:]
    assert len(losses(run_dir)) > done
    assert json.loads((run_dir / "result.json").read_text())["status"] == "completed"
