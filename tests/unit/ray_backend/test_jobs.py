"""What a head answers and what becomes of it; the head is a small HTTP server."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from raytune_ft.errors import ClusterError, Unreachable
from raytune_ft.ray_backend.jobs import JobCluster

TOKEN = "3f" * 32
VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_JOB_HEADERS")


@dataclass
class Head:
    """`answers` by path; with a `token`, every other request is refused."""

    answers: dict[str, Any] = field(default_factory=dict)
    token: str | None = None
    url: str = ""
    seen: list[str | None] = field(default_factory=list)

    def answer(self, path: str, authorization: str | None) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if path == "/api/authentication_mode" and path not in self.answers:
            return 200, {"authentication_mode": "token" if self.token else "disabled"}
        self.seen.append(authorization)
        if self.token and authorization != f"Bearer {self.token}":
            return (403 if authorization else 401), "Unauthorized"
        return self.answers.get(path, (404, "none"))


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Head]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")  # the argument counts
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    versions = {"rayVersion": ray.__version__, "pythonVersion": platform.python_version()}
    head = Head(
        {
            "/api/version": (200, {"ray_version": ray.__version__}),
            "/api/v0/cluster_metadata": (200, {"data": versions}),
            "/api/jobs/": (200, []),
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = head.answer(self.path, self.headers.get("Authorization"))
            text = body if isinstance(body, str) else json.dumps(body)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    head.url = f"http://127.0.0.1:{server.server_port}"
    yield head
    server.shutdown()
    server.server_close()
    thread.join()


def nodes(*addresses: str) -> tuple[int, Any]:
    alive = [
        {"node_ip": each, "resources_total": {"CPU": 2.0}, "state": "ALIVE"} for each in addresses
    ]
    dead = [{"node_ip": "10.0.0.9", "resources_total": {}, "state": "DEAD"}]
    return 200, {"data": {"result": {"result": [*alive, *dead]}}}


def test_the_address_is_the_one_that_is_written(head: Head) -> None:
    assert JobCluster(f"{head.url}/").jobs() == []


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "auto", "ray://head:10001"])
def test_only_the_url_of_a_dashboard_is_an_address(address: str) -> None:
    with pytest.raises(ClusterError, match="http://HEAD:8265"):
        JobCluster(address)


def test_nothing_listens() -> None:
    with pytest.raises(Unreachable, match="does not answer"):
        JobCluster("http://127.0.0.1:1")


def test_a_server_that_is_no_head(head: Head) -> None:
    head.answers = {"/api/authentication_mode": (200, "<html>")}
    with pytest.raises(ClusterError, match="is not the dashboard of a Ray cluster"):
        JobCluster(head.url)
    head.answers = {}
    with pytest.raises(ClusterError, match="is not the dashboard of a Ray cluster"):
        JobCluster(head.url)


def opened(head: Head, **environment: str) -> str:
    """What opening it prints, in a process of its own: Ray reads its token once a process, and
    other tests may have had it read here."""
    command = (
        "from raytune_ft.errors import ClusterError\n"
        "from raytune_ft.ray_backend.jobs import JobCluster\n"
        "try:\n"
        f"    print(JobCluster({head.url!r}).jobs())\n"
        "except ClusterError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return process.stdout.strip()


def test_the_token_is_found_where_ray_finds_it(head: Head, tmp_path: Path) -> None:
    head.token = TOKEN
    assert "asks for a token, and there is none here; export RAY_AUTH_TOKEN" in opened(head)
    assert opened(head, RAY_AUTH_TOKEN=TOKEN) == "[]"
    file = tmp_path / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text(TOKEN)
    assert opened(head) == "[]"
    assert set(head.seen) == {f"Bearer {TOKEN}"}


def test_another_token_is_refused_without_being_shown(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.token = TOKEN
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"Authorization": "Bearer " + "a0" * 32}))
    with pytest.raises(ClusterError, match="refuses the token") as caught:
        JobCluster(head.url)
    assert "a0a0" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_open_cluster_gets_no_token(head: Head) -> None:
    assert opened(head, RAY_AUTH_TOKEN=TOKEN, RAY_AUTH_MODE="token") == "[]"
    assert set(head.seen) == {None}


def test_headers_are_a_json_object(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", "X-Team: mine")
    with pytest.raises(ClusterError, match="RAY_JOB_HEADERS is not a JSON object"):
        JobCluster(head.url)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("rayVersion", "2.61.3", "Ray 2.61.3 of"), ("pythonVersion", "3.9.1", "Python 3.9.1 of")],
)
def test_versions_that_differ(head: Head, key: str, value: str, words: str) -> None:
    cluster = JobCluster(head.url)
    cluster.check_versions()
    head.answers["/api/v0/cluster_metadata"][1]["data"][key] = value
    with pytest.raises(ClusterError, match=words):
        cluster.check_versions()


def test_an_open_cluster_beyond_loopback_is_refused(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.answers["/api/v0/nodes"] = nodes()
    cluster = JobCluster(head.url)
    with pytest.raises(Unreachable, match="still starting"):
        cluster.check_closed()
    head.answers["/api/v0/nodes"] = nodes("127.0.0.1")
    cluster.check_closed()
    head.answers["/api/v0/nodes"] = nodes("127.0.0.1", "10.0.0.7")
    with pytest.raises(ClusterError, match=r"listens at 10\.0\.0\.7.*--insecure"):
        cluster.check_closed()
    head.token = TOKEN
    monkeypatch.setenv("RAY_JOB_HEADERS", json.dumps({"authorization": f"Bearer {TOKEN}"}))
    JobCluster(head.url).check_closed()


def test_a_head_that_starts_does_not_answer_yet(head: Head) -> None:
    cluster = JobCluster(head.url)
    head.answers["/api/jobs/"] = (500, "Traceback\nTimeoutError: no agent yet\n")
    with pytest.raises(Unreachable, match=r"\(TimeoutError: no agent yet\)"):
        cluster.jobs()


def test_jobs_are_read(head: Head) -> None:
    head.answers["/api/jobs/"] = (
        200,
        [
            {
                "submission_id": "run-2",
                "status": "FAILED",
                "entrypoint": "raytune-ft train",
                "metadata": {"raytune_ft_run": "run", "raytune_ft_digest": "d"},
                "message": None,
                "driver_exit_code": -9,
                "start_time": 2000,
                "end_time": 3500,
            },
            {"submission_id": "run", "status": "PENDING", "entrypoint": "x", "start_time": 1000},
            {
                "submission_id": None,
                "status": "RUNNING",
                "entrypoint": "a driver",
                "type": "DRIVER",
            },
        ],
    )
    first, second = JobCluster(head.url).jobs()
    assert (first.id, first.ended, first.run) == ("run", False, None)
    assert (second.run, second.digest, second.exit_code) == ("run", "d", -9)
    assert (second.started_s, second.ended_s, second.ended) == (2.0, 3.5, True)
