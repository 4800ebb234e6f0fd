"""The jobs of a cluster, over the HTTP API of its head.

Ray's own client does the work. This adds time-outs, the token that the cluster asks for, errors of
one line, and logs without an event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from raytune_ft.errors import ClusterError, Unreachable, first_line

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
HEADERS_VARIABLE = "RAY_JOB_HEADERS"
TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two bytes of an answer."""
TOKEN = "token"  # nosec B105 # the name of a mode
RUN, DIGEST = "raytune_ft_run", "raytune_ft_digest"
"""Keys of a job's metadata: the name of its run, and a hash of what was submitted."""
_DASHBOARD = "write http://HEAD:8265, the address that `ray start --head` prints"
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
for _module in ("dashboard_sdk", "job.sdk"):  # they print every upload and every end of a log
    logging.getLogger(f"ray.dashboard.modules.{_module}").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Job:
    """One job as the cluster describes it; times are in seconds of the Unix clock.

    Attributes:
        exit_code: of the driver, once it has ended by itself.
    """

    id: str
    status: str
    command: str
    run: str | None = None
    digest: str | None = None
    message: str = ""
    exit_code: int | None = None
    started_s: float | None = None
    ended_s: float | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Job:
        """From the JSON of Ray's API."""
        metadata = plain.get("metadata") or {}
        return cls(
            id=plain["submission_id"],
            status=plain["status"],
            command=plain["entrypoint"],
            run=metadata.get(RUN),
            digest=metadata.get(DIGEST),
            message=plain.get("message") or "",
            exit_code=plain.get("driver_exit_code"),
            started_s=_seconds(plain.get("start_time")),
            ended_s=_seconds(plain.get("end_time")),
        )

    @property
    def ended(self) -> bool:
        """Whether its status is the last one."""
        return self.status in ENDED


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


