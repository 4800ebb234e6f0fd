"""The command `doctor`: run every check on this machine, on a cluster, or as a job of one."""

from __future__ import annotations

import secrets
import shlex
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from raytune_ft.config.environment import in_ray_job
from raytune_ft.config.load import load_config
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.doctor import probes
from raytune_ft.doctor.checks import CHECKS
from raytune_ft.doctor.findings import ALL, NO_ANSWER, Row
from raytune_ft.doctor.subject import Check, Subject
from raytune_ft.errors import DefectsFound, first_line
from raytune_ft.format import seconds
from raytune_ft.preflight import on_devices
from raytune_ft.records import Tell

HERE = "this machine"
Rows = list[tuple[str, Row]]


class Here:
    """This machine as the one node, without Ray."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {HERE: None}
        self.lost: dict[str, Exception] = {}
        self._kept: dict[str, Any] = {}

    def ask(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] | Mapping[str, Sequence[Any]],
        limit_s: float,
    ) -> dict[str, Any]:
        """See `NodeProcesses.ask`; the limit is that of the check."""
        own = arguments[HERE] if isinstance(arguments, Mapping) else arguments
        try:
            return {HERE: function(self._kept, *own)}
        except Exception as error:  # noqa: BLE001  # an answer, as from a node of a cluster
            return {HERE: error}

    def gcs_addresses(self) -> list[str]:
        """Of each Ray cluster that has a node on this machine."""
        return list(probes.rays({})["clusters"])

    def end(self) -> None:
        """Let go of what probes keep."""
        if "lock" in self._kept:
            self._kept.pop("lock").close()


def doctor(
    file: Path | None, overrides: Sequence[str], address: str | None, insecure: bool, tell: Tell
) -> Rows:
    """The rows of every check, by its name: of this machine, or of the cluster at `address`.

    Raises:
        ConfigError, StorageError: of the config.
        ClusterError: no cluster answers at the address.
    """
    written = load_config(file, overrides, tell) if file else None
    with ExitStack() as stack:
        if address is None:
            site: Any = Here()
        else:
            from raytune_ft.ray_backend.cluster import connected
            from raytune_ft.ray_backend.nodes import NodeProcesses

            stack.enter_context(connected(address))
            tell("starting a process on every node")
            site = NodeProcesses(probes)
        stack.callback(site.end)
        # As a run resolves it, which refuses a directory that the other nodes do not see.
        several = len(site.nodes) + len(site.lost) > 1
        disposable = several or in_ray_job()
        config = None
        if written is not None:
            written, devices = on_devices(written, joined=address is not None)
            tell(devices)
            config = resolve(written, disposable_cwd=disposable)
        subject = Subject(site, config, insecure, stack.enter_context(ExitStack()))
        return examine(subject, tell)


def examine(subject: Subject, tell: Tell) -> Rows:
    """Every check that applies; none stops another one."""
    rows: Rows = []
    for name, check in CHECKS.items():
        if not lacks(check, subject):
            tell(f"checking {name}")
            rows += [(name, row) for row in _limited(check, subject)]
    return rows


def lacks(check: Check, subject: Subject) -> bool:
    """Whether a check does not apply."""
    several = len(subject.site.nodes) > 1
    return (
        (check.needs.endswith("config") and subject.config is None)
        or (check.needs == "nodes" and not several)
        or (check.needs.startswith("cluster") and not subject.joined)
    )


def _limited(check: Check, subject: Subject) -> list[Row]:
    """Its rows, and one that says why there are no more after an error of any kind or the time
    limit.

    What hangs, such as a dead network file system, may never return: the thread is left behind.
    """
    rows: list[Row] = []
    reason: str | None = f"no answer within {seconds(check.limit_s)}"

    def run() -> None:
        nonlocal reason
        try:
            rows.extend(check.run(subject))
            reason = None
        except Exception as error:  # noqa: BLE001  # one check must not stop the others
            reason = first_line(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(check.limit_s)
    return [*rows, NO_ANSWER.on(ALL, reason=reason)] if reason else [*rows]


def verdict(rows: Rows, has_config: bool) -> Iterator[str]:
    """Lines below the table; the last one is the verdict.

    Raises:
        DefectsFound: there is a defect; it takes the place of the verdict.
    """
    left_out = [name for name in CHECKS if name not in {check for check, _ in rows}]
    if left_out:
        how = "" if has_config else "; CONFIG says which storage and variables matter"
        yield f"not checked here: {', '.join(left_out)}{how}"
    counts = Counter(row.status for _, row in rows)
    shown = [
        f"{counts[status]} {status}{'s' * (counts[status] != 1 and status != 'unknown')}"
        for status in ("defect", "warning", "unknown")
        if counts[status] or status != "unknown"
    ]
    text = ", ".join(shown)
    if counts["defect"]:
        names = dict.fromkeys(check for check, row in rows if row.status == "defect")
        raise DefectsFound(f"{text}: {', '.join(names)}; the table has the remedies")
    yield f"verdict: {text}"


def doctor_as_job(
    address: str,
    file: Path | None,
    overrides: Sequence[str],
    insecure: bool,
    show: Callable[[str], None],
    tell: Tell,
) -> None:
    """Run `raytune-ft doctor` as a job of the cluster whose dashboard is at `address`.

    Raises:
        ConfigError: of the config.
        ClusterError: the cluster does not answer, or refuses this machine.
        JobEnded: with the exit code of the job.
    """
    from raytune_ft.ray_backend.jobs import JobCluster
    from raytune_ft.submit.package import Package
    from raytune_ft.submit.submit import end, followed, job_environment

    files = _files(file, load_config(file, overrides, tell)) if file else {}
    words = ["raytune-ft", "doctor", *list(files)[:1], *overrides]
    words += ["--address", "auto", *["--insecure"] * insecure]
    cluster = JobCluster(address)
    job_id = f"doctor-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="raytune-ft-") as folder:
        note = Path(folder, "NOTE")
        note.write_text("raytune-ft doctor\n", encoding="utf-8")
        archive = Path(folder, "package.zip")
        Package("", {note.name: note, **files}).write(archive)
        cluster.submit(job_id, shlex.join(words), archive, job_environment(), {})
        job = followed(cluster, job_id, show, tell)
        end(cluster, job, job_id)


def _files(file: Path, config: Config) -> dict[str, Path]:
    """The config first, and the only file that is read together with it; see `packed`."""
    from raytune_ft.submit.package import Named, packed

    other = config.parallel.deepspeed
    named = Named("parallel.deepspeed", other) if other is not None else None
    return {file.name: file, **(packed(named, Path.cwd(), cluster_paths=True) if named else {})}
