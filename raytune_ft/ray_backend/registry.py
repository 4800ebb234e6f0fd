"""The connection between the worker group of a run and the process that started it.

Ray Train reports nothing between the call of `fit()` and its return, offers no handle to stop a
run, and leaves placement groups behind when a controller dies (ray issues 54305, 62753). So the
controller of each run registers itself, its workers and its placement group with an actor of the
driver, which outlives runs and trials. Through that actor, any process can end the run.

The process of the actor imports this module too, so it does not import ray.train.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft.errors import RaytuneFtError
from raytune_ft.records import EvalMetrics
from raytune_ft.rundir import RunSpec


@dataclass(frozen=True)
class Report:
    """An evaluation; its checkpoint, if it earned one, is on disk."""

    metrics: EvalMetrics
    checkpoint: str | None

    @classmethod
    def of(cls, values: dict[str, Any]) -> Report:
        """From the plain values of a message."""
        return cls(EvalMetrics.of(values), values["checkpoint"])


@dataclass(frozen=True)
class Note:
    """A progress line."""

    text: str


@dataclass(frozen=True)
class Value:
    """The pickled result of a call in a worker group; see `ray_backend.call`."""

    pickled: bytes


@dataclass(frozen=True)
class Ended:
    """The run has ended and holds nothing on the cluster."""

    error: RaytuneFtError | None


Message = Report | Note | Value


class StopRequested(Exception):
    """The sweep stops."""


class RunHandle(Protocol):
    """The handle of a run that trains in other processes, from `start` to `stop`."""

    def start(self) -> None:
        """Wait for a free slot, then begin.

        Raises:
            StopRequested: the sweep stopped before a slot was free.
        """

    def next(self, timeout_s: float = 1.0) -> Message | Ended | None:
        """The next message, in order; None when none came within `timeout_s`.

        Raises:
            StopRequested: the sweep stops; call `wind_down` or `stop`.
        """

    def wind_down(self, grace_s: float) -> None:
        """Ask the run to save and to leave, and wait for that, at most `grace_s`."""

    def stop(self) -> None:
        """End the run; returns when its slot is free."""


@dataclass
class Group:
    """What a run holds on the cluster."""

    controller: Any = None
    placement_groups: list[PlacementGroup] = field(default_factory=list)
    workers: list[Any] = field(default_factory=list)


@dataclass
class Assigned:
    """A run that a worker group is given, the `number`th. `over`: it has ended, and the group can
    train another.
    """

    number: int
    spec: RunSpec
    over: bool = False
    pruned: bool = False


@dataclass
class Mailbox:
    """Messages that wait for one reader."""

    messages: list[Any] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, message: Any) -> None:
        """Add a message and wake the reader."""
        self.messages.append(message)
        self.arrived.set()

    async def take(self, timeout_s: float) -> list[Any]:
        """All messages, in order; waits for the first, but no longer than `timeout_s`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.arrived.wait(), timeout_s)
        self.arrived.clear()
        messages, self.messages = self.messages, []
        return messages


