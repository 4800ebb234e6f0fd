"""`ray job submit` on a cluster of its own: what works, and what is refused before it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.commands import ROOT, run_process
from tests.support.ports import free_port
from tests.support.runs import losses

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",  # read by the head
    "PATH": f"{BIN}:{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head node on loopback; its process group is ended, and no other Ray on this machine."""
    port = free_port()
    # The path of a socket has to be short.
    temporary = Path("/tmp") / f"rtft-{os.getpid()}"
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={free_port()}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
            *(f"--temp-dir={temporary}", "--disable-usage-stats"),
        ],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{url}/api/version", head)
        yield url
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def _wait_for(url: str, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, "ray start ended"
        try:
            with urlopen(url):
                return
        except (URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"{url} does not answer")


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
