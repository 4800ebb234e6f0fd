"""A trial of a sweep: where it trains, its run, and the process that Ray Tune drives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import RayError
from ray.tune import PlacementGroupFactory, Trainable

from raytune_ft.config.execution import Arrangement
from raytune_ft.config.load import choose_strategy, expand_env
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.errors import RaytuneFtError, RunFailed, first_line
from raytune_ft.estimate.hardware import PROCESS
from raytune_ft.layout import ENGINES, RESULT, TRIALS
from raytune_ft.ray_backend.cluster import cluster_worker_memory, set_train_defaults, stop_grace_s
from raytune_ft.ray_backend.registry import (
    Ended,
    Note,
    Report,
    RunHandle,
    StopRequested,
    start_registry,
)
from raytune_ft.ray_backend.slot_queue import SlotHandle, start_slot_queue
from raytune_ft.records import RunResult, Tell, plain_of
from raytune_ft.rundir import Layout, RunSpec
from raytune_ft.search.results import apply_params
from raytune_ft.train.result import end_run, left_by_workers

if TYPE_CHECKING:
    from raytune_ft.ray_backend.run_handle import TrialHandle


class Execution(Protocol):
    """Where trials train: in worker groups of their own, or in slots of engines.

    The driver and the process of every trial have it.
    """

    def handle(self, spec: RunSpec) -> RunHandle:
        """A handle of the trial's run, which is not started yet."""

    def release(self, handle: RunHandle | None, again: bool) -> None:
        """End the run of a handle. `again`: this process has another trial next, which may take
        over its workers; else nothing is kept.
        """

    def is_stopping(self) -> bool:
        """Whether the sweep stops."""

    def stop_all(self) -> None:
        """Ask every trial to save and to leave."""

    def open_runs(self) -> list[str]:
        """Runs that still hold workers or slots."""

    def give_up(self, trial: str) -> None:
        """End the run of a trial whose process died.

        Raises:
            RunFailed: some of it is not gone yet.
        """


@dataclass
class _Actor:
    """Calls that both actors of the driver, `Registry` and `SlotQueue`, answer."""

    actor: Any

    def is_stopping(self) -> bool:
        return bool(ray.get(self.actor.is_stopping.remote()))

    def stop_all(self) -> None:
        ray.get(self.actor.stop_all.remote())

    def open_runs(self) -> list[str]:
        return list(ray.get(self.actor.open_runs.remote()))


class IsolatedExecution(_Actor):
    """A worker group for each trial, which trains the next one of the same process too; the actor
    is a `Registry`.
    """

    def __init__(self, actor: Any) -> None:
        super().__init__(actor)
        self._kept: TrialHandle | None = None

    def handle(self, spec: RunSpec) -> RunHandle:
        from raytune_ft.ray_backend.run_handle import GroupHandle, TrialHandle
        from raytune_ft.ray_backend.worker import train_worker

        kept, self._kept = self._kept, None
        if kept is not None:
            if kept.take(spec):
                return kept
            kept.stop()
        if STRATEGIES[choose_strategy(spec.config)[0]].one_run:
            return GroupHandle(spec, self.actor, train_worker)
        return TrialHandle(spec, self.actor)

    def release(self, handle: RunHandle | None, again: bool) -> None:
        from raytune_ft.ray_backend.run_handle import TrialHandle

        if again and isinstance(handle, TrialHandle) and handle.leave():
            self._kept = handle
        elif handle is not None:
            handle.stop()
        if not again and self._kept is not None:
            self._kept.stop()
            self._kept = None

    def open_runs(self) -> list[str]:
        """Those that train, and not workers that wait for a trial."""
        return list(ray.get(self.actor.busy_runs.remote()))

    def held(self) -> list[str]:
        """Runs with workers, whether they train or not."""
        return super().open_runs()

    def give_up(self, trial: str) -> None:
        from raytune_ft.ray_backend.worker_group import end_groups_of

        end_groups_of(trial, self.actor)

    def close(self, note: Tell) -> None:
        """End every run that is left on the cluster, and the actor."""
        from raytune_ft.ray_backend.worker_group import end_group

        with suppress(RayError):
            for run in self.held():
                try:
                    end_group(run, self.actor)
                except RunFailed as error:
                    note(f"{run}: {error}")
            ray.kill(self.actor)


class PackedExecution(_Actor):
    """A slot of an engine for each trial; the actor is a `SlotQueue`."""

    def handle(self, spec: RunSpec) -> RunHandle:
        return SlotHandle(spec, self.actor)

    def release(self, handle: RunHandle | None, again: bool) -> None:
        if handle is not None:
            handle.stop()

    def give_up(self, trial: str) -> None:
        ray.get(self.actor.give_up.remote(trial))


class Places(Protocol):
    """The worker groups of a sweep, as the driver sees them: as many as fit, or as are of use."""

    @property
    def execution(self) -> Execution:
        """What trials are given."""

    @property
    def trials_each(self) -> int:
        """At a time, in each worker group."""

    def keep(self, count: int, room: int) -> None:
        """Have `count` worker groups, where the cluster has room for `room`. A group with a trial
        is not ended, unless it is without workers and there is no room for it any more.
        """

    def held(self) -> int:
        """How many there are, those that start and restart included."""

    def close(self) -> None:
        """End all of them."""


