"""The worker group of a run: its controller, its size, how it is ended, and why one failed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import (
    ControllerCallback,
    ReportCallback,
    WorkerGroupCallback,
)
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ScalingPolicy,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError
from ray.train.v2.api.preemption import PreemptionInfo
from ray.util.placement_group import placement_group_table, remove_placement_group

from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.config.strategies import STRATEGIES
from raytune_ft.errors import (
    OutOfMemory,
    PassTooLarge,
    RaytuneFtError,
    RunFailed,
    is_out_of_memory,
)
from raytune_ft.model.hub import trained_models
from raytune_ft.ray_backend.cluster import most_workers, ray_storage
from raytune_ft.ray_backend.fetch import fetch_for_group
from raytune_ft.ray_backend.placement import for_ray, matches, staying_nodes
from raytune_ft.ray_backend.registry import Group
from raytune_ft.ray_backend.worker import ProcessGroupConfig, ask_to_stop, heed_sigterm
from raytune_ft.rundir import RunSpec
from raytune_ft.train.watchdog import AUTO_S

START_FAILURES = 10
"""Starts in a row that may fail, for example because a node is gone: about ten minutes."""
GROW_AFTER_S = 60.0
"""How often an elastic run looks for more workers."""
ELASTIC_START_TIMEOUT_S = "20"
"""How long an elastic run waits for workers before it asks for one less; Ray waits 60 s."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class _LeanTrainer(DataParallelTrainer):
    """Ray's trainer without two helper processes per run, which take 1.5 s of CPU time each.

    Ray Data is not used. The placement group cleaner finds its cluster by the State API, which
    fails where a machine runs two clusters; the registry does its work.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()
        return [callback for callback in every if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(
            **{
                **arguments,
                "scaling_policy": scaling_policy(self.scaling_config),
                "failure_policy": StartsInARow(self.run_config.failure_config),
            }
        )


Worker = Callable[[dict[str, Any]], str]


def train_group(
    spec: RunSpec, name: str, registry: Any, worker: Worker, more: dict[str, Any]
) -> None:
    """Train `spec` as Ray's run `name`; return when its last worker group is gone.

    Each worker calls `worker` with the run, its name, the registry and `more`.

    Raises:
        TrainingFailedError: groups failed more often than `parallel.max_failures`.
    """
    parallel = spec.config.parallel
    size: int | tuple[int, int] = parallel.max_workers
    if parallel.elastic:
        size = parallel.min_workers, parallel.max_workers
        os.environ.setdefault(START_TIMEOUT, ELASTIC_START_TIMEOUT_S)
    resources = {key: amount for key, amount in parallel.resources.items() if amount}
    gpu = parallel.device == "cuda"
    with ray_storage() as storage:
        _LeanTrainer(
            worker,
            train_loop_config={"spec": spec, "run": name, "registry": registry, **more},
            backend_config=_process_group(spec.config),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=gpu,
                resources_per_worker=resources,
                accelerator_type=parallel.accelerator,
                label_selector=for_ray(parallel.label_selector),
                placement_strategy=parallel.placement,
                elastic_resize_monitor_interval_s=GROW_AFTER_S,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(
                    max_failures=parallel.max_failures,
                    controller_failure_limit=START_FAILURES,
                ),
                callbacks=[RunWatch(name, registry, trained_models(spec.config))],
            ),
        ).fit()


def _process_group(config: Config) -> BackendConfig:
    """None for a strategy of one process; every other needs a group, also for one worker."""
    if STRATEGIES[choose_strategy(config)[0]].one_process:
        return BackendConfig()
    # Longer than the watchdog's time-out, so that a hang is reported before a collective fails.
    written = config.parallel.hang_timeout_s
    timeout_s = max(1800, int(2 * (AUTO_S if written == "auto" else written)))
    return ProcessGroupConfig(config.parallel.resources["GPU"], timeout_s)


WAIT_S = 600.0
"""How long an elastic run waits for its fewest workers before it fails.

It is longer than the 180 s for which Ray keeps the resources of a killed driver reserved."""
LOOK_EVERY_S = 0.5
VIEW_TIMEOUT_S = 5.0
"""For Ray's view of the reserved resources."""


NodesOf = Callable[[bool], dict[str, dict[str, float]]]


def node_resources(selector: Mapping[str, str], free: bool) -> dict[str, dict[str, float]]:
    """Resources by id of the nodes with these labels that stay: all, or what is `free`."""
    state = ray._private.state.state
    totals = state.available_resources_per_node() if free else state.total_resources_per_node()
    suitable = {node.id for node in staying_nodes() if matches(node.labels, selector)}
    return {node: dict(own) for node, own in totals.items() if node in suitable}


def scaling_policy(config: ScalingConfig) -> ScalingPolicy:
    """`Fixed` for a number of workers, `Elastic` for a range."""
    if not config.elasticity_enabled:
        return Fixed(config)
    return Elastic(config, partial(node_resources, config.label_selector or {}))


