"""Logs, lost connections, retries and exit codes, against a cluster that is only pretended."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import time
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.errors import ClusterError, Interrupted, JobEnded, RunFailed, Unreachable
from raytune_ft.ray_backend.jobs import Job
from raytune_ft.submit import follow, submit
from raytune_ft.submit.follow import find, follow_log, raise_unless_done, was_cut_off, why_pending
from raytune_ft.submit.submit import Asked, Submission

LOG = "".join(f"line {number}\n" for number in range(9))
RUNNING = Job("run", "RUNNING", "raytune-ft train", run="run", digest="d", started_s=1.0)
DONE = replace(RUNNING, status="SUCCEEDED", exit_code=0)
KILLED = replace(RUNNING, status="FAILED", exit_code=-9)


@dataclass
class Cluster:
    """`ends` are the states in which the jobs end, one after another; a connection for the log
    breaks after each number of characters in `breaks`.
    """

    ends: list[Job | None] = field(default_factory=lambda: [DONE])
    breaks: list[int] = field(default_factory=list)
    silent: int = 0  # answers that do not come, after a broken connection
    known: dict[str, Job] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    address: str = "http://head:8265"

    def jobs(self) -> list[Job]:
        if self.silent:
            self.silent -= 1
            raise Unreachable("--address=http://head:8265", "does not answer (gone)", "start it")
        return list(self.known.values())

    def job(self, job_id: str) -> Job | None:
        return next((job for job in self.jobs() if job.id == job_id), None)

    def nodes(self) -> list[tuple[str, dict[str, float]]]:
        return [("10.0.0.1", {"CPU": 4.0}), ("10.0.0.2", {"CPU": 4.0, "GPU": 2.0})]

    def submit(self, job_id: str, command: str, package: Path, *more: Mapping[str, str]) -> None:
        self.known[job_id] = replace(RUNNING, id=job_id)
        self.submitted.append(job_id)

    def logs(self, job_id: str) -> str:
        return LOG

    def tail(self, job_id: str, silence_s: float) -> Iterator[str]:
        stop = self.breaks.pop(0) if self.breaks else None
        for at in range(0, len(LOG[:stop]), 10):
            yield LOG[:stop][at : at + 10]
        if stop is not None:
            raise Unreachable("--address=http://head:8265", "does not answer (reset)", "start it")
        ended = self.ends.pop(0)
        if ended is None:
            self.known.clear()
        else:
            self.known[job_id] = replace(ended, id=job_id)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes no time, and every look at the clock is a second later."""
    ticks = itertools.count()
    fake = SimpleNamespace(sleep=lambda s: None, monotonic=lambda: float(next(ticks)), time=time)
    monkeypatch.setattr(follow, "time", fake)


def watch(cluster: Any, job_id: str = "run") -> tuple[Job | None, str, list[str]]:
    shown: list[str] = []
    told: list[str] = []
    job = follow_log(cluster, job_id, shown.append, told.append, patience_s=20)
    return job, "".join(shown), told


@pytest.mark.parametrize("breaks", [[], [0], [33], [7, 7, 40], [15, 3, len(LOG)]])
def test_no_line_is_lost_or_shown_twice(breaks: list[int]) -> None:
    cluster = Cluster(breaks=breaks, known={"run": RUNNING})
    job, shown, told = watch(cluster)
    assert job == DONE
    assert shown == LOG
    assert told == []  # the cluster itself answered all the time


def test_a_cluster_that_comes_back_is_waited_for() -> None:
    cluster = Cluster(breaks=[25], known={"run": RUNNING})
    original = cluster.tail

    def tail(job_id: str, silence_s: float) -> Iterator[str]:
        if cluster.breaks:
            cluster.silent = 5
        yield from original(job_id, silence_s)

    cluster.tail = tail  # type: ignore[method-assign]
    _, shown, told = watch(cluster)
    assert shown == LOG
    assert len(told) == 2
    assert "waiting up to" in told[0]


def test_a_cluster_that_stays_away_ends_the_command_and_not_the_job() -> None:
    cluster = Cluster(silent=10**6, known={"run": RUNNING})
    with pytest.raises(RunFailed, match="same command follows it again"):
        watch(cluster)


def test_a_head_that_forgot_the_job() -> None:
    job, _, _ = watch(Cluster(ends=[None], known={"run": RUNNING}))
    assert job is None
    assert was_cut_off(job)