class Groups:
    """Worker groups of isolated trials, which start them themselves."""

    trials_each = 1

    def __init__(self, tell: Tell) -> None:
        self.execution, self._tell = IsolatedExecution(start_registry(0)), tell

    def keep(self, count: int, room: int) -> None:
        ray.get(self.execution.actor.resize.remote(count))

    def held(self) -> int:
        return len(self.execution.held())

    def close(self) -> None:
        """End all of them."""
        self.execution.close(self._tell)


class Engines:
    """Engines, each a worker group with slots for trials.

    When a worker is lost, the group is restarted, and its trials continue from their last
    checkpoints; where there is no room for it any more, they continue in other engines.
    """

    def __init__(
        self, config: Config, sweep_dir: Path, data_dir: Path, arrangement: Arrangement, tell: Tell
    ) -> None:
        self._config = config.model_copy(update={"method": arrangement.method})
        self._sweep_dir, self._data_dir = sweep_dir, data_dir
        self._arrangement, self._tell = arrangement, tell
        self._queue, self._registry = start_slot_queue(), start_registry(MANY)
        self.execution, self.trials_each = PackedExecution(self._queue), arrangement.slots
        self._engines: list[_Engine] = []

    def keep(self, count: int, room: int) -> None:
        """One that failed is not replaced."""
        for _ in range(count - self.held()):
            spec = _engine_spec(self._config, self._sweep_dir, self._data_dir, len(self._engines))
            engine = _Engine(spec, self._queue, self._registry, self._arrangement)
            self._engines.append(engine)
            engine.start(self._tell)
        if self.held() > count:
            idle = ray.get(self._queue.retire_idle.remote(self.held() - count))
            for engine in self._engines:
                engine.retired |= engine.name in idle
        down = [engine for engine in self._engines if not engine.retired and engine.is_down]
        for engine in down[: max(0, self.held() - room)]:
            self._tell(f"{engine.name}: there is no room for it any more; its trials move on")
            engine.retired = True
            ray.get(self._queue.retire.remote(engine.name))
            engine.stop(grace_s=0.0)

    def held(self) -> int:
        return sum(not engine.retired for engine in self._engines)

    def close(self) -> None:
        """End all of them, and the actors."""
        with suppress(RayError):
            ray.get(self._queue.finish.remote())
        for engine in self._engines:
            engine.stop(stop_grace_s())
        IsolatedExecution(self._registry).close(self._tell)
        with suppress(RayError):
            ray.kill(self._queue)


MANY = 1_000_000
"""Slots of the registry of engines, which are started only where they fit."""
DOWN_S = 10.0
"""A group that is without workers for so long, and for which there is no room, will not restart."""


def _engine_spec(config: Config, sweep_dir: Path, data_dir: Path, number: int) -> RunSpec:
    name = f"engine-{number}"
    run_dir = sweep_dir / ENGINES / name  # for its hang.log
    run_dir.mkdir(parents=True, exist_ok=True)
    own = config.model_copy(update={"name": name, "storage": str(run_dir.parent), "search": None})
    return RunSpec(own, run_dir, data_dir)


def _memory(parallel: ParallelConfig) -> int | None:
    """Bytes for the weights and activations of a worker; None where unknown."""
    usable = cluster_worker_memory(parallel)
    return None if usable is None else usable - PROCESS[parallel.device]


class _Engine:
    """An engine's worker group, and a thread of the driver that receives its messages."""

    def __init__(self, spec: RunSpec, queue: Any, registry: Any, arrangement: Arrangement) -> None:
        from raytune_ft.ray_backend.packed_worker import engine_worker
        from raytune_ft.ray_backend.run_handle import GroupHandle

        self.name, self._queue = spec.run_dir.name, queue
        self.retired = False
        more = {
            "queue": queue,
            "slots": arrangement.slots,
            "rank": arrangement.method.rank,
            "measured": arrangement.measured and arrangement.slots > 1,
            "memory": _memory(spec.config.parallel),
        }
        self._handle = GroupHandle(spec, registry, engine_worker, more)
        self._thread: threading.Thread | None = None

    @property
    def is_down(self) -> bool:
        """Whether it has had no workers for a while."""
        return self._handle.down_s > DOWN_S

    def start(self, tell: Tell) -> None:
        self._handle.start()
        self._thread = threading.Thread(target=self._listen, args=(tell,), daemon=True)
        self._thread.start()

    def _listen(self, tell: Tell) -> None:
        error: RaytuneFtError | None = None
        try:
            while not isinstance(event := self._handle.next(), Ended):
                if isinstance(event, Note):
                    tell(f"{self.name}: {event.text}")
            error = event.error
        except StopRequested:
            pass
        except (RayError, RaytuneFtError) as failure:
            error = RunFailed(first_line(failure))
        with suppress(RayError):
            ray.get(self._queue.engine_ended.remote(self.name, error))

    def stop(self, grace_s: float) -> None:
        """Wait until it has finished its pass, if it was asked to; then end its workers."""
        if self._thread is None:
            return
        self._thread.join(timeout=grace_s)
        with suppress(RunFailed, RayError):
            self._handle.stop()