class Fixed(FixedScalingPolicy):
    """Ray's own, but it asks no autoscaler: the driver does, for all of its groups together."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray's own would ask for this group."""

    def _maybe_send_resource_request(self) -> None:
        """Ray's own would renew it."""


class Elastic(ElasticScalingPolicy):
    """As many workers as can start now; one less after each start that timed out.

    A group that can grow, or whose node is drained, is asked to save and to leave, which loses
    nothing, and starts again.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        nodes: NodesOf,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(scaling_config)
        self._nodes, self._clock, self._sleep = nodes, clock, sleep
        self._asked: int | None = None
        self._lacking_since: float | None = None
        self._looked = 0.0

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start with the workers that fit now, or wait.

        Raises:
            WorkerGroupStartupTimeoutError: fewer than the minimum for `WAIT_S`; the run ends.
        """
        self._maybe_send_resource_request()
        possible = self._possible()
        if self._asked is not None:
            possible = min(possible, max(self.scaling_config.min_workers, self._asked - 1))
        if possible >= self.scaling_config.min_workers:
            self._asked, self._lacking_since = possible, None
            return self._get_resize_decision(possible)
        now = self._clock()
        self._asked = None
        if self._lacking_since is None:
            self._lacking_since = now
        if now - self._lacking_since > WAIT_S:
            raise WorkerGroupStartupTimeoutError(self.scaling_config.min_workers)
        self._sleep(LOOK_EVERY_S)  # the controller asks again at once
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Ask workers to leave where more would fit; never a resize, which would kill them."""
        self._maybe_send_resource_request()
        self._asked, now = None, self._clock()
        since = max(worker_group_state.start_time, self._looked)
        if now - since < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._looked = now
        size = worker_group_state.num_workers
        more = self.scaling_config.max_workers > size and self._fitting(self._nodes(True)) > 0
        # While a node drains, a free place elsewhere only replaces the one that will be lost.
        if more and self._possible() > size:
            for worker in worker_group_state.workers:
                worker.actor.execute.remote(ask_to_stop)
        return NoopDecision()

    def _possible(self) -> int:
        """Workers that fit, by Ray's current view, without what other runs have reserved."""
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(
                    self._requester_id, recompute=True
                ),
                timeout=VIEW_TIMEOUT_S,
            )
        except RayError:
            return 0  # the controller asks again
        staying = self._nodes(False)
        return self._fitting({node: its for node, its in reserved.items() if node in staying})

    def _fitting(self, nodes: dict[str, dict[str, float]]) -> int:
        need = self.scaling_config._resources_per_worker_not_none
        fits = most_workers(list(nodes.values()), need, self.scaling_config.placement_strategy)
        return min(fits, self.scaling_config.max_workers)


ABORT_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 30.0


