"""Runs the code of a completion against tests: no sandbox, but limits that catch mistakes."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raytune_ft.config.rewards import Code
from raytune_ft.rewards.base import WORKING, Group, Score, Scorer, Yielded

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.S)
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # of Linux
LARGEST_FILE = 16 * 10**6
"""Bytes that a test may write into one file."""


def run_tests(config: Code) -> Scorer:
    """The share of the tests that end without an error."""

    def rate(group: Group) -> Iterator[Yielded]:
        tests = _tests(group.columns[config.tests])
        for completion in group.completions:
            if not tests:
                yield Score(None, f"ValueError: {config.tests!r} holds no test")
                continue
            passed = 0
            for test in tests:
                passed += passes(code_of(completion), test, config)
                yield WORKING
            yield passed / len(tests)

    return Scorer(rate, (config.tests,))


def code_of(completion: str) -> str:
    """The last fenced block of Python in a completion; all of it where there is none."""
    blocks = _BLOCK.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _tests(written: Any) -> list[str]:
    texts = written if isinstance(written, list) else [written]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def passes(code: str, test: str, config: Code) -> bool:
    """Whether the code and then the test run to their end, in an empty folder and environment.

    The end is a word that the code cannot know, so that leaving early is no success.
    """
    word = secrets.token_hex(16)
    program = f"{code}\n{test}\nimport os as _os\n_os.write(1, b'{word}')\n"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "program.py"],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: _limit(config),
            )
            with suppress(subprocess.TimeoutExpired):
                process.wait(config.timeout_s * 0.9)
            with suppress(ProcessLookupError):  # it, and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written = (folder / "said").read_bytes()
    return process.returncode == 0 and word.encode() in written


def _limit(config: Code) -> None:
    """Called in the new process, before the program. It ends with the process that waits for it."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    seconds, size = int(config.timeout_s) + 1, config.memory_mb * 10**6
    limits = (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, size),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    )
    for kind, most in limits:
        resource.setrlimit(kind, (most, most))
