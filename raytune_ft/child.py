"""A Python process of this package that serves its parent over a socket, and ends with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection


def start(
    module: str, *, new_session: bool = False, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """`python -m MODULE`, whose last lines call `serve` or `opened`, and this end of its channel.

    Args:
        new_session: what the process starts can be ended with it, by its process group.
        environment: of the process, where it is not that of this one.
    """
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=2,  # what it prints is no output of this program
        pass_fds=[theirs.fileno()],
        start_new_session=new_session,
        env=None if environment is None else dict(environment),
    )
    theirs.close()
    return process, Connection(ours.detach())


def serve(main: Callable[[Connection], None], end: Callable[[], object]) -> None:
    """Run `main` with the channel of this process; `end` it where the parent is gone."""
    channel, parent = opened()
    watch(parent, end)
    main(channel)


def opened() -> tuple[Connection, int]:
    """(the channel of this process, the number of its parent); Ctrl-C is for the parent, which ends
    this.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Connection(int(sys.argv[1])), int(sys.argv[2])


def watch(parent: int, end: Callable[[], object]) -> None:
    """Call `end` once the parent is gone, since one that was killed closes no channel and ends no
    process. A thread looks every second.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        end()

    threading.Thread(target=look, daemon=True).start()
