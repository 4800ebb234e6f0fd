"""Functions that load a model, called in worker groups: nothing heavy runs in a cluster's driver.

A call is a run without steps. Its worker group reserves what training would, is registered, ended
and started again as every other, and its one result comes back as a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from safetensors import SafetensorError

from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import Config
from raytune_ft.config.strategies import ALONE, SHARDED, STRATEGIES
from raytune_ft.data.processes import Made
from raytune_ft.data.tokenise import Work
from raytune_ft.errors import RaytuneFtError, RunFailed
from raytune_ft.evaluate.workers import Measure
from raytune_ft.ray_backend.capacity import room
from raytune_ft.ray_backend.cluster import connected
from raytune_ft.ray_backend.environment import check_environment
from raytune_ft.ray_backend.registry import Ended, Note, Value, start_registry
from raytune_ft.ray_backend.run_handle import GroupHandle
from raytune_ft.ray_backend.tokenise import in_tasks
from raytune_ft.ray_backend.worker import prepare_process
from raytune_ft.records import Tell
from raytune_ft.rundir import RunSpec

if TYPE_CHECKING:
    from raytune_ft.strategy import Strategy

T = TypeVar("T")
A = TypeVar("A")
OURS = (RaytuneFtError, OSError, SafetensorError)
"""What a function may raise on its own: the caller gets it as it is, and nothing is tried again."""


@dataclass(frozen=True)
class WorkerGroups:
    """The `Workers` of a cluster, for a run with this config; `folder` is for a `hang.log`."""

    config: Config
    folder: Path
    tell: Tell

    def alone(
        self,
        function: Callable[..., T],
        *arguments: Any,
        tell: Tell,
        measure: Measure[Any, Any] | None = None,
    ) -> T:
        config = _with_one_worker(self.config) if measure is None else measured_by(self.config)
        found: T = self._call(config, [_Alone(function, arguments, measure)], tell)[0]
        return found

    def each(self, measure: Measure[A, T], arguments: Sequence[A]) -> list[T]:
        calls = [_Together(measure, argument) for argument in arguments]
        return self._call(measured_by(self.config), calls, self.tell)

    def tokenise(self, work: Work, numbers: Sequence[int], tell: Tell) -> Made:
        """In tasks, see `in_tasks`."""
        with connected():
            yield from in_tasks(work, numbers, tell)

    def _call(self, config: Config, calls: Sequence[Any], tell: Tell) -> list[Any]:
        """As many at a time as fit. If one fails, the others are ended."""
        with connected(), room(config.parallel, tell, len(calls)) as fit:
            check_environment(config, tell)
            at_once = min(fit, len(calls))
            registry = start_registry(at_once)
            spec = RunSpec(config, self.folder, self.folder)
            listen = partial(_listen, spec, registry, tell)
            with ThreadPoolExecutor(at_once, thread_name_prefix="call") as pool:
                made = [pool.submit(listen, call) for call in calls]
                try:
                    for first in wait(made, return_when=FIRST_EXCEPTION).done:
                        first.result()
                    return [one.result() for one in made]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    ray.get(registry.stop_all.remote())
                    raise


def _listen(spec: RunSpec, registry: Any, tell: Tell, call: Any) -> Any:
    """Start a worker group for one call, pass on what it tells, and end it. Its result."""
    packed = _Packed(ray.cloudpickle.dumps(call))
    handle = GroupHandle(spec, registry, call_worker, {"call": packed}, "computing")
    found: Value | None = None
    try:
        handle.start()
        while not isinstance(event := handle.next(), Ended):
            if isinstance(event, Note):
                tell(event.text)
            elif isinstance(event, Value):
                found = event
    finally:
        handle.stop()
    if found is None:
        raise event.error or RunFailed("the workers ended without a result")
    value, error = ray.cloudpickle.loads(found.pickled)
    if error is not None:
        raise error
    return value


def measured_by(config: Config) -> Config:
    """The layout in which a model of this run is measured: on one worker, or, where the run shards
    it because one cannot hold it, on all of them.

    FSDP stands for every strategy that shards: a measurement has no gradients and no moments, in
    which they differ.
    """
    parallel = config.parallel
    if parallel.max_workers == 1 or not STRATEGIES[choose_strategy(config)[0]].shards:
        return _with_one_worker(config)
    offload = "all" if parallel.offload == "all" else "none"
    return _laid_out(config, strategy=SHARDED, offload=offload)


def _with_one_worker(config: Config) -> Config:
    return _laid_out(config, strategy=ALONE, workers=1, replicas=1, offload="none")


def _laid_out(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


@dataclass(frozen=True, repr=False)  # Ray keeps the text, as of a RunSpec
class _Packed:
    """A call, pickled so that the controller does not load what only workers need."""

    pickled: bytes


@dataclass(frozen=True)
class _Alone:
    """A call of `Workers.alone`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    measure: Measure[Any, Any] | None

    def __call__(self, strategy: Strategy, tell: Tell) -> Any:
        """Rank 0 calls the function; the others measure what it asks them to, until it is over."""
        measure = self.measure
        if measure is None:
            return self.function(*self.arguments, tell=tell)
        if strategy.rank > 0:
            while asked := strategy.from_rank0(()):
                measure(*asked, strategy)
            return None

        def ask(argument: Any) -> Any:
            return measure(*strategy.from_rank0((argument,)), strategy)

        try:
            return self.function(*self.arguments, tell=tell, measure=ask)
        finally:
            strategy.from_rank0(())


@dataclass(frozen=True)
class _Together:
    """A call of `Workers.each`."""

    measure: Measure[Any, Any]
    argument: Any

    def __call__(self, strategy: Strategy, tell: Tell) -> Any:
        return self.measure(self.argument, strategy)


def call_worker(payload: dict[str, Any]) -> str:
    """The function of each worker: make the call, and send what came of it."""
    config = payload["spec"].config
    prepare_process(config)

    from raytune_ft.strategy import build_strategy

    strategy = build_strategy(choose_strategy(config)[0], config.parallel, "float32")
    post = partial(payload["registry"].post.remote, payload["run"])

    def tell(line: str) -> None:
        if strategy.rank == 0:
            post({"note": line})

    value, failure = None, None
    try:
        value = ray.cloudpickle.loads(payload["call"].pickled)(strategy, tell)
    except OURS as error:
        if strategy.world_size > 1:
            raise  # it may come from a lost peer; the controller knows
        failure = error
    if strategy.rank == 0:
        # Pickled, so that the registry's process does not import what the value needs.
        ray.get(post({"value": Value(ray.cloudpickle.dumps((value, failure)))}))
    return "completed"
