"""Where trials that share an engine and the engines that hold their slots meet.

To Ray Tune a trial is an actor that waits for reports and may be stopped; what trains it is one
slot among many of an engine. The queue, an actor of the driver, outlives both: it knows which
trial is in which engine, so that an engine that starts again finds its trials, and a trial whose
process died gives its slot back. This module imports nothing of ray.train.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from raytune_ft.errors import RaytuneFtError, RunFailed
from raytune_ft.ray_backend.registry import (
    Ended,
    Mailbox,
    Mailboxes,
    Note,
    Report,
    StopRequested,
    start_beside_driver,
)
from raytune_ft.rundir import RunSpec

Leaving = Literal["pruned", "interrupted"]
LEAVE_TIMEOUT_S = 10.0
"""How long a stopped trial waits until its engine frees the slot. An engine answers between two
passes, but not while it evaluates or starts again."""


@dataclass(frozen=True)
class Enter:
    """Take a trial into a slot, from its newest checkpoint if it has one."""

    spec: RunSpec


@dataclass(frozen=True)
class Leave:
    """Free a trial's slot; an interrupted trial saves first."""

    run: str
    status: Leaving


@dataclass(frozen=True)
class Finish:
    """End the engine: no more trials will come."""


Command = Enter | Leave | Finish


@dataclass
class _Engine:
    slots: int
    retired: bool = False
    commands: Mailbox = field(default_factory=Mailbox)


