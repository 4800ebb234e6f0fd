"""An end that was asked for from outside."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one does what it did before.

    Python's own answer would break off in the middle of a step. Ray Train and Tune catch SIGINT
    alone, and only to exit with 0 or to hang on to their workers.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        restore()
