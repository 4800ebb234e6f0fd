"""The commands `submit`, `status`, `logs` and `stop`."""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import raytune_ft
from raytune_ft.config import environment, paths
from raytune_ft.config.load import (
    apply_overrides,
    dump_yaml,
    expand_env,
    load_config,
    to_plain,
)
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.config.search_rules import check_examples
from raytune_ft.errors import ClusterError, ConfigError, Interrupted
from raytune_ft.format import NONE, cell, seconds
from raytune_ft.ray_backend.cluster import STOP_GRACE, stop_grace_s
from raytune_ft.ray_backend.jobs import DIGEST, RUN, Job, JobCluster
from raytune_ft.records import Tell
from raytune_ft.report.tables import Table
from raytune_ft.submit.follow import (
    LOOK_EVERY_S,
    Show,
    find,
    follow_log,
    found_in,
    how_it_ended,
    last_error,
    raise_unless_done,
    until_it_answers,
    was_cut_off,
    why_pending,
)
from raytune_ft.submit.package import package_of

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray reads it in the process that stops the job, which has the environment of the job."""
AFTER_GRACE_S = 30
"""For the workers of a run to end, once its last checkpoint is written."""
PASSED_ON = (environment.STORAGE_VARIABLE, STOP_GRACE)
"""Variables that the job gets from here. None holds a secret: everybody who may list the jobs of a
cluster may read them."""
COMMANDS = ("train", "sweep")
AGAIN = ("--resume", "auto", "--wait-lock", "3m")
"""The same command begins a run and continues it, also where the lock of a dead driver lasts for
the lease of a network file system."""


@dataclass(frozen=True)
class Asked:
    """The options of `submit`, as its help describes them."""

    address: str
    job_id: str | None = None
    command: str | None = None
    follow: bool = True
    retries: int = 0
    cluster_paths: bool = False
    insecure: bool = False


@dataclass(frozen=True)
class Submission:
    """What is submitted, once or again. `archive` lasts as long as the command."""

    run: str
    job_id: str
    command: str
    archive: Path
    digest: str

    def live(self, jobs: Sequence[Job]) -> Job | None:
        """The live job of this run among `jobs`, to attach to.

        Raises:
            ClusterError: it was submitted with something else.
        """
        found = [job for job in jobs if not job.ended and self.run in (job.run, job.id)]
        if found and found[-1].digest != self.digest:
            raise ClusterError(
                f"run {self.run}",
                f"is in use by the live job {found[-1].id} with another config or other files",
                f"stop that with `raytune-ft stop {found[-1].id}`, or write another name",
            )
        return found[-1] if found else None

    def begin(self, cluster: JobCluster, tried: Sequence[str], tell: Tell) -> str:
        """Attach to the live job of this run, or start one under the first id that is free; ids
        in `tried` count as taken. Returns the id. Raises ClusterError as `live` does.
        """
        jobs = cluster.jobs()
        if live := self.live(jobs):
            tell(f"attached to the live job {live.id}")
            return live.id
        taken = {*tried, *(job.id for job in jobs)}
        numbers = range(2, len(taken) + 3)
        free = [self.job_id, *(f"{self.job_id}-{number}" for number in numbers)]
        job_id = next(each for each in free if each not in taken)
        cluster.submit(
            job_id,
            self.command,
            self.archive,
            job_environment(),
            {
                "job_name": self.run,
                RUN: self.run,
                DIGEST: self.digest,
                environment.VERSION: raytune_ft.__version__,
            },
        )
        tell(f"submitted job {job_id}: {self.command}")
        return job_id


def submit(file: Path, overrides: Sequence[str], asked: Asked, show: Show, tell: Tell) -> None:
    """Check a config, run it as a job, and follow that to its end.

    Raises:
        InputError: the config, its files or the cluster are not as they must be; nothing started.
        JobEnded: the job ended with an exit code other than 0.
        Interrupted: Ctrl-C while following; the job goes on.
    """
    if asked.retries and not asked.follow:
        raise ConfigError(
            f"--retry={asked.retries}",
            "needs a command that follows the job",
            "leave out --no-follow",
        )
    config = load_config(file, overrides, tell)
    command = _command(asked.command, config, file)
    _check_storage(config)
    package = package_of(file, config, Path.cwd(), asked.cluster_paths)
    cluster = JobCluster(asked.address)
    cluster.check_versions()
    if not asked.insecure:
        cluster.check_closed()
    words = ["raytune-ft", command, package.config, *overrides, *AGAIN]
    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as folder:
        archive = Path(folder) / "package.zip"
        package_sha256 = package.write(archive)
        submission = Submission(
            config.name,
            asked.job_id or config.name,
            shlex.join(words),
            archive,
            hashlib.sha256(f"{command}\n{dump_yaml(config)}{package_sha256}".encode()).hexdigest(),
        )
        if submission.live(cluster.jobs()) is None:
            if asked.cluster_paths:
                tell("the job checks model and data: --cluster-paths says that they are there")
            else:
                check_inputs(config, command, tell)
        _run(cluster, submission, asked, show, tell)


def _run(cluster: JobCluster, submission: Submission, asked: Asked, show: Show, tell: Tell) -> None:
    """Start or attach, follow, and start again where the driver or the head has died."""
    tried: list[str] = []
    while True:
        job_id = until_it_answers(partial(submission.begin, cluster, tuple(tried), tell), tell)
        tried.append(job_id)
        if not asked.follow:
            tell(how_to_go_on(job_id, cluster))
            return
        job = followed(cluster, job_id, show, tell)
        if not was_cut_off(job) or len(tried) > asked.retries:
            end(cluster, job, job_id)
            return
        tell(f"job {job_id}: {how_it_ended(job)}; retry {len(tried)} of {asked.retries}")


def followed(cluster: JobCluster, job_id: str, show: Show, tell: Tell) -> Job | None:
    """See `follow_log`. Raises Interrupted after Ctrl-C, which leaves the job alone."""
    try:
        return follow_log(cluster, job_id, show, tell)
    except KeyboardInterrupt:
        raise Interrupted(
            f"detached from job {job_id}, which goes on; {how_to_go_on(job_id, cluster)}"
        ) from None


def end(cluster: JobCluster, job: Job | None, job_id: str) -> None:
    """JobEnded unless the job is done."""
    log = ""
    with suppress(ClusterError):  # a head that has died in the meantime
        log = cluster.logs(job_id) if job is not None else ""
    raise_unless_done(job, job_id, log)


def how_to_go_on(job_id: str, cluster: JobCluster) -> str:
    """The two commands for a job that is not followed."""
    where = f"--address {cluster.address}"
    return (
        f"`raytune-ft logs {job_id} --follow {where}` follows it, "
        f"`raytune-ft stop {job_id} {where}` stops it"
    )


def status(cluster: JobCluster, name: str) -> dict[str, str]:
    """What there is to know about a run or a job."""
    jobs = cluster.jobs()
    job = found_in(jobs, name, cluster.address)
    attempts = [each.id for each in jobs if job.run and each.run == job.run]
    facts = {"job": job.id, "status": job.status, "command": job.command}
    if len(attempts) > 1:
        facts["attempts"] = ", ".join(attempts)
    facts["time"] = _duration(job)
    if job.status == "PENDING":
        facts["why"] = why_pending(job, cluster)
    if job.ended:
        facts["ended"] = how_it_ended(job)
    return facts


def all_jobs(cluster: JobCluster) -> Table:
    """One row a job, the newest last."""
    return Table(
        ("job", "run", "status", "exit code", "time"),
        tuple(
            (job.id, job.run or NONE, job.status, cell(job.exit_code), _duration(job))
            for job in cluster.jobs()
        ),
        "jobs",
        words=3,
    )


def logs(cluster: JobCluster, name: str, follow: bool, show: Show, tell: Tell) -> None:
    """Show the log of a job; with `follow`, until it has ended, and as `submit` does."""
    job_id = find(cluster, name).id
    if follow:
        end(cluster, followed(cluster, job_id, show, tell), job_id)
    else:
        show(cluster.logs(job_id))


def stop(cluster: JobCluster, name: str, tell: Tell) -> None:
    """Ask a job to save and to end; return when it has ended.

    Raises:
        ClusterError: there is no such job, or it has ended already.
    """
    job = find(cluster, name)
    if job.ended:
        raise ClusterError(
            f"job {job.id}",
            f"does not run: {how_it_ended(job)}",
            "`raytune-ft status` lists what does",
        )
    began = time.monotonic()
    cluster.stop(job.id)
    tell(f"asked job {job.id} to save and to end")
    while not job.ended:
        time.sleep(LOOK_EVERY_S)
        found = cluster.job(job.id)
        if found is None:
            tell(f"job {job.id}: {how_it_ended(None)}")
            return
        job = found
    last = last_error(cluster.logs(job.id))
    took = seconds(time.monotonic() - began)
    tell(f"job {job.id}: {job.status} after {took}{f'; {last}' if last else ''}")


def job_environment() -> dict[str, str]:
    """The environment variables of a job."""
    wait = {STOP_WAIT: str(int(stop_grace_s()) + AFTER_GRACE_S)}
    return wait | {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def check_inputs(config: Config, command: str, tell: Tell) -> None:
    """Everything that `plan` checks of model and data, with files that are deleted again.

    Variables that only the cluster has count as set. Raises InputError.
    """
    from raytune_ft.data.order import pass_length
    from raytune_ft.preflight import prepare
    from raytune_ft.train.optim import total_examples

    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as folder:
        written = apply_overrides(config, {"storage": folder})
        names = environment.names_in(to_plain(written))
        values = {name: os.environ.get(name, name) for name in names}
        expanded = resolve(expand_env(written, values), disposable_cwd=False)
        data = prepare(expanded, tell)
        if command == "sweep" and expanded.search is not None:
            available = pass_length(expanded.data, data.train)
            check_examples(expanded.search, total_examples(expanded.train, available))


def _command(asked: str | None, config: Config, file: Path) -> str:
    command = asked or ("train" if config.search is None else "sweep")
    if command not in COMMANDS:
        raise ConfigError(f"--command={command}", "is not a command of a job", "write train, sweep")
    if command == "sweep" and config.search is None:
        raise ConfigError(str(file), "has no search section", "write one, or --command train")
    return command


def _check_storage(config: Config) -> None:
    """What a job would refuse, since its current directory is disposable. Raises StorageError."""
    if "${" not in config.storage:
        paths.storage(config.storage, Path.cwd(), disposable_cwd=True)
    written = config.search.storage if config.search else None
    known = written is None or "${" not in written
    if known and paths.study(written, Path.cwd()) != written:
        raise ConfigError(
            f"search.storage={written}",
            "is a file in the current directory, which a job loses",
            "write sqlite:/// with an absolute path of the cluster, or leave it out",
        )


def _duration(job: Job) -> str:
    if job.started_s is None:
        return NONE
    return seconds((job.ended_s or time.time()) - job.started_s)
