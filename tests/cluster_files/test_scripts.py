"""Every file of cluster/: shell by shellcheck, YAML by yamllint, and no name of a machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = ROOT / "cluster" / "slurm" / "raytune.sbatch"
YAML = sorted((ROOT / "cluster").rglob("*.yaml"))
RULES = """
extends: relaxed
rules: {line-length: {max: 140}, indentation: {indent-sequences: whatever}}
"""


@pytest.mark.skipif(
    not (BIN / "shellcheck").exists(), reason="no shellcheck; pip install .[cluster]"
)
@pytest.mark.parametrize("planted", ["", "rm -rf $secret/*\n"])
def test_shellcheck(planted: str) -> None:
    done = subprocess.run(
        [BIN / "shellcheck", "--shell=bash", "-"],
        input=SCRIPT.read_text() + planted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (planted == ""), done.stdout


@pytest.mark.parametrize("planted", ["", "key: 1\nkey: 2\n"])
def test_yamllint(planted: str, tmp_path: Path) -> None:
    pytest.importorskip("yamllint", reason="pip install .[cluster]")
    (tmp_path / "planted.yaml").write_text(planted)
    files = [*YAML, tmp_path / "planted.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", RULES, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (planted == ""), done.stdout


def test_ray_of_other_jobs_is_left_alone() -> None:
    lines = [line.partition("#")[0] for line in SCRIPT.read_text().splitlines()]
    assert not any(re.search(r"\bray stop\b", line) for line in lines)


def test_every_start_goes_on_where_the_last_one_stopped() -> None:
    files = [path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".yaml", ".sbatch")]
    starts = [
        line
        for path in files
        for line in path.read_text().splitlines()
        if re.search(r"raytune-ft (train|sweep|\"\$@\") ", line) and not line.startswith("#")
    ]
    assert len(starts) == 5
    assert all("--resume auto --wait-lock 3m" in line for line in starts)
