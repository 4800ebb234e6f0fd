"""A real `mlflow server` with an SQLite store, from an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ports import free_port

VARIABLE = "RAYTUNE_FT_MLFLOW"
OWN = Path(__file__).parents[2] / ".venv-mlflow"
START_S = 120.0


@contextmanager
def server(home: Path) -> Iterator[str]:
    """Its address. Skips where MLflow's server is not there and cannot be installed."""
    program, port = _program(), free_port()
    store = f"sqlite:///{home / 'mlflow.db'}"
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(home / "artifacts")]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--workers", "1"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, home / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def _program() -> str:
    """The server needs older pandas and more than the client, so it lives apart."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    if not (OWN / "bin" / "mlflow").exists():
        commands = [
            [sys.executable, "-m", "venv", str(OWN)],
            [str(OWN / "bin" / "pip"), "install", "-q", "mlflow>=3"],
        ]
        for command in commands:
            if subprocess.run(command, check=False, capture_output=True).returncode:
                pytest.skip(f"MLflow's server cannot be installed; {VARIABLE} may name one")
    return str(OWN / "bin" / "mlflow")


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"no answer at {address} within {START_S:.0f} s: {log.read_text()}")
