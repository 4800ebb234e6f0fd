"""A worker of an engine: it trains the trials in its slots until no more trials will come."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raytune_ft.config.load import choose_strategy
from raytune_ft.errors import InputError
from raytune_ft.imports import uncollected
from raytune_ft.ray_backend.metrics import RunGauges
from raytune_ft.ray_backend.slot_queue import Command, Enter, Finish, Leave
from raytune_ft.ray_backend.worker import host_of, prepare_process
from raytune_ft.records import EvalMetrics, StepMetrics, plain_of
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import Several
from raytune_ft.train.result import end_run, failed_result
from raytune_ft.train.watchdog import watched

if TYPE_CHECKING:
    from raytune_ft.packed.engine import PackedEngine
    from raytune_ft.strategy import Strategy

IDLE_S = 1.0
"""How long an engine without trials waits for a command before it loops."""


def engine_worker(payload: dict[str, Any]) -> str:
    """The function of each worker of an engine; see `train_worker`."""
    spec: RunSpec = payload["spec"]
    prepare_process(spec.config)
    with uncollected():
        from raytune_ft.data.prepared import open_prepared
        from raytune_ft.packed.engine import PackedEngine, Passes
        from raytune_ft.strategy import build_strategy
        from raytune_ft.train.budget import lowered, lowered_slots, lowers
        from raytune_ft.train.setup import build_voice, extent_of

    parallel = spec.config.parallel
    name = choose_strategy(spec.config)[0]
    train = spec.config.train
    strategy = build_strategy(name, parallel, train.precision, train.deterministic)
    data = open_prepared(spec.data_dir)
    host = host_of(payload["run"], payload["registry"])
    client = _Client(payload["queue"], spec.run_dir.name, strategy)
    before = client.slots_before()
    slots = lowered_slots(payload["slots"] if before is None else before, spec.run_dir)
    config = lowered(spec.config, spec.run_dir)
    policy = config.parallel.activation_checkpointing
    with build_voice(config, data, strategy) as voice:
        passes = Passes(config, data, slots, payload["rank"], strategy, host.heart.beat, voice)
        largest, longest = passes.runner.micro_tokens, extent_of(config, data)[1]
        shrinking = partial(lowers, spec.run_dir, largest, longest, policy)
        engine = PackedEngine(passes, host.heart)
        with watched(host.heart, strategy.rank, parallel.hang_timeout_s, host.on_hang):
            work = _Work(engine, client)
            if before is None:
                with shrinking(passes.slots):
                    why = passes.settle(payload["memory"], payload["measured"])
                if strategy.rank == 0:
                    payload["registry"].post.remote(payload["run"], {"note": why})
            for held in client.begin(passes.slots):
                work.enter(held)
            interrupted = False
            while not (work.finished or interrupted):
                host.heart.enter("waiting for trials" if not work.specs else "between passes")
                interrupted = client.any_rank(host.should_stop())
                if interrupted:
                    work.interrupt()
                    continue
                for command in client.commands(wait=not work.specs):
                    work.do(command)
                if work.specs:
                    with shrinking(passes.slots):
                        work.advance()
            # Not after an exception: `close` waits for the other ranks, which may never arrive.
            engine.close()
    return "interrupted" if interrupted else "completed"


class _Client:
    """Calls to the queue. Rank 0 makes them and all ranks get the answers."""

    def __init__(self, queue: Any, name: str, strategy: Strategy) -> None:
        self._queue, self._name, self._strategy = queue, name, strategy
        self._asked: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self._strategy.rank == 0

    def slots_before(self) -> int | None:
        """Slots of the lost engine of this name, whose trials continue here; None without one."""
        found: int | None = None
        if self._strategy.rank == 0:
            found = ray.get(self._queue.slots_of.remote(self._name))
        return self._strategy.from_rank0(found)

    def begin(self, slots: int) -> list[RunSpec]:
        """Announce the engine; returns the trials of a lost engine of this name."""
        held: list[RunSpec] = []
        if self._strategy.rank == 0:
            held = ray.get(self._queue.begin.remote(self._name, slots))
        return self._strategy.from_rank0(held)

    def any_rank(self, vote: bool) -> bool:
        """Whether `vote` is true on any rank."""
        import torch

        votes = torch.tensor([float(vote)], device=self._strategy.device)
        return self._strategy.sum(votes).item() > 0

    def commands(self, wait: bool) -> list[Command]:
        """New commands; with `wait`, waits up to `IDLE_S` for them."""
        found: list[Command] = []
        if self._strategy.rank == 0:
            self._asked = self._asked or self._queue.commands.remote(self._name, 60.0)
            ready, _ = ray.wait([self._asked], timeout=IDLE_S if wait else 0)
            if ready:
                found, self._asked = ray.get(self._asked), None
        return self._strategy.from_rank0(found)

    def post(self, run: str, event: dict[str, Any]) -> None:
        """Send a message to a trial."""
        if self._strategy.rank == 0:
            self._queue.post.remote(run, event)

    def refuse(self, spec: RunSpec, error: InputError) -> None:
        """Fail a trial that cannot be trained, and free its slot."""
        if self._strategy.rank == 0:
            end_run(spec, failed_result(spec, error))
        self.post(spec.run_dir.name, {"ended": error})
        self.gone(spec.run_dir.name)

    def gone(self, run: str) -> None:
        """Free the slot of a trial."""
        if self._strategy.rank == 0:
            ray.get(self._queue.gone.remote(run))


class _Work:
    """Applies commands to the engine and keeps the specs of its trials."""

    def __init__(self, engine: PackedEngine, client: _Client) -> None:
        self._engine, self._client = engine, client
        self.specs: dict[Path, RunSpec] = {}
        self.finished = False

    def do(self, command: Command) -> None:
        match command:
            case Enter(spec):
                self.enter(spec)
            case Leave(run, status):
                path = next((path for path in self.specs if path.name == run), None)
                if path is not None:  # None: it has ended already
                    self._engine.leave(path, status)
                    self._forget(path)
            case Finish():
                self.finished = True

    def enter(self, spec: RunSpec) -> None:
        """Let a trial in. One that cannot be trained fails alone."""
        run = spec.run_dir.name
        reporter = _ToTrial(partial(self._client.post, run))
        gauges = [RunGauges(spec.run_dir)] if self._client.first else []
        try:
            self._engine.enter(spec, Several([reporter, *gauges]))
        except InputError as error:
            self._client.refuse(spec, error)
        else:
            self.specs[spec.run_dir] = spec

    def advance(self) -> None:
        for path in self._engine.advance():
            self._client.post(path.name, {"ended": None})
            self._forget(path)

    def interrupt(self) -> None:
        """Save every trial. They stay assigned to this engine, which will be restarted."""
        for path in list(self.specs):
            self._engine.leave(path, "interrupted")

    def _forget(self, path: Path) -> None:
        del self.specs[path]
        self._client.gone(path.name)


class _ToTrial:
    """The `Reporter` of one slot: evaluations go to the trial's process, and from it to Tune."""

    def __init__(self, post: Callable[[dict[str, Any]], None]) -> None:
        self._post = post

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        self._post({"report": {**plain_of(metrics), "checkpoint": checkpoint}})