def driver_place() -> PlacementGroupFactory:
    """Where the process of a trial runs: on this node, so that the loss of another node ends no
    trial. It reserves no CPU, and one byte of memory, because Tune refuses an empty request.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return PlacementGroupFactory([{"CPU": 0, "memory": 1}], bundle_label_selector=[here])


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep share. `config` is resolved; `references` are the values of each
    `${ENV_NAME}` in it, which the environment of another process may lack. `layouts`: by method.
    """

    config: Config
    sweep_dir: Path
    data_dir: Path
    metric: str
    mode: str
    environment: dict[str, str]
    references: dict[str, str] = field(repr=False)
    layouts: Mapping[str, Layout] = field(default_factory=dict)


class TrialRun:
    """The run of one trial in an `Execution`, from its first step to its end."""

    def __init__(
        self,
        spec: RunSpec,
        metrics: Sequence[str],
        execution: Execution,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._metrics, self._execution, self._clock = spec, metrics, execution, clock
        self._handle: RunHandle | None = None
        self._over = False
        self._begun = clock()

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the outcome, as a result for Tune."""
        try:
            if self._handle is None:
                (self._spec.run_dir / RESULT).unlink(missing_ok=True)
                self._handle = self._execution.handle(self._spec)
                self._handle.start()
            while True:
                event = self._handle.next()
                if isinstance(event, Report):
                    return {**plain_of(event.metrics), "wall_s": self._wall_s()}
                if isinstance(event, Ended):
                    return self._outcome(event.error)
        except StopRequested:
            self.end(stopping=True)
            return {"done": True, "interrupted": True}

    def _outcome(self, error: RaytuneFtError | None) -> dict[str, Any]:
        self._over = True
        try:
            result = left_by_workers(self._spec, error)
        except RaytuneFtError as failure:
            line = f"{type(failure).__name__}: {failure}"
            return {"done": True, "outcome": "failed", "error": line, "wall_s": self._wall_s()}
        return {"done": True, **outcome_of(result, self._metrics), "wall_s": self._wall_s()}

    def end(self, stopping: bool = False, again: bool = False) -> None:
        """End the run if it still trains: it is interrupted where the whole sweep stops (known
        here with `stopping`), else pruned. `again`: see `Execution.release`.
        """
        if self._handle is None:
            self._execution.release(None, again)
            return
        stopping = stopping or self._execution.is_stopping()
        if stopping and not self._over:
            # The trial stays unfinished, for the next driver.
            self._over = True
            self._handle.wind_down(stop_grace_s())
        self._execution.release(self._handle, again and not stopping)
        if not self._over:
            end_run(self._spec, "pruned")
        self._handle, self._over = None, True

    def _wall_s(self) -> float:
        return round(self._clock() - self._begun, 3)


class SweepTrial(Trainable):
    """The process of a trial, as Tune drives it; see `TrialRun`.

    It is a class and not a function, because Tune calls `reset_config` before the next trial in
    the same process and `cleanup` after the last one. Both return only when nothing of the trial
    is left on the cluster, however it ended. A function that Tune stops would leave its thread,
    its controller and its workers behind. Each step is one evaluation; training goes on while Tune
    decides about it.
    """

    def setup(self, config: dict[str, Any], shared: Shared, execution: Execution) -> None:
        """`shared` and `execution` come by `tune.with_parameters`."""
        set_train_defaults(shared.environment)
        self._shared, self._execution = shared, execution
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial takes over this process, and the workers where they can train it."""
        self._trial_run.end(again=True)
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._trial_run.end()

    def _begin(self, config: dict[str, Any]) -> None:
        search = self._shared.config.search
        assert search is not None
        spec = spec_of(self._shared, config["trial"], config["params"])
        self._trial_run = TrialRun(spec, search.metrics, self._execution)

    def step(self) -> dict[str, Any]:
        return self._trial_run.step()


def spec_of(shared: Shared, trial: str, params: dict[str, Any]) -> RunSpec:
    """The run of a trial. Raises ConfigError where the values do not go together."""
    trials = shared.sweep_dir / TRIALS
    config = apply_params(shared.config, params, trial, str(trials))
    expanded, forecast = expand_env(config, shared.references), None
    if (layout := shared.layouts.get(config.method.name)) is not None:
        expanded, forecast = layout.of(expanded), layout.forecast
    run_dir = trials / trial
    return RunSpec(expanded, run_dir, shared.data_dir, shared.metric, shared.mode, forecast)


def outcome_of(result: RunResult, metrics: Sequence[str]) -> dict[str, Any]:
    """How a run ended, for the study: its status, and the `metrics` of its best evaluation."""
    best, final = result.best, result.final
    return {
        "outcome": result.status,
        "error": result.error,
        "best_eval_loss": best.eval_loss if best else None,
        "values": [best.value(metric) for metric in metrics] if best else None,
        "examples": final.examples if final else 0,
    }
