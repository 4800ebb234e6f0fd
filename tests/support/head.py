"""A Ray cluster of one node on this machine that outlives drivers, or is killed under them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).parent / "ray")


@dataclass
class Head:
    """A head node with two CPUs on loopback; `environment` lets a driver join it."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For drivers."""
        return {"RAY_ADDRESS": f"127.0.0.1:{self.port}", "RAY_AUTH_MODE": "disabled"}

    def kill(self) -> int:
        """SIGKILL to everything at once, workers as well; how many processes that were."""
        everything = [psutil.Process(self.process.pid)]
        everything += everything[0].children(recursive=True)
        for process in everything:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(everything, timeout=30)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return len(everything)


def start_head() -> Head:
    """Returns once it answers; end it with `Head.kill`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder = Path("/tmp") / f"rtft-{os.getpid()}-{port}"  # the path of a socket has to be short
    head = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"),
            *("--node-ip-address=127.0.0.1", f"--port={port}", "--disable-usage-stats"),
            f"--temp-dir={folder}",
        ],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while True:
        assert head.poll() is None, "ray start ended"
        assert time.monotonic() < deadline, "ray start does not answer"
        workers = psutil.Process(head.pid).children(recursive=True)
        if any("raylet" in process.name() for process in workers):
            return Head(head, port, folder)
        time.sleep(0.5)
