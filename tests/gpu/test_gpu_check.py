"""The phases of benchmarks/gpu_check.py, on a GPU; and the script itself, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.py"


def check(shared_dir: Path, out: Path, *arguments: str) -> list[dict[str, Any]]:
    """Lines of the phases, none of which failed."""
    command = [sys.executable, str(SCRIPT), "--shared", str(shared_dir), "--out", str(out)]
    subprocess.run([*command, *arguments], check=True)
    lines = (out / "gpu_check.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.gpu
@pytest.mark.timeout(540)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("phase", ["law", "syncs", "snapshot", "packing", "probe", "memory"])
def test_on_a_gpu(shared_dir: Path, tmp_path: Path, phase: str) -> None:
    (line,) = check(shared_dir, tmp_path, "--phases", phase)
    assert line["rows"]
    assert all(row.get("holds", True) for row in line["rows"])


@pytest.mark.slow
def test_the_script_on_a_cpu(shared_dir: Path, tmp_path: Path) -> None:
    phases = ["env", "plans", "snapshot", "packing", "probe"]
    lines = check(shared_dir, tmp_path, "--device", "cpu", "--tiny", "--phases", *phases)
    assert [line["phase"] for line in lines] == phases
    packing = lines[phases.index("packing")]["rows"]
    assert [row["slots"] for row in packing] == [1, 2, 4, 8, 16]
    assert all(row["tokens/s"] > 0 for row in packing)
