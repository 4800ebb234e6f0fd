"""Work that a thread repeats while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(
    act: Callable[[], object], every_s: float, name: str, join_s: float | None = None
) -> Iterator[None]:
    """In the context, a thread `name` calls `act` every `every_s` seconds. The end waits for a call
    that is under way, at most `join_s` seconds where that is given.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every_s):
            act()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(join_s)
