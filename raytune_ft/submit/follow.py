"""A job from its start to its end: its log without gaps, why it waits, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from raytune_ft.errors import ClusterError, Interrupted, JobEnded, RunFailed, Unreachable
from raytune_ft.format import seconds
from raytune_ft.ray_backend.jobs import Job, JobCluster
from raytune_ft.records import Tell

PATIENCE_S = 900.0
"""How long a cluster that does not answer is waited for."""
LOOK_EVERY_S = 2.0
SILENCE_S = 30.0
"""A log without news for this long is asked for again: a dead connection is silent, too."""
PENDING_S = 10.0
"""After this long a job that has not begun is explained, and every minute from then on."""
EXPLAIN_EVERY_S = 60.0
OURS = (0, 1, 2, Interrupted.exit_code)
NOT_FOUND = (126, 127)
"""Exit codes of a shell that cannot run a command."""
Show = Callable[[str], None]
T = TypeVar("T")


def find(cluster: JobCluster, name: str) -> Job:
    """See `found_in`, among all jobs."""
    return found_in(cluster.jobs(), name, cluster.address)


def found_in(jobs: Sequence[Job], name: str, address: str) -> Job:
    """The newest job of the run `name`, else the job with that submission id.

    Raises:
        ClusterError: there is neither.
    """
    of_run = [job for job in jobs if job.run == name]
    named = [job for job in jobs if job.id == name]
    found = next(reversed(of_run or named), None)
    if found is None:
        raise ClusterError(
            name,
            f"is no run and no job of the cluster at {address}",
            "`raytune-ft status` lists them",
        )
    return found


def follow_log(
    cluster: JobCluster, job_id: str, show: Show, tell: Tell, patience_s: float = PATIENCE_S
) -> Job | None:
    """Show the log of a job until it has ended; `tell` gets what there is to say beside it.

    A lost connection is made again, and what was shown is not shown twice. Returns None where the
    cluster does not know the job any more, as a new head does not.

    Raises:
        RunFailed: the cluster did not answer for `patience_s`.
    """
    log = _Log(show)
    explain_at = time.monotonic() + PENDING_S
    while True:
        try:
            job = cluster.job(job_id)
            if job is None:
                return None
            pending = job.status == "PENDING"
            if pending and time.monotonic() >= explain_at:
                tell(why_pending(job, cluster))
                explain_at = time.monotonic() + EXPLAIN_EVERY_S
            log.begin()
            for text in cluster.tail(job_id, PENDING_S if pending else SILENCE_S):
                log.add(text)
            job = cluster.job(job_id)
            if job is None or not job.ended:
                time.sleep(LOOK_EVERY_S)
                continue
            with suppress(ClusterError):  # what Ray added after the driver's end
                log.catch_up(cluster.logs(job_id))
            return job
        except Unreachable:
            until_it_answers(cluster.jobs, tell, patience_s)
            with suppress(ClusterError):  # a proxy may pass no websockets
                log.catch_up(cluster.logs(job_id))
            time.sleep(LOOK_EVERY_S)


class _Log:
    """Shows a text once, although every connection begins to send it from its start."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._shown = self._at = 0

    def begin(self) -> None:
        """The next piece is the first of the whole text again."""
        self._at = 0

    def add(self, text: str) -> None:
        """The piece that follows the last one."""
        new = text[max(0, self._shown - self._at) :]
        self._at += len(text)
        self._shown = max(self._shown, self._at)
        if new:
            self._show(new)

    def catch_up(self, whole: str) -> None:
        """The whole text as it is now."""
        self.begin()
        self.add(whole)


def until_it_answers(ask: Callable[[], T], tell: Tell, patience_s: float = PATIENCE_S) -> T:
    """What `ask` returns, once the cluster answers it.

    Raises:
        RunFailed: it did not for `patience_s`.
    """
    deadline, told = time.monotonic() + patience_s, False
    while True:
        try:
            answer = ask()
        except Unreachable as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{error.value} {error.rule} for {seconds(patience_s)}; a job that it runs "
                    "goes on, and the same command follows it again"
                ) from error
            if not told:
                tell(f"{error.value} {error.rule}; waiting up to {seconds(patience_s)} for it")
                told = True
            time.sleep(LOOK_EVERY_S)
        else:
            if told:
                tell("it answers again")
            return answer


def why_pending(job: Job, cluster: JobCluster) -> str:
    """Why a job has not begun, as far as the cluster tells. A driver that `submit` starts asks for
    nothing; what other drivers ask for, Ray's API does not say.
    """
    nodes = [resources for _, resources in cluster.nodes()]
    has = ", ".join(f"{sum(n.get(name, 0.0) for n in nodes):g} {name}" for name in ("CPU", "GPU"))
    waits = f" for {seconds(time.time() - job.started_s)}" if job.started_s else ""
    asks = " Its driver asks for no CPU or GPU and runs on the head." if job.run else ""
    return (
        f"job {job.id} has been PENDING{waits}: {job.message}{asks} The cluster has {has} on "
        f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    )


def was_cut_off(job: Job | None) -> bool:
    """Whether a job ended neither by itself nor by a stop: its driver was killed or interrupted, or
    it went with its head.

    Such a job may be tried again. One that failed, refused its input or was stopped may not.
    """
    by_itself = (0, RunFailed.exit_code, ClusterError.exit_code, *NOT_FOUND)
    return job is None or (job.status == "FAILED" and job.exit_code not in by_itself)


def how_it_ended(job: Job | None) -> str:
    """For the person who waits for it."""
    if job is None:
        return "the cluster does not know it any more, since its head is another one"
    if job.exit_code in NOT_FOUND:
        return (
            f"it ended with exit code {job.exit_code}: the head of the cluster has no `raytune-ft` "
            "on its PATH; install it there"
        )
    if was_cut_off(job) and job.exit_code is None:
        return next(iter(job.message.strip().splitlines()), "its driver was lost")
    if was_cut_off(job):
        how = "interrupted" if job.exit_code == Interrupted.exit_code else "killed"
        return f"its driver was {how} (exit code {job.exit_code})"
    if job.status == "FAILED":
        return f"it ended with exit code {job.exit_code}"
    return {"STOPPED": "it was stopped", "SUCCEEDED": "it is done"}.get(job.status, job.status)


def raise_unless_done(job: Job | None, job_id: str, log: str) -> None:
    """JobEnded with the job's own exit code, unless that is 0. A job that was stopped counts as
    interrupted; one that died, as failed.
    """
    if job is not None and job.status == "SUCCEEDED":
        return
    code = job.exit_code if job is not None else None
    if job is not None and job.status == "STOPPED":
        code = Interrupted.exit_code
    own = last_error(log)
    text = f"job {job_id}: {how_it_ended(job)}{f': {own}' if own else ''}"
    raise JobEnded(text, code if code in OURS and code else 1)


def last_error(log: str) -> str:
    """The error that a command of ours ends with; empty without one."""
    found = [line for line in log.splitlines() if line.startswith("error: ")]
    return found[-1].removeprefix("error: ") if found else ""
