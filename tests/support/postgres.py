"""A PostgreSQL server for one test session, on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ports import free_port

USER, PASSWORD = "postgres", "hunter2"
DEBIAN = Path("/usr/lib/postgresql")


@contextmanager
def server() -> Iterator[str]:
    """Its URL, with a password as `${PGTEST_PASSWORD}`. Skips where PostgreSQL is not installed."""
    programs = {name: _find(name) for name in ("initdb", "postgres", "pg_ctl")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: no {missing[0]}")
    port = free_port()
    home = Path(tempfile.mkdtemp(prefix="raytune-ft-pg-"))
    secret = home / "password"
    secret.write_text(PASSWORD)
    if os.geteuid() == 0:  # the server refuses to run as root
        for path in (home, secret):
            shutil.chown(path, "postgres")
    data, log = home / "data", home / "log"
    options = f"-p {port} -c listen_addresses=127.0.0.1 -k {home}"
    try:
        settings = ["-A", "scram-sha-256", "-E", "UTF8", "--no-sync", f"--pwfile={secret}"]
        _run([programs["initdb"], "-D", data, "-U", USER, *settings], home)
        _run([programs["pg_ctl"], "-D", data, "-l", log, "-w", "-o", options, "start"], home)
        yield f"postgresql://{USER}:${{PGTEST_PASSWORD}}@127.0.0.1:{port}/postgres"
    finally:
        if data.exists():
            _run([programs["pg_ctl"], "-D", data, "-m", "immediate", "stop"], home)
        shutil.rmtree(home, ignore_errors=True)


def _find(name: str) -> str | None:
    folders = sorted(map(str, DEBIAN.glob("*/bin")), reverse=True)
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def _run(arguments: Sequence[object], home: Path) -> None:
    subprocess.run(
        [str(each) for each in arguments],
        user="postgres" if os.geteuid() == 0 else None,
        cwd=home,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
