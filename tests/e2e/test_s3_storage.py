"""`storage: s3://...`: a run that is copied as it goes on, and resumed on another machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.bucket import Bucket
from raytune_ft.cli import run_command
from tests.support.s3 import s3_server

ROOT = Path(__file__).parents[2]
URL = "s3://models/runs"
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place of the tests' own, with a store that it reaches."""
    with s3_server() as (host, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(tmp_path / "first"))
        rows = (ROOT / "jobs/data/tiny_instructions/train.jsonl").read_text().splitlines()[:60]
        (tmp_path / "short.jsonl").write_text("\n".join(rows) + "\n")
        yield tmp_path


def train(machine: Path, *more: str) -> int:
    source = (
        f"data.train={{path: {machine}/short.jsonl, prompt: instruction, completion: response}}"
    )
    arguments = [source, "data.test=null", "parallel={}", f"storage={URL}", "name=some"]
    settings = ["train.eval_every_examples=16", "checkpoint.every_examples=16", "train.epochs=null"]
    settings += ["train.lr_schedule=constant", "train.warmup_fraction=0"]
    config = str(ROOT / "jobs/quickstart.yaml")
    return run_command(["train", config, *arguments, *settings, *more])


def test_a_run_goes_on_elsewhere(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(machine, "train.max_examples=32") == 0
    keys = Bucket(URL).sizes()
    assert {"some/config.yaml", "some/result.json", "some/metrics.jsonl"} <= set(keys)
    assert "swordfish" not in "".join(capsys.readouterr())
    assert train(machine) == 2
    assert "run some exists in s3://models/runs" in capsys.readouterr().err
    monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(machine / "second"))
    assert train(machine, "train.max_examples=48", "--resume") == 0
    assert f"fetching {URL}/some" in capsys.readouterr().out
    steps = [
        json.loads(line)
        for line in (machine / "second/models/runs/some/metrics.jsonl").read_text().splitlines()
    ]
    assert [step["step"] for step in steps if "loss" in step] == sorted(
        {step["step"] for step in steps} - {0}
    )
    assert max(step["examples"] for step in steps) == 48
    assert run_command(["checkpoints", "list", f"{URL}/some"]) == 0
    assert "step-" in capsys.readouterr().out
    assert run_command(["checkpoints", "verify", f"{URL}/some"]) == 0


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_goes_on_elsewhere(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (ROOT / "jobs/data/tiny_instructions/train.jsonl").read_text().splitlines()[:200]
    (machine / "short.jsonl").write_text("\n".join(rows) + "\n")
    source = (
        f"data.train={{path: {machine}/short.jsonl, prompt: instruction, completion: response}}"
    )
    command = [sys.executable, "-m", "raytune_ft", "sweep", str(ROOT / "jobs/quickstart.yaml")]
    command += [source, "data.test=null", f"storage={URL}", "name=some", "search.trials=2"]
    command += ["search.scheduler=null", "train.max_examples=2000", "train.epochs=null"]
    command += ["train.eval_every_examples=64", "search.max_concurrent=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:  # until a checkpoint is there
            if any(key.endswith("manifest.json") for key in Bucket(URL).sizes()):
                break
            time.sleep(1)
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(machine / "second"))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fetching {URL}/some" in done.stdout
    keys = Bucket(URL).sizes()
    assert {"some/result.json", "some/promoted/model/model.safetensors"} <= set(keys)
    result = json.loads((machine / "second/models/runs/some/result.json").read_text())
    assert [trial["status"] for trial in result["trials"]] == ["completed"] * 2
