"""One command line, run three times over a SIGKILL: it begins, continues, and finds nothing to do.

So do the retries of KubeRay, Slurm and SkyPilot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.bucket import Bucket
from tests.support.commands import command, kill_once, run_process
from tests.support.runs import losses, metrics
from tests.support.s3 import s3_server

pytestmark = pytest.mark.e2e
DONE = "nothing is left to do"


def _arguments(kind: str, storage: str, examples: int, *more: str) -> list[str]:
    return command(
        kind,
        "jobs/quickstart.yaml",
        "--resume",
        "auto",
        f"storage={storage}",
        "train.epochs=null",
        f"train.max_examples={examples}",
        "train.eval_every_examples=256",
        "checkpoint.every_examples=64",
        *more,
    )


def _run(arguments: list[str], **environment: str) -> str:
    done = run_process(arguments, 580, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _midway(run_dir: Path) -> Callable[[], bool]:
    """Whether it has a checkpoint and has trained on."""
    file = run_dir / "metrics.jsonl"
    return lambda: any(run_dir.glob("checkpoints/step-*")) and file.read_text().count("\n") > 10


def _copied(bucket: Bucket) -> bool:
    """Whether a checkpoint is there and what refers to it, which comes last."""
    keys = bucket.sizes()
    manifests = any(key.endswith("manifest.json") for key in keys)
    return manifests and "quickstart/config.yaml" in keys


def _begun(run_dir: Path) -> list[dict[str, Any]]:
    """The lines that no resume repeats; each has its own `wall_s`."""
    kept = max(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))
    return [line for line in metrics(run_dir) if line["step"] <= kept]


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    run_dir = tmp_path / "quickstart"
    arguments = _arguments("train", str(tmp_path), 768)
    kill_once(arguments, _midway(run_dir))
    begun = _begun(run_dir)
    assert not (run_dir / "result.json").exists()
    assert 0 < len(losses(run_dir)) < 48

    _run(arguments)
    assert metrics(run_dir)[: len(begun)] == begun
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == list(range(1, 49))
    result = (run_dir / "result.json").read_text()
    assert json.loads(result)["status"] == "completed"

    assert DONE in _run(arguments)
    assert (run_dir / "result.json").read_text() == result
    assert len(losses(run_dir)) == 48


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_sweep(tmp_path: Path) -> None:
    sweep = tmp_path / "quickstart"
    more = ["search.trials=2", "search.max_concurrent=1", "search.scheduler=null"]
    fixed = ["search.space.train.batch_size=null", "search.execution=isolated"]
    arguments = _arguments("sweep", str(tmp_path), 768, *more, *fixed)
    second = sweep / "trials" / "trial-001"
    kill_once(arguments, _midway(second), 600)
    ended = (sweep / "trials" / "trial-000" / "result.json").read_bytes()
    begun = _begun(second)
    assert not (sweep / "result.json").exists()

    assert "1 trials are kept" in _run(arguments)
    assert (sweep / "trials" / "trial-000" / "result.json").read_bytes() == ended
    assert metrics(second)[: len(begun)] == begun
    result = (sweep / "result.json").read_bytes()
    assert [row["status"] for row in json.loads(result)["trials"]] == ["completed"] * 2
    evaluation = (sweep / "promoted" / "evaluation.json").read_bytes()

    assert "is kept" in _run(arguments)
    assert (sweep / "result.json").read_bytes() == result
    assert (sweep / "promoted" / "evaluation.json").read_bytes() == evaluation
    assert not (sweep / "promoted-1").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_train_on_three_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is all that they share."""

    def machine(name: str) -> Path:
        monkeypatch.setenv("RAYTUNE_FT_STORAGE", str(tmp_path / name))
        return tmp_path / name / "models" / "runs" / "quickstart"

    with s3_server() as (host, port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = Bucket("s3://models/runs")
        often = "checkpoint.every_examples=320"
        arguments = _arguments("train", bucket.url, 6400, often)

        machine("first")
        kill_once(arguments, lambda: _copied(bucket), 600)
        assert "quickstart/result.json" not in bucket.sizes()

        again = machine("second")
        assert f"fetching {bucket.url}/quickstart" in _run(arguments)
        assert len(losses(again)) == 400
        assert "quickstart/result.json" in bucket.sizes()

        machine("third")
        assert DONE in _run(arguments)
        assert bucket.get("quickstart/result.json") == (again / "result.json").read_bytes()
