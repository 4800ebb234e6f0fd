"""cluster/slurm/raytune.sbatch on a real Slurm of two nodes."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raytune_ft.config.load import dump_yaml
from tests.multihost.hosts import why_not
from tests.slurm.cluster import Slurm, unpacked
from tests.support.runs import largest_difference, losses, make_config, run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
STEPS = 40


@pytest.fixture(scope="module")
def slurm(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Slurm]:
    packages = Path(request.config.cache.mkdir("slurm"))  # type: ignore[union-attr]
    reason = why_not() or unpacked(packages)
    if reason is not None:
        pytest.skip(reason)
    with Slurm(packages, tmp_path_factory.mktemp("s")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, without Ray."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(make_config(*inputs), folder)
    return folder


def written(inputs: tuple[Path, Path], folder: Path, name: str) -> str:
    """A config of two workers, each of which needs all of a node."""
    changes = {"name": name, "parallel.workers": 2, "parallel.strategy": "ddp", "storage": "runs"}
    file = folder / f"{name}.yaml"
    file.write_text(dump_yaml(make_config(*inputs, changes)))
    return str(file)


def wait_for(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps(run_dir: Path) -> int:
    return len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def wait_for_steps(slurm: Slurm, job: str, run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 1200
    while steps(run_dir) < count:
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING"), slurm.log(job)
        assert time.monotonic() < deadline, slurm.log(job)
        time.sleep(0.1)


def test_two_jobs_share_two_nodes(
    slurm: Slurm, inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    jobs = {name: slurm.submit("train", written(inputs, tmp_path, name)) for name in ("one", "two")}
    tokens = {job: slurm.storage / f".slurm-{job}" / "token" for job in jobs.values()}
    for job in jobs.values():
        slurm.wait(job, "RUNNING")
        wait_for(tokens[job].exists)
    assert {stat.S_IMODE(token.stat().st_mode) for token in tokens.values()} == {0o600}
    assert len({token.read_text() for token in tokens.values()}) == 2
    spans = []
    for name, job in jobs.items():
        ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), slurm.log(job)
        assert ended["NodeList"] == "n[1-2]"
        spans.append((ended["StartTime"], ended["EndTime"]))
        assert "training on 2 workers" in slurm.log(job)
        assert max(largest_difference(slurm.storage / "runs" / name, undisturbed)) < 1e-5
        assert not tokens[job].parent.exists()
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_a_job_that_is_told_to_end_saves_and_goes_on(
    slurm: Slurm, inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    """What Slurm sends 180 s before the end, sent by hand."""
    job = slurm.submit("train", written(inputs, tmp_path, "told"))
    run_dir = slurm.storage / "runs" / "told"
    wait_for_steps(slurm, job, run_dir, 10)
    slurm.command("scancel", "--batch", "--signal=TERM", job)
    slurm.wait(job, "PENDING", "REQUEUED")
    done = steps(run_dir)
    assert 10 <= done < STEPS
    assert json.loads((run_dir / "result.json").read_text())["status"] == "interrupted"
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert slurm.log(job).count("step 0  ") == 1  # the base is measured once, at the begin
    assert max(largest_difference(run_dir, undisturbed)) < 1e-5


def test_wrong_input_is_not_tried_again(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit("train", str(tmp_path / "missing.yaml"))
    ended = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: " in slurm.log(job)


def test_a_job_that_is_stopped_stays_away(
    slurm: Slurm, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    config = written(inputs, tmp_path, "unwanted")
    run_dir = slurm.storage / "runs" / "unwanted"
    job = slurm.submit("train", config)
    wait_for_steps(slurm, job, run_dir, 5)
    slurm.command("scancel", "--batch", "--signal=INT", job)
    ended = slurm.wait(job, "FAILED", "COMPLETED", "CANCELLED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "130:0", "0")
    assert json.loads((run_dir / "result.json").read_text())["status"] == "interrupted"
    done = steps(run_dir)
    assert 5 <= done < STEPS

    again = slurm.submit("train", config)
    wait_for_steps(slurm, again, run_dir, done + 1)
    slurm.command("scancel", again)
    wait_for(lambda: not slurm.command("squeue", "--noheader", f"--jobs={again}"))
    ended = slurm.job(again)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
