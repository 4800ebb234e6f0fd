"""`submit`, `status`, `logs` and `stop` on a cluster whose drivers and head are killed.

The project is a directory of its own, with its rows and its metric, which the cluster gets from
nowhere but the package.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from tests.e2e.test_bad_inputs import check_line
from tests.support.commands import ROOT, command, started
from tests.support.head import Head, start_head
from tests.support.ports import free_port
from tests.support.runs import losses

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = ROOT / "jobs" / "data" / "tiny_instructions" / "train.jsonl"
CONFIG = """\
name: base
storage: {storage}
data:
  train: {{path: rows/train.jsonl, prompt: instruction, completion: response}}
  validation: 0.2
train: {{batch_size: 4, lr: 1e-3, lr_schedule: constant, epochs: 1, eval_every_examples: 10000}}
checkpoint: {{every_examples: 40}}
promote: {{metrics: [loss, "own.py:score"]}}
tracking: {{to: []}}
"""
LONG = "train.epochs=1000"
KILLED_AFTER = 30


@dataclass
class Command:
    """One that runs, and the file with all that it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """So far."""
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something has happened; it must not end before."""

        def happened() -> object:
            assert self.process.poll() is None, self.output
            return condition()

        wait_for(happened)

    def ended(self, code: int) -> str:
        """Its output, once it has ended with `code`."""
        self.process.wait(timeout=600)
        assert self.process.returncode == code, self.output
        assert "Traceback" not in self.output
        return self.output


@dataclass
class Cluster:
    """A head that may be replaced, and the command line against it."""

    head: Head
    project: Path
    storage: Path

    def start(self, *arguments: str) -> Command:
        """A command in the project."""
        environment = os.environ | {"RAY_AUTH_TOKEN": str(self.head.token)}
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
            environment.pop(name, None)
        file, path = tempfile.mkstemp(dir=self.storage.parent)
        process = subprocess.Popen(
            command(*arguments, "--address", self.head.url),
            cwd=self.project,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        os.close(file)
        return Command(process, Path(path))

    def run(self, *arguments: str, code: int = 0) -> str:
        """The output of a command that has to end with `code`."""
        return self.start(*arguments).ended(code)

    def submit(self, name: str, *arguments: str) -> Command:
        return self.start("submit", "run.yaml", f"name={name}", *arguments)

    def driver(self, name: str) -> psutil.Process:
        """The process of the command that the job of a run runs."""
        (driver,) = started(
            lambda words: f"name={name}" in words and "python" in words[0], self.head.process.pid
        )
        return driver

    def jobs(self) -> JobSubmissionClient:
        """Ray's own client."""
        return JobSubmissionClient(self.head.url, headers=self.head.headers)

    def result(self, name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.storage / name / "result.json").read_text())
        return read

    def steps(self, name: str) -> int:
        """How many steps a run has done."""
        file = self.storage / name / "metrics.jsonl"
        return len(losses(file.parent)) if file.is_file() else 0


