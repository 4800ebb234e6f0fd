"""A process that makes parts: `python -m raytune_ft.data.worker FD PARENT`, started by `processes`.

In come the work and then numbers of parts; out goes, for each, why it could not be made, or None.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from raytune_ft.data.processes import attempt


def main(channel: Connection, parent: int) -> None:
    """Serve until the other end is closed."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends this
    work = channel.recv()
    while True:
        try:
            number = channel.recv()
        except EOFError:
            return
        channel.send((number, attempt(work, number)))


def _end_with(parent: int) -> None:
    """A driver that was killed ends no process."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