class RunWatch(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Runs in the controller of `run`: registers the group, forwards reports and errors."""

    def __init__(self, run: str, registry: Any, models: Sequence[ModelConfig]) -> None:
        self._run, self._registry = run, registry
        self._models: dict[ModelConfig, str | None] = dict.fromkeys(models)
        """And the commits that the first group of this run loaded."""
        self._fatal: RaytuneFtError | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Registers this controller, which can abort the run."""
        me = ray.get_runtime_context().current_actor
        ray.get(self._registry.register.remote(self._run, me, None, []))

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Downloads the models, before any rank waits for another one."""
        try:
            for model, commit in self._models.items():
                self._models[model] = fetch_for_group(model, commit, workers, self._note)
        except RaytuneFtError as error:  # a restart would repeat it
            self._fatal = error
            raise
        return {}

    def _note(self, text: str) -> None:
        self._registry.post.remote(self._run, {"note": text})

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Registers the workers, at the first start and at every restart."""
        state = worker_group.get_worker_group_state()
        group = state.placement_group_handle.placement_group
        workers = [worker.actor for worker in state.workers]
        me = ray.get_runtime_context().current_actor
        ray.get(self._registry.register.remote(self._run, me, group, workers))
        ray.get([worker.execute.remote(heed_sigterm) for worker in workers])
        nodes = [_node_of(worker.metadata) for worker in state.workers]
        self._registry.post.remote(self._run, {"workers": nodes})

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Tells that no worker runs, until `after_worker_group_start`."""
        self._registry.post.remote(self._run, {"down": True})

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Forwards a report once every rank has made it; all ranks report the same.

        The end of one of several runs is a report as well, so that it comes after those of the run.
        """
        said = metrics[0]
        self._registry.post.remote(self._run, said if "over" in said else {"report": said})

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Remembers an error that a restart would repeat; restarts a group that left by request.

        Workers may save and leave although the run was not asked to end: Ray drains a node, a
        SIGTERM came, or an elastic group makes room for more workers. Such a restart does not
        count towards `max_failures`, nor does one with smaller passes after memory ran out.

        RuntimeError and OSError are what torch and sockets raise in a worker that has lost a peer,
        often before Ray knows. Every other exception comes from the run itself.
        """
        statuses = worker_group_status.worker_statuses.values()
        errors = [status.error for status in statuses]
        if worker_group_status.finished and not any(errors) and self._goes_on(statuses):
            info = worker_group_status.get_preemption_info() or PreemptionInfo(None, {})
            raise PreemptionError(info)
        for error in errors:
            cause = getattr(error, "_base_exc", None)
            if isinstance(cause, PassTooLarge):
                self._note(str(cause))
                raise PreemptionError(PreemptionInfo(None, {}))
        if any(isinstance(error, WorkerHealthCheckFailedError) for error in errors):
            return  # a worker is lost, which explains the errors of the others
        for error in errors:
            if not isinstance(error, UserExceptionWithTraceback):
                continue
            if not isinstance(error._base_exc, RuntimeError | OSError):
                self._fatal = failure_of(error)

    def _goes_on(self, statuses: Iterable[Any]) -> bool:
        if any(status.return_value != "interrupted" for status in statuses):
            return False
        return not ray.get(self._registry.is_ending.remote(self._run))

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Raises the remembered error, which ends the run instead of restarting its workers."""
        if self._fatal is not None:
            raise self._fatal


def _node_of(metadata: Any) -> str:
    """ADDRESS/ID of a worker's node; eight digits of the id that Ray's tools show."""
    return f"{metadata.node_ip}/{metadata.node_id[:8]}"


class StartsInARow(DefaultFailurePolicy):
    """Ray's default policy, except that failed starts are forgotten once a group has run."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """An error that is not a ControllerError comes from a group that ran."""
        if not isinstance(training_failed_error, ControllerError):
            self._controller_failures = 0
        return super().make_decision(training_failed_error)


def wait_until_gone(group: Group) -> None:
    """Return when placement groups and workers are gone; RunFailed after half a minute."""
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(
        placement_group_table(each).get("state", "REMOVED") != "REMOVED"
        for each in group.placement_groups
    ):
        if time.monotonic() > deadline:
            raise RunFailed(f"a placement group was not given back within {GONE_TIMEOUT_S:g} s")
        time.sleep(0.05)
    for worker in group.workers:
        with contextlib.suppress(RayError):
            ray.get(worker.get_metadata.remote(), timeout=max(0.1, deadline - time.monotonic()))


def end_group(run: str, registry: Any, wait: Callable[[Group], None] = wait_until_gone) -> None:
    """Abort the controller of `run`; return when its workers and placement groups are gone.

    Safe to call twice, while the group starts, and after its controller died. The run's slot is
    free afterwards, also where this raises.

    Raises:
        RunFailed: they are not gone after half a minute.
    """
    try:
        group: Group = ray.get(registry.group.remote(run))
        if group.controller is not None:
            # Ends the workers, the placement group and the controller itself.
            with contextlib.suppress(RayError):
                ray.get(group.controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
            ray.kill(group.controller)
            group = ray.get(registry.group.remote(run))
        for placement_group in group.placement_groups:
            remove_placement_group(placement_group)
        for worker in group.workers:
            ray.kill(worker)
        wait(group)
    finally:
        # Ray frees later what is still reserved now; other runs do not wait for that.
        ray.get(registry.close.remote(run))


def end_groups_of(owner: str, registry: Any) -> None:
    """End the runs of `owner`, whose process died.

    Raises:
        RunFailed: some of it is not gone yet.
    """
    for run in ray.get(registry.give_up.remote(owner)):
        end_group(run, registry)


def failure_of(error: BaseException) -> RaytuneFtError:
    """The cause of a failed run, as one line, out of the exception that Ray raised."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, RaytuneFtError):
            return cause
    texts = [_one_line(cause) for cause in causes]
    for cause, text in zip(causes, texts, strict=True):
        if is_out_of_memory(cause):
            return OutOfMemory(text)
    return RunFailed(texts[-1])


def _causes(error: BaseException) -> list[BaseException]:
    """From the outermost to the innermost cause, over all ranks; the innermost comes last."""
    inner: list[BaseException] = []
    failures = getattr(error, "worker_failures", None)
    if failures:
        # Last, a killed worker: it is the cause of the connection errors of its peers.
        ranks = sorted(failures.values(), key=lambda e: isinstance(e, WorkerHealthCheckFailedError))
        inner = [cause for failure in ranks for cause in _causes(failure)]
    elif isinstance(error, UserExceptionWithTraceback):
        inner = _causes(error._base_exc)
    elif isinstance(error, WorkerHealthCheckFailedError):
        inner = _causes(error.health_check_failure)
    elif getattr(error, "controller_failure", None) is not None:
        inner = _causes(error.controller_failure)  # type: ignore[attr-defined]
    elif isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        inner = _causes(error.cause)
    return [error, *inner]


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.RayActorError):
        return f"a worker died: {_death(lines)}"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _death(lines: list[str]) -> str:
    """The line with the reason, out of Ray's long text about a dead actor."""
    for line in lines:
        if "exited" in line or "killed" in line or "died" in line:
            reason = line
            break
    else:
        reason = lines[-1] if lines else "unknown"
    return reason[:300]
