"""Where the time goes from a command to its first step.

    python benchmarks/startup.py sweep jobs/quickstart.yaml
    python benchmarks/startup.py train jobs/quickstart.yaml --first-step-only

Runs `raytune-ft COMMAND CONFIG storage=TEMPORARY ...`, looks at its processes 20 times a second,
and prints when each of them began and how much CPU time it had used when the first step was logged
and at its end. Arguments that it does not know go to the command.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_S = 0.05
KINDS = ("gcs_server", "raylet", "dashboard", "log_monitor", "default_worker")
TITLE = re.compile(r"ray::(\S+)")


@dataclass
class Seen:
    """A process; times in seconds since the command."""

    kind: str
    began_s: float
    ended_s: float = 0.0
    cpu_s: float = 0.0
    cpu_at_first_step_s: float | None = None


def main() -> None:
    """Run the command once and print its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "sweep"))
    parser.add_argument("config")
    parser.add_argument("--first-step-only", action="store_true", help="interrupt it then")
    settings, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder)
        line = [sys.executable, "-m", "raytune_ft", settings.command, settings.config]
        line += [f"storage={storage}", *more]
        seen, first_s, whole_s = watch(line, storage, settings.first_step_only)
    print(f"first step after {first_s:.1f} s" if first_s else "no step was logged")
    print(f"end after {whole_s:.1f} s\n")
    print("| process | began (s) | ended (s) | CPU s at the first step | CPU s |")
    print("|---|---|---|---|---|")
    for one in sorted(seen, key=lambda one: one.began_s):
        at_first = one.cpu_at_first_step_s
        print(
            f"| {one.kind} | {one.began_s:.1f} | {one.ended_s:.1f} "
            f"| {'' if at_first is None else f'{at_first:.1f}'} | {one.cpu_s:.1f} |"
        )
    print(f"CPU time of all: {sum(one.cpu_s for one in seen):.1f} s")


def watch(line: list[str], storage: Path, briefly: bool) -> tuple[list[Seen], float | None, float]:
    """The processes of a command, the time of its first step, and of its end."""
    began, wall = time.perf_counter(), time.time()
    command = psutil.Popen(line, stdout=subprocess.DEVNULL)
    seen: dict[int, Seen] = {}
    first_s: float | None = None
    while command.poll() is None:
        now = time.perf_counter() - began
        with contextlib.suppress(psutil.Error):
            for process in [command, *command.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    _look(process, seen, now, wall)
        if first_s is None and _stepped(storage):
            first_s = now
            for one in seen.values():
                one.cpu_at_first_step_s = one.cpu_s
            if briefly:
                command.send_signal(signal.SIGINT)
        time.sleep(EVERY_S)
    return list(seen.values()), first_s, time.perf_counter() - began


def _look(process: psutil.Process, seen: dict[int, Seen], now: float, wall: float) -> None:
    times, title = process.cpu_times(), " ".join(process.cmdline())
    if not title:
        return
    one = seen.setdefault(process.pid, Seen("", process.create_time() - wall))
    one.kind, one.ended_s, one.cpu_s = _kind_of(title, one.kind), now, times.user + times.system


def _kind_of(title: str, before: str) -> str:
    """Ray names its workers after their actor's class or their task."""
    if found := TITLE.search(title):
        return before if found[1] == "IDLE" and before else found[1]
    return next((kind for kind in KINDS if kind in title), before or title[-60:])


def _stepped(storage: Path) -> bool:
    return any(path.stat().st_size for path in storage.glob("**/metrics.jsonl"))


if __name__ == "__main__":
    main()