class JobCluster:
    """The head at `address`, an http(s):// URL.

    Raises:
        Unreachable: nothing answers there.
        ClusterError: it is no head of Ray, or asks for another token.
    """

    def __init__(self, address: str) -> None:
        self.address = _url(address)
        self.has_token = self._asks_for_token()
        with _environment_without(*ADDRESS_VARIABLES):  # they would override the address
            self._client = _Client(self.address, self._own_headers())

    def check_versions(self) -> None:
        """ClusterError where Ray or Python is not the one that the config is checked with here."""
        theirs = self._client.get("/api/v0/cluster_metadata")["data"]
        for name, there, here in (
            ("Ray", theirs["rayVersion"], ray.__version__),
            ("Python", theirs["pythonVersion"], platform.python_version()),
        ):
            if there.split(".")[:2] != here.split(".")[:2]:
                raise ClusterError(
                    f"{name} {there} of the cluster",
                    f"differs from {name} {here} here, where the config and your code are checked",
                    f"run this command in an environment with {name} {there}",
                )

    def check_closed(self) -> None:
        """ClusterError for a cluster that other machines reach and that asks for no token.

        Ray replaces a loopback address of a node by the machine's, and listens there.
        """
        if self.has_token:
            return
        nodes = [ip for ip, _ in self.nodes()]
        if not nodes:
            raise _unreachable(self.address, "its first node is still starting")
        places = [urlsplit(self.address).hostname or "", *nodes]
        open_at = open_place(places)
        if open_at is not None:
            raise ClusterError(
                f"--address={self.address}",
                f"is a cluster that listens at {open_at} and asks for no token, so that whoever "
                "reaches it can run code on it",
                "start it with a token (docs/cluster.md), or add --insecure",
            )

    def nodes(self) -> list[tuple[str, dict[str, float]]]:
        """Address and resources of each node that is alive."""
        answer = self._client.get("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [
            (node["node_ip"], node["resources_total"])
            for node in answer
            if node["state"] == "ALIVE"
        ]

    def jobs(self) -> list[Job]:
        """All submitted jobs, the newest last. Drivers that only joined the cluster are none."""
        jobs = [Job.of(each) for each in self._client.get("/api/jobs/") if each["submission_id"]]
        return sorted(jobs, key=lambda job: job.started_s or 0.0)

    def job(self, job_id: str) -> Job | None:
        """A job by its submission id."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def submit(
        self,
        job_id: str,
        command: str,
        package: Path,
        environment: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> None:
        """Start a job in a copy of the archive `package`."""
        self._client.submit_job(
            entrypoint=command,
            submission_id=job_id,
            runtime_env={"working_dir": str(package), "env_vars": dict(environment)},
            metadata=dict(metadata),
        )

    def stop(self, job_id: str) -> None:
        """Ask a job to end; returns at once."""
        self._client.stop_job(job_id)

    def logs(self, job_id: str) -> str:
        """The log so far."""
        return self._client.get_job_logs(job_id)

    def tail(self, job_id: str, silence_s: float) -> Iterator[str]:
        """The log from its start, in pieces as they are written. Ends with the job, or when there
        was nothing new for `silence_s`.

        Raises:
            Unreachable: the connection was lost.
        """
        pieces = self._client.tail_job_logs(job_id)
        with asyncio.Runner() as runner:  # at its end it closes the connection, also after Ctrl-C
            try:
                while piece := runner.run(asyncio.wait_for(anext(pieces, ""), silence_s)):
                    yield piece
            except TimeoutError:
                return
            except (aiohttp.ClientError, OSError, RuntimeError) as error:
                raise _unreachable(self.address, error) from error

    def _asks_for_token(self) -> bool:
        """As the head says to everybody; heads that cannot say so ask for none."""
        try:
            answer = requests.get(
                f"{self.address}/api/authentication_mode",
                headers=_written_headers(),
                timeout=TIMEOUT_S,
            )
            mode = answer.json()["authentication_mode"] if answer.ok else "disabled"
        except (ValueError, KeyError, TypeError):
            raise _no_head(self.address) from None
        except requests.RequestException as error:
            raise _unreachable(self.address, error) from error
        return str(mode) == TOKEN

    def _own_headers(self) -> dict[str, str]:
        """Those of RAY_JOB_HEADERS, and the token where the cluster asks for one."""
        headers = _written_headers()
        if not self.has_token or any(name.lower() == "authorization" for name in headers):
            return headers
        loader = ray._raylet.AuthenticationTokenLoader.instance()
        if not loader.has_token(ignore_auth_mode=True):
            raise _refused(self.address, "asks for a token, and there is none here")
        return {**headers, "Authorization": f"Bearer {loader.get_raw_token(ignore_auth_mode=True)}"}


class _Client(JobSubmissionClient):
    """Every request has a time-out and these headers only: Ray adds its token also where the
    cluster asks for none. What goes wrong is an error of this package."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self._own_headers = headers
        super().__init__(address)  # it asks for the version

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        self._headers = self._own_headers
        try:
            answer: requests.Response = super()._do_request(
                method, endpoint, timeout=TIMEOUT_S, **options
            )
        except AuthenticationError:
            raise _refused(self.get_address(), "refuses the token of this machine") from None
        except requests.RequestException as error:
            raise _unreachable(self.get_address(), error) from error
        if answer.status_code >= 500:  # also while a head starts
            raise _unreachable(self.get_address(), _last_line(answer.text))
        if answer.status_code == 404 and endpoint == "/api/version":
            raise _no_head(self.get_address())
        return answer

    def get(self, endpoint: str) -> Any:
        """The JSON of an answer."""
        answer = self._do_request("GET", endpoint)
        if answer.status_code != 200:
            self._raise_error(answer)
        return answer.json()

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise ClusterError(
            f"--address={self.get_address()}",
            f"answers {r.status_code} ({_last_line(r.text)})",
            f"check that it is the dashboard of a cluster with Ray {ray.__version__}",
        )


def _url(address: str) -> str:
    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"--address={address}",
            "is not the URL of a dashboard",
            _DASHBOARD,
        )
    return address.rstrip("/")


def _written_headers() -> dict[str, str]:
    written = os.environ.get(HEADERS_VARIABLE)
    if not written:
        return {}
    try:
        return {str(name): str(value) for name, value in json.loads(written).items()}
    except (ValueError, AttributeError):
        raise ClusterError(
            HEADERS_VARIABLE, "is not a JSON object", 'write one such as {"NAME": "VALUE"}'
        ) from None


def open_place(hosts: Iterable[str]) -> str | None:
    """The first of these hosts that other machines reach."""
    return next((host for host in hosts if not is_loopback(host)), None)


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches that host; an IPv6 address may stand in brackets."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _environment_without(*names: str) -> Iterator[None]:
    before = {name: value for name in names if (value := os.environ.pop(name, None)) is not None}
    try:
        yield
    finally:
        os.environ.update(before)


def _unreachable(address: str, reason: object) -> Unreachable:
    text = first_line(reason) if isinstance(reason, BaseException) else reason
    return Unreachable(
        f"--address={address}",
        f"does not answer ({text})",
        "start the cluster, or write the address of its dashboard",
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason"])[-1]


def _no_head(address: str) -> ClusterError:
    return ClusterError(
        f"--address={address}",
        "is not the dashboard of a Ray cluster",
        _DASHBOARD,
    )


def _refused(address: str, rule: str) -> ClusterError:
    return ClusterError(
        f"--address={address}",
        rule,
        "export RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write it to ~/.ray/auth_token",
    )
