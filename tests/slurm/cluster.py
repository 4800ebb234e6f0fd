"""A real Slurm of two nodes on this machine: Debian's packages, unpacked and not installed, with a
network namespace for each node. Needs root, iproute2 and Debian's package archive.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.multihost.hosts import Hosts
from tests.support.commands import ROOT

PACKAGES = ("slurmctld", "slurmd", "slurm-client")
CONF = """\
ClusterName=test
FirstJobId={first}
SlurmctldHost={host}({controller})
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.%n.log
PluginDir={libraries}/slurm-wlm
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=n[1-2] Default=YES State=UP MaxTime=60
"""


def unpacked(folder: Path) -> str | None:
    """Fetch and unpack Slurm below a folder that may have it already; why that is not possible."""
    if (folder / "root" / "usr" / "sbin" / "slurmctld-wlm").exists():
        return None
    if shutil.which("apt-get") is None:
        return "no apt-get, which fetches Slurm"
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    asked = [
        *("apt-get", "install", "--yes", "--download-only", "--no-install-recommends"),
        *("-o", f"Dir::Cache::archives={archives}", *PACKAGES),
    ]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"no packages of Slurm: {done.stderr.strip().splitlines()[-1]}"
    for package in archives.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    return None


class Slurm(Hosts):
    """Two nodes of four CPUs; the controller runs on the first."""

    def __init__(self, packages: Path, directory: Path) -> None:
        super().__init__(directory, 2)
        self._root, self._run = packages / "root", directory
        self.storage = directory / "storage"
        self._jobs: list[str] = []
        libraries = self._root / "usr" / "lib" / "x86_64-linux-gnu"
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
            del self.environment[name]
        self.environment |= {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{libraries}:{libraries / 'slurm-wlm'}",
            "PATH": f"{self._root}/usr/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAYTUNE_FT_STORAGE": str(self.storage),
            "RAY_OBJECT_STORE_BYTES": "100000000",
            # All nodes share this machine's processors.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
        }
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName=n{n} NodeHostname={host} NodeAddr={self.address(n)} Port={17000 + n} CPUs=4"
            for n in (1, 2)
        )
        for name in ("state", "spool.n1", "spool.n2", "storage"):
            (directory / name).mkdir()
        # Nothing here is confined by cgroups, but slurmd wants to know which version there is.
        version = 2 if Path("/sys/fs/cgroup/cgroup.controllers").exists() else 1
        (directory / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v{version}\n")
        (directory / "slurm.conf").write_text(
            CONF.format(
                first=os.getpid(),
                host=host,
                controller=self.address(1),
                run=directory,
                libraries=libraries,
                nodes=nodes,
            )
        )

    def start(self, host: int) -> None:
        """Its slurmd; on the first one the controller too."""
        daemons = [["slurmd-wlm", "-N", f"n{host}", "-d", f"{self._root}/usr/sbin/slurmstepd-wlm"]]
        if host == 1:
            daemons.insert(0, ["slurmctld-wlm", "-c"])
        for program, *arguments in daemons:
            self._in(host, f"{self._root}/usr/sbin/{program}", *arguments)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for job in self._jobs:
            for node in ("head0", "worker0"):
                shutil.rmtree(f"/tmp/rt{job}.{node}", ignore_errors=True)

    def command(self, *words: str) -> str:
        """What a command of Slurm prints."""
        done = self._in(1, f"{self._root}/usr/bin/{words[0]}", *words[1:])
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """The number of a job of cluster/slurm/raytune.sbatch, shrunk to these nodes."""
        small = ["--cpus-per-task=1", "--mem=0", "--time=20", f"--chdir={self._run}"]
        script = str(ROOT / "cluster" / "slurm" / "raytune.sbatch")
        self._jobs.append(self.command("sbatch", "--parsable", *small, script, *words))
        return self._jobs[-1]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows about it."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.command("scontrol", "show", "job", "-o", number))
        )

    def log(self, number: str) -> str:
        """Its output so far."""
        file = self._run / f"raytune-ft-{number}.out"
        return file.read_text() if file.exists() else ""

    def wait(self, number: str, *states: str, timeout_s: float = 1200) -> dict[str, str]:
        """Until it is in one of the states."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{job['JobState']}\n{self.log(number)}"
            time.sleep(0.5)
        return job

    def _in(self, host: int, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace(host), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done
