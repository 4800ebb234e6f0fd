"""cluster/skypilot, read by SkyPilot itself. It has many dependencies of its own, so that
`make test-cluster-files` puts it into an environment beside ours.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "cluster" / "skypilot").glob("*.yaml"))
PYTHON = ROOT / ".venv-tools" / "bin" / "python"
READ = """
import sys, sky
task = sky.Task.from_yaml(sys.argv[1])
(resources,) = task.resources
retries = resources.job_recovery["max_restarts_on_errors"]
print(task.num_nodes, resources.use_spot, retries, task.run)
"""
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-tools; run `make test-cluster-files`"),
    pytest.mark.timeout(600),
]


def read(file: Path, home: Path) -> subprocess.CompletedProcess[str]:
    (home / "run.yaml").write_text("name: some\n")
    return subprocess.run(
        [PYTHON, "-c", READ, str(file)],
        cwd=home,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_skypilot_reads_it(file: Path, tmp_path: Path) -> None:
    done = read(file, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 True 3" in done.stdout
    assert f"raytune-ft {file.stem} /tmp/run.yaml --resume auto --wait-lock 3m" in done.stdout


def test_a_planted_defect_is_found(tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.yaml"
    spoilt.write_text(FILES[0].read_text().replace("use_spot", "use_sport"))
    done = read(spoilt, tmp_path)
    assert done.returncode != 0
    assert "use_sport" in done.stderr