class Mailboxes:
    """The base of the driver's two asynchronous actors: a mailbox for each run, one stop for all.

    The stop wakes every caller that waits for a message or, through `_changed`, for a slot.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._boxes: dict[str, Mailbox] = {}
        self._stopping = False

    async def post(self, run: str, event: dict[str, Any]) -> None:
        """Send a message to the process that started `run`; dropped where `run` was not opened."""
        if run in self._boxes:
            self._boxes[run].put(event)

    async def take(self, run: str, timeout_s: float) -> tuple[list[dict[str, Any]], bool]:
        """The new messages of `run`, waiting for the first; and whether all runs shall stop."""
        if run not in self._boxes:
            return [], self._stopping
        events = await self._boxes[run].take(0.0 if self._stopping else timeout_s)
        return events, self._stopping

    async def is_stopping(self) -> bool:
        """Whether all runs shall stop."""
        return self._stopping

    async def stop_all(self) -> None:
        """Stop all runs: every caller that waits gets the stop instead of a message or a slot."""
        self._stopping = True
        async with self._changed:
            self._changed.notify_all()
        for box in self._boxes.values():
            box.arrived.set()


class Registry(Mailboxes):
    """An asynchronous actor. `slots` is how many runs may hold workers at a time.

    A run has an owner, the trial that it belongs to; a trial may die without a word. The workers of
    an isolated trial may train the next one too: to this actor that is the same run, which is
    assigned a spec after another.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self._free = self._slots = slots
        self._owners: dict[str, str] = {}  # of the runs that have a slot
        self._gone: set[str] = set()
        self._groups: dict[str, Group] = {}
        self._assigned: dict[str, Assigned] = {}
        self._ending: set[str] = set()

    async def resize(self, slots: int) -> None:
        """Change the number of slots; runs that hold one keep it."""
        async with self._changed:
            self._free += slots - self._slots
            self._slots = slots
            self._changed.notify_all()

    async def open(self, run: str, owner: str) -> bool:
        """Wait for a free slot; until `close`, `run` may hold workers.

        False: there will be none, since everybody stops or the owner was given up.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._free > 0 or self._refused(owner))
            if self._refused(owner):
                return False
            self._free -= 1
            self._owners[run] = owner
            self._groups[run], self._boxes[run] = Group(), Mailbox()
            return True

    def _refused(self, owner: str) -> bool:
        return self._stopping or owner in self._gone

    async def assign(self, run: str, owner: str, spec: RunSpec) -> int | None:
        """Give the workers of `run` what they train next; returns its number.

        None: they have to end, since the run is closed, has trained and is one too many for the
        slots, everybody stops, or the owner was given up.
        """
        async with self._changed:
            before = self._assigned.get(run)
            many = before is not None and self._free < 0
            if run not in self._owners or many or self._refused(owner):
                return None
            number = before.number + 1 if before else 1
            self._owners[run] = owner
            self._assigned[run] = Assigned(number, spec)
            self._changed.notify_all()
        return number

    async def assignment(self, run: str, last: int, timeout_s: float) -> Assigned | None:
        """What the workers of `run` shall train after the number `last`; None where nothing is
        assigned within `timeout_s`. Workers that start again get what they had, also if it is over.
        """

        def newer() -> bool:
            return run in self._assigned and self._assigned[run].number > last

        async with self._changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(newer), timeout_s)
            return self._assigned[run] if newer() else None

    async def passes_on(self, run: str, number: int, status: str, rank: int) -> bool:
        """Called by each worker when a run has ended: whether they may train another one. It is
        over when rank 0 asks, which has left the result.
        """
        assigned = self._assigned.get(run)
        if assigned is None or assigned.number != number:
            return False
        pruned = status == "interrupted" and assigned.pruned
        may = status in ("completed", "early_stopped") or pruned
        assigned.over = may and (assigned.over or rank == 0)
        return may

    async def prune(self, run: str) -> Group:
        """Note that what `run` trains shall leave without a checkpoint; returns whom to ask."""
        if run in self._assigned:
            self._assigned[run].pruned = True
        return self._groups.get(run, Group())

    async def close(self, run: str) -> None:
        """Free the slot of `run`; its workers are gone, or could not be ended."""
        self._groups.pop(run, None)
        self._assigned.pop(run, None)
        self._ending.discard(run)
        async with self._changed:
            if self._owners.pop(run, None) is not None:
                self._free += 1
                self._changed.notify_all()

    async def give_up(self, owner: str) -> list[str]:
        """Drop the runs of `owner`, whose process died; returns them, for the caller to end.

        With them those without anything to train: the process may have died before it gave a spec
        to workers that it held.
        """
        async with self._changed:
            self._gone.add(owner)
            self._changed.notify_all()
        return [run for run, its in self._owners.items() if its == owner or self._is_idle(run)]

    def _is_idle(self, run: str) -> bool:
        return run in self._assigned and self._assigned[run].over

    async def register(
        self, run: str, controller: Any, group: PlacementGroup | None, workers: list[Any]
    ) -> None:
        """Called by the controller of `run`: at its start, and when it has started workers.

        One that comes after `close` is listed among `open_runs` again, without a slot.
        """
        held = self._groups.setdefault(run, Group())
        held.controller = controller
        if group is not None:
            held.placement_groups.append(group)
            held.workers = workers

    async def group(self, run: str) -> Group:
        """What `run` holds on the cluster."""
        return self._groups.get(run, Group())

    async def open_runs(self) -> list[str]:
        """The runs that may still hold workers."""
        return list(self._groups)

    async def busy_runs(self) -> list[str]:
        """Those of them that train, or may."""
        return [run for run in self._groups if not self._is_idle(run)]

    async def end(self, run: str) -> Group:
        """Note that `run` shall save and end; returns the workers to ask."""
        self._ending.add(run)
        return self._groups.get(run, Group())

    async def is_ending(self, run: str) -> bool:
        """Whether `run` was asked to end. An interrupted run that was not asked starts again."""
        return run in self._ending


def start_registry(slots: int) -> Any:
    """See `start_beside_driver`."""
    return start_beside_driver(Registry, slots)


def start_beside_driver(kind: type, *arguments: Any) -> Any:
    """An actor of 0 CPU on this node: it lives exactly as long as the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(kind)
    return actor.remote(*arguments)
