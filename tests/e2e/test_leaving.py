"""A cluster that was started here is gone with the command, to its last process."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

SCRIPT = """
import atexit, os, time, psutil, ray
from raytune_ft.ray_backend.cluster import connected

with connected("local"):
    @ray.remote(num_cpus=1)
    class Stuck:
        def pid(self):
            atexit.register(time.sleep, 600)
            return os.getpid()

    free = ray.cluster_resources()["CPU"]
    actor = Stuck.remote()
    pid = ray.get(actor.pid.remote())
    assert ray.available_resources()["CPU"] < free
    del actor
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != free:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert psutil.pid_exists(pid)  # the cluster has forgotten it, and it is still there
print(pid)
"""


def test_a_worker_that_hangs_while_it_ends() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(10)  # killed, it is gone once it was reaped