@pytest.mark.parametrize(
    ("status", "exit_code", "own", "died"),
    [
        ("SUCCEEDED", 0, 0, False),
        ("FAILED", 1, 1, False),
        ("FAILED", 2, 2, False),
        ("FAILED", 130, 130, True),
        ("STOPPED", None, 130, False),
        ("FAILED", -9, 1, True),
        ("FAILED", 137, 1, True),
        ("FAILED", None, 1, True),
        ("FAILED", 127, 1, False),
    ],
)
def test_exit_codes_are_those_of_the_driver(
    status: str, exit_code: int | None, own: int, died: bool
) -> None:
    job = replace(RUNNING, status=status, exit_code=exit_code, message="lost\nmore")
    assert was_cut_off(job) is died
    if own == 0:
        raise_unless_done(job, "run", "")
        return
    with pytest.raises(JobEnded) as caught:
        raise_unless_done(job, "run", "before\nerror: train.lr=0 is wrong\nafter\n")
    assert caught.value.exit_code == own
    assert "train.lr=0 is wrong" in str(caught.value)
    assert "\n" not in str(caught.value)


def begin(cluster: Any, retries: int = 0, digest: str = "d", follows: bool = True) -> list[str]:
    told: list[str] = []
    submission = Submission("run", "run", "raytune-ft train", Path("package.zip"), digest)
    asked = Asked("http://head:8265", follow=follows, retries=retries)
    submit._run(cluster, submission, asked, lambda text: None, told.append)
    return told


def test_a_driver_that_was_killed_is_tried_again_under_the_next_id() -> None:
    cluster = Cluster(ends=[KILLED, None, DONE])
    told = begin(cluster, retries=2)
    assert cluster.submitted == ["run", "run-2", "run-3"]  # also where a new head knows no id
    assert next(line for line in told if "retry" in line).endswith("retry 1 of 2")


@pytest.mark.parametrize("end", [replace(KILLED, exit_code=1), replace(KILLED, exit_code=2)])
def test_a_job_that_failed_is_not_tried_again(end: Job) -> None:
    cluster = Cluster(ends=[end, DONE])
    with pytest.raises(JobEnded):
        begin(cluster, retries=2)
    assert cluster.submitted == ["run"]


def test_retries_end() -> None:
    cluster = Cluster(ends=[KILLED, KILLED, DONE])
    with pytest.raises(JobEnded, match="was killed"):
        begin(cluster, retries=1)
    assert cluster.submitted == ["run", "run-2"]


def test_a_second_submit_attaches() -> None:
    cluster = Cluster(known={"run": RUNNING})
    assert "attached to the live job run" in begin(cluster)
    assert cluster.submitted == []


def test_a_live_job_with_another_config_is_in_the_way() -> None:
    cluster = Cluster(known={"run-4": replace(RUNNING, id="run-4")})
    with pytest.raises(ClusterError, match=r"live job run-4 .*raytune-ft stop run-4"):
        begin(cluster, digest="other")


def test_an_ended_run_is_continued_under_the_next_id() -> None:
    cluster = Cluster(known={"run": DONE, "run-2": replace(DONE, id="run-2", run="run-2")})
    told = begin(cluster, follows=False)
    assert cluster.submitted == ["run-3"]
    assert "raytune-ft logs run-3 --follow" in told[-1]


def test_a_stop_ends_where_a_new_head_does_not_know_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    cluster, said = Cluster(known={"run": RUNNING}), list[str]()
    monkeypatch.setattr(cluster, "stop", lambda job_id: cluster.known.clear(), raising=False)
    submit.stop(cluster, "run", said.append)  # type: ignore[arg-type]
    assert "does not know it any more" in said[-1]


def test_ctrl_c_detaches(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    cluster = Cluster()
    monkeypatch.setattr(submit, "follow_log", interrupted)
    with pytest.raises(Interrupted, match=r"goes on.*raytune-ft stop run --address") as caught:
        begin(cluster)
    assert caught.value.exit_code == 130
    assert not cluster.known["run"].ended


def test_a_run_is_found_by_its_name_and_a_job_by_its_id() -> None:
    newer = replace(RUNNING, id="run-2")
    cluster: Any = Cluster(known={"run": DONE, "run-2": newer, "x": replace(DONE, id="x", run="y")})
    assert find(cluster, "run") == newer
    assert find(cluster, "run-2") == newer
    assert find(cluster, "x").run == "y"
    with pytest.raises(ClusterError, match="raytune-ft status"):
        find(cluster, "z")


def test_why_a_job_is_pending() -> None:
    cluster: Any = Cluster()
    waiting = replace(RUNNING, status="PENDING", message="Job has not started yet.")
    text = why_pending(waiting, cluster)
    assert "Job has not started yet. Its driver asks for no CPU or GPU" in text
    assert "The cluster has 8 CPU, 2 GPU on 2 nodes" in text
    assert "asks for" not in why_pending(replace(waiting, run=None), cluster)
