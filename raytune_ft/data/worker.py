"""A process that makes parts, started by `processes`.

In come the work and then numbers of parts; out goes, for each, why it could not be made, or None.
"""

from __future__ import annotations

import os
from functools import partial
from multiprocessing.connection import Connection

from raytune_ft.child import serve
from raytune_ft.data.processes import attempt


def main(channel: Connection) -> None:
    """Serve until the other end is closed."""
    work = channel.recv()
    while True:
        try:
            number = channel.recv()
        except EOFError:
            return
        channel.send((number, attempt(work, number)))


if __name__ == "__main__":
    serve(main, partial(os._exit, 1))
