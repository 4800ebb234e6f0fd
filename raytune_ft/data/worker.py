"""A process that imports what makes parts, and forks the processes that make them; see `processes`.

It forks while it has a single thread, so that a child holds no lock of a thread that it lacks.
In come tuples, see `Server`; a child gets numbers of parts, and sends for each why it could not be
made, or None.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from raytune_ft.child import opened, watch
from raytune_ft.data.processes import attempt
from raytune_ft.data.tokenise import Work


def fork_workers(channel: Connection, parent: int) -> None:
    """Serve until the other end is closed, or its process is gone."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401  (imported once, for all children)

    work: Work | None = None
    children = set[int]()
    while True:
        while not channel.poll(1.0):
            if os.getppid() != parent:
                return
        try:
            what, *rest = channel.recv()
        except EOFError:
            return
        if what == "work":
            (work,) = rest
            work.encoder.find_facts()
            gc.collect()
            gc.freeze()  # a collection writes to every object, and so copies the pages of all
        elif what == "fork":
            assert work is not None
            handle = recv_handle(channel)
            server = os.getpid()
            if (child := os.fork()) == 0:
                channel.close()
                _make_parts(work, Connection(handle), server)
            os.close(handle)
            children.add(child)
            channel.send(child)
        elif what == "end":
            (child,) = rest
            if child not in children:  # of another server, and may be any process by now
                channel.send(None)
                continue
            children.remove(child)
            os.kill(child, signal.SIGKILL)  # one that has ended keeps its exit code
            channel.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _make_parts(work: Work, channel: Connection, server: int) -> None:
    """What a child does, and how it ends: without what its parent has to do at its own end."""
    try:
        watch(server, partial(os._exit, 1))
        while True:
            number = channel.recv()
            channel.send((number, attempt(work, number)))
    except EOFError:
        os._exit(0)
    except Exception:  # noqa: BLE001 - told as the interpreter does, without its end
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


if __name__ == "__main__":
    fork_workers(*opened())
