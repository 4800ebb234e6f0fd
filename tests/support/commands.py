"""The command line as a process of its own, as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    """`raytune-ft ARGUMENTS` with this interpreter."""
    return [sys.executable, "-m", "raytune_ft", *arguments]


def run_process(
    arguments: Sequence[str], timeout_s: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it in the repository; stdout and stderr come back as text."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def kill_when(arguments: Sequence[str], path: Path, lines: int, timeout_s: float = 240) -> None:
    """Start the command and SIGKILL it once `path` has that many lines."""

    def written() -> bool:
        return path.exists() and len(path.read_text().splitlines()) >= lines

    kill_once(arguments, written, timeout_s, f"{path} did not get {lines} lines")


def kill_once(
    arguments: Sequence[str],
    reached: Callable[[], bool],
    timeout_s: float = 240,
    otherwise: str = "the command does not get as far",
) -> None:
    """Start the command and SIGKILL it once `reached`; fails with `otherwise` after `timeout_s`.

    Its process group goes with it: a driver takes its local Ray cluster along, as the end of a
    machine would.
    """
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout_s
    try:
        while not reached():
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline, otherwise
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


def started(found_by: Callable[[list[str]], bool], pid: int | None = None) -> list[psutil.Process]:
    """The processes that this one or `pid` has started, directly or not, by their command lines."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if found_by(process.cmdline()):
                found.append(process)
    return found
