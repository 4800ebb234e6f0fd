"""Hosts that are network namespaces on this machine, joined by a bridge in a namespace of its own.

A host has its own addresses and ports, and its link can be cut: then packets vanish, as they do
when a machine loses its power or its cable, and nobody is told. Needs root and `ip` of iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.support.commands import ROOT
from tests.support.head import STARTS

PORT, DASHBOARD = 6379, 8265
PORTS = (
    *("--dashboard-agent-grpc-port=7001", "--runtime-env-agent-port=7002"),
    *("--dashboard-agent-listen-port=7003", "--metrics-export-port=7004"),
)
"""A raylet that has to ask its agents for their ports gives up after 15 s."""


def why_not() -> str | None:
    """What this machine lacks."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip`; apt-get install iproute2"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """`count` hosts of one CPU each with a Ray cluster over them that asks for a token, and then
    `idle` more without Ray. With `dashboard`, the first takes jobs.
    """

    def __init__(self, directory: Path, count: int, idle: int = 0, dashboard: bool = False) -> None:
        self._tag = f"rt{os.getpid()}"
        self._directory, self.dashboard = directory, dashboard
        self._started, self.count = count, count + idle
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "90",
            # A host that is silent for 6 s is dead; by default after more than 20 s.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        self.environment.pop("RAY_ADDRESS", None)

    def __enter__(self) -> Hosts:
        switch = f"{self._tag}s"
        _ip("netns", "add", switch)
        try:
            _ip("-n", switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", switch, "link", "set", "br0", "up")
            for host in range(1, self.count + 1):
                self._wire(host, switch)
                if host <= self._started:
                    self.start(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in range(1, self.count + 1):
            self.kill(host)
        for name in [*map(self.namespace, range(1, self.count + 1)), f"{self._tag}s"]:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def namespace(self, host: int) -> str:
        """Of the first, the second..."""
        return f"{self._tag}h{host}"

    def address(self, host: int) -> str:
        """On the bridge. Ray refuses a head at the address of another one on this machine, whatever
        namespace that is in.
        """
        return f"10.77.{os.getpid() % 250}.{host}"

    def start(
        self, host: int, before: str = "true", environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Its Ray; the first one is the head. `before` is a shell command; what it mounts, only
        this Ray sees.
        """
        place = f"--address={self.address(1)}:{PORT}"
        if host == 1:
            place = f"--head --port={PORT} --include-dashboard={str(self.dashboard).lower()} "
            place += f"--dashboard-host={self.address(1)} --dashboard-port={DASHBOARD}"
        shell = ["sh", "-c", f'{before} && exec "$@"', "sh"]
        for _ in range(STARTS):
            done = subprocess.run(
                [
                    *self.enter(host),
                    *shell,
                    *(sys.executable, "-m", "ray.scripts.scripts", "start"),
                    *place.split(),
                    f"--node-ip-address={self.address(host)}",
                    f"--temp-dir={self._directory}/h{host}",
                    "--num-cpus=1",
                    "--object-store-memory=100000000",
                    *PORTS,
                ],
                env=self.environment | environment,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
            if done.returncode == 0:
                return
            self.kill(host)
        raise AssertionError(done.stdout + done.stderr)

    def on(self, host: int, module: str) -> list[str]:
        """The start of a command there."""
        return [*self.enter(host), sys.executable, "-m", module]

    def enter(self, host: int) -> list[str]:
        """What a command begins with that runs there."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def cut(self, host: int) -> None:
        """The link first, so that no socket is closed where others could see it."""
        _ip("-n", self.namespace(host), "link", "set", "eth0", "down")
        self.kill(host)

    def mend(self, host: int) -> None:
        """As if it had been started again."""
        self._up(host)
        self.start(host)

    def kill(self, host: int) -> None:
        """Every process of the host and nothing else."""
        for _ in range(20):
            pids = self.processes(host)
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not pids:
                return
            time.sleep(0.2)

    def processes(self, host: int) -> list[int]:
        """Process ids."""
        asked = ["ip", "netns", "pids", self.namespace(host)]
        shown = subprocess.run(asked, capture_output=True, text=True, check=False)
        return [int(pid) for pid in shown.stdout.split()]

    def _wire(self, host: int, switch: str) -> None:
        name, port = self.namespace(host), f"p{host}"
        _ip("netns", "add", name)
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", name)
        _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        self._up(host)

    def _up(self, host: int) -> None:
        name = self.namespace(host)
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "address", "replace", f"{self.address(host)}/24", "dev", "eth0")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