@dataclass
class _Trial:
    spec: RunSpec
    engine: str | None
    """None while it waits for another one."""
    leaving: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class SlotQueue(Mailboxes):
    """An asynchronous actor. A trial is known by the name of its run directory."""

    def __init__(self) -> None:
        super().__init__()
        self._engines: dict[str, _Engine] = {}
        self._trials: dict[str, _Trial] = {}
        self._refused: set[str] = set()
        self._moves: set[asyncio.Task[None]] = set()
        self._finished = False
        self._failure: RaytuneFtError | None = None

    # Called by trials.

    async def enter(self, run: str, spec: RunSpec) -> bool:
        """Wait for a free slot and ask its engine to let the trial in.

        False: there will be none. Where that is because the last engine failed, its error is the
        trial's first message.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed(run) or self._free() is not None)
            if self._stopping or run in self._refused:
                return False
            trial = self._trials[run] = _Trial(spec, self._free())
            self._boxes[run] = Mailbox()
            self._let_in(run, trial)
            return True

    def _closed(self, run: str) -> bool:
        return self._stopping or run in self._refused or self._failure is not None

    def _free(self) -> str | None:
        """The engine with the most free slots."""
        used = Counter(t.engine for t in self._trials.values() if not t.gone.is_set())
        free = {
            name: engine.slots - used[name]
            for name, engine in self._engines.items()
            if not engine.retired
        }
        best = max(free, key=lambda name: free[name], default=None)
        return best if best is not None and free[best] > 0 else None

    async def leave(self, run: str, status: Leaving, timeout_s: float) -> bool:
        """Ask the engine to free a trial's slot; whether it did so within `timeout_s`."""
        trial = self._trials.get(run)
        if trial is None:
            return True
        if not trial.gone.is_set():
            trial.leaving = True
            if trial.engine is None:
                trial.gone.set()
                return True
            self._engines[trial.engine].commands.put(Leave(run, status))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(trial.gone.wait(), timeout_s)
        return trial.gone.is_set()

    # Called by engines.

    async def slots_of(self, engine: str) -> int | None:
        """The number of slots that an engine had before it was lost; None for a new engine."""
        known = self._engines.get(engine)
        return known.slots if known else None

    async def begin(self, engine: str, slots: int) -> list[RunSpec]:
        """Register an engine, also one that was lost and is back; returns the trials that it holds.

        One that was to leave when the engine was lost has left. Those for which an engine that came
        back has no slot any more go on in the next that is free.
        """
        async with self._changed:
            retired = engine in self._engines and self._engines[engine].retired
            known = self._engines[engine] = _Engine(slots, retired)
            if self._finished or retired:
                known.commands.put(Finish())
            held = [t for t in self._trials.values() if t.engine == engine and not t.gone.is_set()]
            for trial in held:
                if trial.leaving:
                    trial.gone.set()
            staying = [trial for trial in held if not trial.leaving]
            for trial in staying[slots:]:
                self._hand_over(trial)
            self._changed.notify_all()
        return [trial.spec for trial in staying[:slots]]

    def _hand_over(self, trial: _Trial) -> None:
        """Let a trial go on in the next slot that is free."""
        trial.engine = None
        task = asyncio.create_task(self._move(trial.spec.run_dir.name, trial))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def commands(self, engine: str, timeout_s: float) -> list[Command]:
        """The commands for an engine, waiting for the first."""
        return await self._engines[engine].commands.take(timeout_s)

    async def gone(self, run: str) -> None:
        """Free the slot of a trial, whose files are all written."""
        async with self._changed:
            self._trials[run].gone.set()
            self._changed.notify_all()

    # Called by the driver.

    async def engine_ended(self, engine: str, error: RaytuneFtError | None) -> None:
        """Drop an engine that will not come back: its trials end with its error."""
        async with self._changed:
            known = self._engines.pop(engine, None)
            if known is not None and known.retired:
                return
            if all(other.retired for other in self._engines.values()):
                self._failure = error or RunFailed("the engine of the trials has ended")
            for run, trial in self._trials.items():
                if trial.engine == engine and not trial.gone.is_set():
                    self._boxes[run].put({"ended": error})
                    trial.gone.set()
            self._changed.notify_all()

    async def retire_idle(self, most: int) -> list[str]:
        """End up to `most` engines without trials; returns them."""
        async with self._changed:
            busy = {trial.engine for trial in self._trials.values() if not trial.gone.is_set()}
            able = [name for name, engine in self._engines.items() if not engine.retired]
            idle = [name for name in able if name not in busy][:most]
            for name in idle:
                self._engines[name].retired = True
                self._engines[name].commands.put(Finish())
        return idle

    async def retire(self, engine: str) -> None:
        """Drop an engine whose node is gone; its trials continue in others, once slots are free."""
        async with self._changed:
            self._engines.setdefault(engine, _Engine(0)).retired = True
            for trial in self._trials.values():
                if trial.engine == engine and trial.leaving:
                    trial.gone.set()
                elif trial.engine == engine and not trial.gone.is_set():
                    self._hand_over(trial)

    async def _move(self, run: str, trial: _Trial) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed(run) or self._free() is not None)
            if trial.gone.is_set():
                return
            trial.engine = None if self._closed(run) or trial.leaving else self._free()
            self._let_in(run, trial)

    def _let_in(self, run: str, trial: _Trial) -> None:
        """Ask its engine to take the trial; one that has none has ended."""
        if trial.engine is None:
            self._boxes[run].put({"ended": self._failure})
            trial.gone.set()
        else:
            self._engines[trial.engine].commands.put(Enter(trial.spec))

    async def give_up(self, run: str) -> None:
        """Drop a trial whose process died: it leaves its slot, or its place in the queue."""
        async with self._changed:
            self._refused.add(run)
            self._changed.notify_all()
        await self.leave(run, "pruned", LEAVE_TIMEOUT_S)

    async def open_runs(self) -> list[str]:
        """The trials that hold a slot."""
        return [run for run, trial in self._trials.items() if not trial.gone.is_set()]

    async def finish(self) -> None:
        """End all engines."""
        self._finished = True
        for engine in self._engines.values():
            engine.commands.put(Finish())


def start_slot_queue() -> Any:
    return start_beside_driver(SlotQueue)


class SlotHandle:
    """A run in a slot of an engine; see `RunHandle`."""

    def __init__(self, spec: RunSpec, queue: Any) -> None:
        self._spec, self._queue = spec, queue
        self._run = spec.run_dir.name
        self._pending: list[Report | Note | Ended] = []

    def start(self) -> None:
        if not ray.get(self._queue.enter.remote(self._run, self._spec)):
            raise StopRequested

    def next(self, timeout_s: float = 1.0) -> Report | Note | Ended | None:
        if not self._pending:
            events, stopping = ray.get(self._queue.take.remote(self._run, timeout_s))
            if stopping:
                raise StopRequested
            self._pending = [_message_of(event) for event in events]
        return self._pending.pop(0) if self._pending else None

    def wind_down(self, grace_s: float) -> None:
        ray.get(self._queue.leave.remote(self._run, "interrupted", grace_s))

    def stop(self) -> None:
        """End the run. A busy engine frees the slot later."""
        ray.get(self._queue.leave.remote(self._run, "pruned", LEAVE_TIMEOUT_S))


def _message_of(event: dict[str, Any]) -> Report | Ended:
    return Report.of(event["report"]) if "report" in event else Ended(event["ended"])
