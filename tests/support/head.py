"""A Ray cluster of one node on this machine that outlives drivers, or is killed under them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil

from tests.support.ports import free_port

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
STARTS = 3
"""Ray gives up a head that is not there after half a minute, as on a busy machine."""


@dataclass
class Head:
    """A head node with two CPUs on loopback; `environment` lets a driver join it.

    What Ray writes, such as the logs of its sessions, is in `folder` until it is killed.
    """

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    dashboard: int | None = None
    token: str | None = None

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def headers(self) -> dict[str, str]:
        """For requests to the dashboard."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def read(self, path: str) -> bytes:
        """What the dashboard answers."""
        with urlopen(Request(f"{self.url}{path}", headers=self.headers), timeout=60) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        """The JSON that the dashboard answers."""
        return json.loads(self.read(path))

    @property
    def environment(self) -> dict[str, str]:
        """For drivers."""
        return {"RAY_ADDRESS": f"127.0.0.1:{self.port}", **_authentication(self.token)}

    def kill(self) -> int:
        """SIGKILL to everything at once, workers as well; how many processes that were."""
        killed = kill_tree(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)
        return killed


def kill_tree(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to it and all that it has started, at once; how many processes that were."""
    everything: list[psutil.Process] = []
    if process.poll() is None:
        everything = [psutil.Process(process.pid)]
        everything += everything[0].children(recursive=True)
    for each in everything:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    psutil.wait_procs(everything, timeout=30)
    process.wait()
    return len(everything)


def _authentication(token: str | None) -> dict[str, str]:
    if token is None:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def start_head(
    dashboard: int | None = None,
    token: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    gpus: int = 0,
) -> Head:
    """Returns once it answers; end it with `Head.kill`. `dashboard` is a port; None leaves the
    dashboard out, without which there are no jobs. With a `token`, it asks for that. It and its
    workers have the variables of `environment`. It says that it has `gpus` GPUs.
    """
    for _ in range(STARTS):
        head = _start(dashboard, token, environment, gpus)
        deadline = time.monotonic() + 120
        while head.process.poll() is None and time.monotonic() < deadline:
            if _answers(head):
                return head
            time.sleep(0.5)
        head.kill()
    raise AssertionError(f"ray start does not answer, tried {STARTS} times")


def _start(
    dashboard: int | None, token: str | None, environment: Mapping[str, str], gpus: int
) -> Head:
    port = free_port()
    folder = Path("/tmp") / f"rtft-{os.getpid()}-{port}"  # the path of a socket has to be short
    shown = ["--include-dashboard=false"]
    if dashboard is not None:
        shown = ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        # Without its agent a head takes no jobs, and another Ray here may have the usual port.
        shown += [f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2", f"--num-gpus={gpus}", *shown),
            *("--node-ip-address=127.0.0.1", f"--port={port}", "--disable-usage-stats"),
            f"--temp-dir={folder}",
        ],
        env={
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            **environment,
            **_authentication(token),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    return Head(process, port, folder, dashboard, token)


def _answers(head: Head) -> bool:
    if head.dashboard is None:
        workers = psutil.Process(head.process.pid).children(recursive=True)
        return any("raylet" in process.name() for process in workers)
    try:
        return bool(head.get("/api/v0/nodes")["data"]["result"]["result"])
    except (URLError, ConnectionError, TimeoutError):
        return False
