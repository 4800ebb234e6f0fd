"""Parts of the tokens as tasks on the nodes of a cluster, see `data.processes.Workers`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ray
from ray.exceptions import RayError

from raytune_ft.config.paths import is_url
from raytune_ft.data.processes import (
    DEATHS,
    WORTH_BYTES,
    LocalProcesses,
    Made,
    attempt,
    in_this_process,
)
from raytune_ft.data.tokenise import Work
from raytune_ft.errors import RunFailed, first_line
from raytune_ft.records import Tell

AHEAD = 2
"""Tasks in flight for each CPU, so that none waits for the driver."""


def in_tasks(work: Work, numbers: Sequence[int], tell: Tell) -> Made:
    """One task for each part, spread over the nodes of the joined cluster; in this process where
    there is little text. What no node but this one sees, such as a file on its own disk, is
    tokenised here.

    Raises:
        RunFailed: processes die again and again over one part.
    """
    if work.text_bytes(numbers) < WORTH_BYTES:
        yield from in_this_process(work, numbers, tell)
        return
    yield from spread(work, numbers, tell)


def spread(work: Work, numbers: Sequence[int], tell: Tell) -> Made:
    """As `in_tasks`, however little text there is."""
    make: Any = ray.remote(num_cpus=1, max_retries=DEATHS - 1)(make_part_here)
    make = make.options(scheduling_strategy="SPREAD")
    sent = ray.put(ray.cloudpickle.dumps(work))
    waiting, running, unseen = deque(numbers), dict[Any, int](), list[int]()
    room = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    tell(f"data: {len(numbers)} parts as tasks on {room // AHEAD} CPUs")
    try:
        while waiting or running:
            while waiting and len(running) < room:
                number = waiting.popleft()
                running[make.remote([sent], number)] = number
            (done,), _ = ray.wait(list(running))
            number = running.pop(done)
            try:
                seen, error = ray.get(done)
            except RayError as died:
                raise RunFailed(
                    f"the tasks that made part {number} of the tokens ended {DEATHS} times "
                    f"({first_line(died)}); give them more memory, or start again: the other "
                    "parts are kept"
                ) from died
            if not seen:
                unseen.append(number)
                continue
            if error is not None:  # what comes behind it is not needed
                waiting = deque(one for one in waiting if one < number)
            yield number, error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if unseen:
        tell(f"data: {len(unseen)} parts are of files that only this machine sees")
        yield from LocalProcesses()(work, sorted(unseen), tell)


def make_part_here(sent: list[Any], number: int) -> tuple[bool, Exception | None]:
    """(whether this node sees what the part is made of, why the part could not be made)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        work = _work(sent[0])
    except FileNotFoundError:  # a data set in the cache of another machine
        return False, None
    source, piece = work.pieces[number]
    opened = work.sources[source][0]
    shards = opened.shards[piece.shard :][:1]  # none of a data set
    needed = [str(work.folder), *(one.path for one in shards if not is_url(one.path))]
    if not all(os.path.exists(path) for path in needed):
        return False, None
    return True, attempt(work, number)


@lru_cache(maxsize=1)
def _work(reference: Any) -> Work:
    work: Work = ray.cloudpickle.loads(ray.get(reference))
    return work
