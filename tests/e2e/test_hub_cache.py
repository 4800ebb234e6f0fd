"""A hub id that lies in the local cache works as a directory does, without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "raytune_ft" / "model" / "tiny"
COMMIT = "0" * 40

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def _cached(home: Path) -> None:
    """The built-in model as `org/tiny`, with a config.json as many models have it: without a dtype,
    and with code for transformers of before the family was added to it.
    """
    folder = home / "hub" / "models--org--tiny"
    snapshot = folder / "snapshots" / COMMIT
    shutil.copytree(TINY, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    config = json.loads((snapshot / "config.json").read_text())
    config.pop("dtype", None)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_tiny.Tiny"}
    (snapshot / "config.json").write_text(json.dumps(config))


def test_a_packed_sweep_and_its_promotion(tmp_path: Path) -> None:
    _cached(tmp_path / "home")
    rows = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
    few = rows.read_text().splitlines(keepends=True)[:60]
    (tmp_path / "rows.jsonl").write_text("".join(few))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "raytune_ft", *arguments],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = [
        "jobs/quickstart.yaml",
        "name=a",
        "model.path=org/tiny",
        f"storage={tmp_path}/runs",
        f"data.train.path={tmp_path}/rows.jsonl",
        "data.test=null",
        "data.validation=0.2",
        "train.epochs=null",
        "train.max_examples=64",
        "train.eval_every_examples=32",
        "search.trials=2",
        "search.scheduler=null",
        "search.execution=packed",
    ]
    command("sweep", *overrides)
    sweep = tmp_path / "runs" / "a"
    assert json.loads((sweep / "result.json").read_text())["execution"].startswith("packed")
    written = json.loads((sweep / "promoted" / "model" / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "auto_map" not in written
    trial = next((sweep / "trials").iterdir())
    checkpoint = next((trial / "checkpoints").glob("step-*"))
    command("export", str(checkpoint), str(tmp_path / "out"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