def wait_for(condition: Callable[[], object]) -> None:
    """Until something has happened on the cluster."""
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def last_line(output: str) -> str:
    return output.rstrip("\n").rpartition("\n")[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    project, storage = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("shared")
    (project / "rows").mkdir()
    lines = ROWS.read_text().splitlines(keepends=True)[:60]
    (project / "rows" / "train.jsonl").write_text("".join(lines))
    (project / "own.py").write_text("def score(prompt, reference, continuation):\n    return 1.0\n")
    (project / ".env").write_text("HF_TOKEN=not-yours")
    (project / "run.yaml").write_text(CONFIG.format(storage=storage))
    started = Cluster(start_head(free_port(), secrets.token_hex(32)), project, storage)
    try:
        yield started
    finally:
        started.head.kill()


def test_a_run_from_submission_to_its_end(cluster: Cluster) -> None:
    output = cluster.run("submit", "run.yaml", "name=whole")
    assert "submitted job whole: raytune-ft train run.yaml name=whole --resume auto" in output
    assert "eval_loss" in output
    assert cluster.result("whole")["status"] == "completed"
    assert "SUCCEEDED" in cluster.run("status", "whole")
    assert cluster.run("logs", "whole").count("base eval_loss") == 1
    jobs = cluster.jobs().list_jobs()
    assert "not-yours" not in str(jobs)

    again = cluster.run("submit", "run.yaml", "name=whole")
    assert "submitted job whole-2" in again
    assert "nothing is left to do" in again
    assert "whole, whole-2" in cluster.run("status", "whole")


def test_a_live_run_is_attached_to_detached_from_stopped_and_continued(cluster: Cluster) -> None:
    first = cluster.submit("live", LONG)
    first.wait_for(lambda: cluster.steps("live") > 5)
    first.process.send_signal(signal.SIGINT)
    assert "goes on" in last_line(first.ended(130))

    line = last_line(cluster.run("submit", "run.yaml", "name=live", code=2))
    check_line(f"{line}\n")
    assert all(word in line for word in ("live", "another config", "raytune-ft stop live"))

    second = cluster.submit("live", LONG)
    third = cluster.start("logs", "live", "--follow")
    second.wait_for(lambda: "attached to the live job live" in second.output)
    third.wait_for(lambda: "base eval_loss" in third.output)
    stopped = cluster.run("stop", "live")
    assert "STOPPED" in stopped
    assert "--resume" in stopped
    for each in (second, third):
        assert "it was stopped" in last_line(each.ended(130))
    assert cluster.result("live")["status"] == "interrupted"
    done = cluster.steps("live")
    newest = sorted((cluster.storage / "live" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{done:06d}"  # it had the time to save

    line = last_line(cluster.run("stop", "live", code=2))
    check_line(f"{line}\n")
    assert "does not run: it was stopped" in line

    # Other code is another package, which the cluster unpacks elsewhere.
    with (cluster.project / "own.py").open("a") as file:
        file.write("# changed\n")
    again = cluster.run("submit", "run.yaml", "name=live", LONG, "--no-follow")
    assert "raytune-ft logs live-2 --follow" in again
    wait_for(lambda: cluster.steps("live") > done)
    assert "STOPPED" in cluster.run("stop", "live")


@pytest.mark.parametrize(
    ("name", "override", "code", "words"),
    [
        ("diverges", "train.lr=1e30", 1, "Diverged"),
        ("refused", "train.max_examples=1", 0, ""),
    ],
)
def test_exit_codes_are_those_of_the_job(
    cluster: Cluster, name: str, override: str, code: int, words: str
) -> None:
    output = cluster.run("submit", "run.yaml", f"name={name}", override, code=code)
    assert words in last_line(output)


def test_what_only_the_job_finds_ends_with_2(cluster: Cluster) -> None:
    there = "data.test={path: /nowhere/test.jsonl, prompt: instruction, completion: response}"
    output = cluster.run("submit", "run.yaml", "name=absent", there, "--cluster-paths", code=2)
    line = last_line(output)
    check_line(f"{line}\n")
    assert "exit code 2" in line
    assert "data.test" in line


def test_a_killed_driver_is_tried_again(cluster: Cluster) -> None:
    process = cluster.submit("killed", LONG, "train.max_examples=1600", "--retry", "1")
    process.wait_for(lambda: cluster.steps("killed") > KILLED_AFTER)
    cluster.driver("killed").kill()
    output = process.ended(0)
    assert "its driver was killed" in output
    assert "retry 1 of 1" in output
    assert "submitted job killed-2" in output
    assert cluster.result("killed")["status"] == "completed"
    assert cluster.steps("killed") == 400
    statuses = {job.submission_id: job.status for job in cluster.jobs().list_jobs()}
    assert (statuses["killed"], statuses["killed-2"]) == ("FAILED", "SUCCEEDED")


def test_a_pending_job_is_explained(cluster: Cluster) -> None:
    client = cluster.jobs()
    client.submit_job(entrypoint="true", submission_id="waits", entrypoint_num_cpus=64)
    shown = " ".join(cluster.run("status", "waits").split())
    assert "waiting for resources" in shown
    assert "The cluster has 2 CPU, 0 GPU on 1 node" in shown
    assert "waits" in cluster.run("status")
    client.stop_job("waits")


def test_metrics_are_in_prometheus_under_the_name_of_the_run(cluster: Cluster) -> None:
    """Two workers, so that Ray trains."""
    process = cluster.submit("metrics", LONG, "parallel.workers=2", "checkpoint.every_examples=40")
    try:
        process.wait_for(lambda: "ray_raytune_ft_checkpoint_age_s" in scraped(cluster, "metrics"))
        found = scraped(cluster, "metrics")
        for name in (
            "step",
            "loss",
            "tokens_per_s",
            "step_time_s",
            "eval_loss",
            "checkpoint_age_s",
        ):
            assert found[f"ray_raytune_ft_{name}"] >= 0, name
        assert found["ray_raytune_ft_examples"] == 4 * found["ray_raytune_ft_step"]
    finally:
        cluster.run("stop", "metrics")
        process.ended(130)


def test_trials_are_in_prometheus_by_state(cluster: Cluster) -> None:
    search = ["search.trials=3", "search.space.train.lr.choice=[1e-3,2e-3,3e-3]"]
    search += ["search.sampler=grid", "search.scheduler=null", "search.execution=packed"]
    process = cluster.submit("searched", LONG, *search)
    try:
        # The engines and the driver are different processes, which Ray asks at different times.
        names = {"ray_raytune_ft_loss", "ray_raytune_ft_trials"}
        process.wait_for(lambda: names <= scraped(cluster, "searched").keys())
        assert "raytune-ft sweep run.yaml" in cluster.run("status", "searched")
    finally:
        cluster.run("stop", "searched")
        process.ended(130)


def scraped(cluster: Cluster, run: str) -> dict[str, float]:
    """The values of a run by name, from the targets that the head tells Prometheus."""
    groups = cluster.head.get("/api/prometheus/sd")
    targets = [target for group in groups for target in group["targets"]]
    values: dict[str, float] = {}
    for target in targets:
        with suppress(URLError), urlopen(f"http://{target}/metrics") as answer:  # it may start
            for line in answer.read().decode().splitlines():
                found = re.fullmatch(r"(ray_raytune_ft_\w+)\{(.*)\} (\S+)", line)
                if found and f'run="{run}"' in found[2]:
                    values[found[1]] = float(found[3])
    return values


def test_a_replaced_head_gets_the_job_again(cluster: Cluster) -> None:
    """Last of all: the head is another one afterwards."""
    process = cluster.submit("beheaded", LONG, "train.max_examples=1600", "--retry", "1")
    process.wait_for(lambda: cluster.steps("beheaded") > KILLED_AFTER)
    before = cluster.head
    assert before.kill() > 3
    done = cluster.steps("beheaded")
    assert KILLED_AFTER < done < 400
    time.sleep(5)
    assert process.process.poll() is None
    cluster.head = start_head(before.dashboard, before.token)
    output = process.ended(0)
    assert "does not answer" in output
    assert "its head is another one; retry 1 of 1" in output
    assert "submitted job beheaded-2" in output
    assert cluster.result("beheaded")["status"] == "completed"
    assert cluster.steps("beheaded") == 400
