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
    """`python -m MODULE`, whose last lines call `serve`, and this end of its channel.

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
    """Run `main` with the channel of this process; `end` it where the parent is gone, since one
    that was killed closes no channel and ends no process.
    """
    channel, parent = Connection(int(sys.argv[1])), int(sys.argv[2])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        end()

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    main(channel)
