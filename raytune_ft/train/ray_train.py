"""One run on Ray Train: start the worker group, hear from it, end it, read what it left."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from raytune_ft.checkpoints.store import step_name
from raytune_ft.config.identity import config_sha256
from raytune_ft.config.load import choose_strategy
from raytune_ft.config.schema import Config
from raytune_ft.errors import InputError, Interrupted, RaytuneFtError, RunFailed
from raytune_ft.records import EvalMetrics, Point, RunResult
from raytune_ft.rundir import CHECKPOINTS, METRICS, RESULT, write_json_atomic
from raytune_ft.train.ray_cluster import connected, require_capacity
from raytune_ft.train.ray_group import RunWatch, end_group, failure_of
from raytune_ft.train.ray_switchboard import start_switchboard
from raytune_ft.train.ray_worker import ProcessGroupConfig, train_worker
from raytune_ft.train.signals import interruptible
from raytune_ft.train.spec import RunSpec

# A group that cannot start, because a node went away for good, is tried for ten minutes or so.
CONTROLLER_FAILURES = 10
REGISTER_TIMEOUT_S = 30.0
OnEvaluation = Callable[[EvalMetrics, str | None], None]


@dataclass(frozen=True)
class Report:
    """An evaluation; its checkpoint, if it earned one, is on disk."""

    metrics: EvalMetrics
    checkpoint: str | None


@dataclass(frozen=True)
class Ended:
    """The run is over and nothing of it is left on the cluster."""

    error: RaytuneFtError | None


class StopRequested(Exception):
    """The switchboard told everybody to stop."""


class TrainJob:
    """A worker group in the background of this process, from `start` to `stop`."""

    def __init__(self, spec: RunSpec, switchboard: Any) -> None:
        self.spec = spec
        # Ray resumes a run whose name it knows; ours resume from their own checkpoints.
        self._name = f"{spec.run_dir.name}-{uuid.uuid4().hex[:8]}"
        self._switchboard = switchboard
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, name=self._name, daemon=True)
        self._pending: list[Report] = []

    def start(self) -> None:
        """Wait for a free slot, then let Ray Train start the workers.

        Raises:
            StopRequested: before there was a slot.
        """
        (self.spec.run_dir / RESULT).unlink(missing_ok=True)
        owner = self.spec.run_dir.name
        if not ray.get(self._switchboard.open.remote(self._name, owner)):
            raise StopRequested
        self._thread.start()

    def next(self, timeout_s: float = 1.0) -> Report | Ended | None:
        """The next thing that happened, in order; None when nothing did for `timeout_s`.

        Raises:
            StopRequested: nothing more will be listened to; call `stop`.
        """
        if not self._pending:
            over = not self._thread.is_alive()
            events, stopping = ray.get(self._switchboard.take.remote(self._name, timeout_s))
            if stopping:
                raise StopRequested
            self._pending += [_report(event["report"]) for event in events if "report" in event]
            if any("ended" in event for event in events):
                self._thread.join()
                over = True
            if not self._pending and over:
                self.stop()
                return Ended(failure_of(self._error) if self._error else None)
        return self._pending.pop(0) if self._pending else None

    def stop(self) -> None:
        """End the workers wherever they are; returns when they and their reservation are gone."""
        if self._thread.ident is None:
            return
        deadline = time.monotonic() + REGISTER_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            # A controller that is only just starting cannot be stopped yet.
            if ray.get(self._switchboard.group.remote(self._name)).controller is not None:
                break
            time.sleep(0.1)
        end_group(self._name, self._switchboard)
        self._thread.join(timeout=10)

    def _fit(self) -> None:
        try:
            _fit(self.spec, self._name, [RunWatch(self._name, self._switchboard)])
        except (TrainingFailedError, RayError, RuntimeError, OSError, ValueError) as error:
            self._error = error
        finally:
            with contextlib.suppress(RayError):
                self._switchboard.post.remote(self._name, {"ended": True})


def fit(spec: RunSpec, on_evaluation: OnEvaluation | None = None) -> RunResult:
    """Train `spec` on a group of Ray Train workers, from its newest checkpoint if there is one.

    A worker that is lost is replaced, together with its group, up to `parallel.max_failures`
    times. A run that failed by itself (a loss that is not finite, for one) is not tried again:
    its status is "failed" and the result says why.

    Raises:
        InputError: the cluster cannot hold the workers, or they found the input to be wrong.
        RunFailed: the workers died for good; `result.json` says so too.
        Interrupted: SIGINT or SIGTERM; the workers are gone and the run can be resumed.
    """
    with connected():
        require_capacity(spec.config.parallel)
        job = TrainJob(spec, start_switchboard(slots=1))
        with interruptible() as interrupted:
            try:
                job.start()
                ended = _listen(job, on_evaluation, interrupted)
            finally:
                job.stop()
        if ended is None and load_result(spec.run_dir) is None:
            write_ended(spec, "interrupted")
            raise Interrupted(f"{spec.run_dir} was interrupted; continue it with --resume")
    return read_result(spec, ended.error if ended else None)


def _listen(
    job: TrainJob, on_evaluation: OnEvaluation | None, interrupted: threading.Event
) -> Ended | None:
    while not interrupted.is_set():
        event = job.next(timeout_s=0.5)
        if isinstance(event, Ended):
            return event
        if isinstance(event, Report) and on_evaluation is not None:
            on_evaluation(event.metrics, event.checkpoint)
    return None


def read_result(spec: RunSpec, error: RaytuneFtError | None) -> RunResult:
    """What the workers left in `result.json`; where they could not, a failed one is written.

    Raises:
        InputError: what the workers raised, for the user to mend.
        RunFailed: they could not.
    """
    result = load_result(spec.run_dir)
    if result is None:
        failure = error or RunFailed("the workers ended without a result")
        write_ended(spec, "failed", f"{type(failure).__name__}: {failure}")
        raise failure
    if isinstance(error, InputError):
        raise error
    return result


def load_result(run_dir: Path) -> RunResult | None:
    """`result.json` of an ended run, None where there is none."""
    path = run_dir / RESULT
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    points = {name: Point(**data[name]) if data.get(name) else None for name in ("best", "final")}
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return RunResult(**{**data, **points, **lists})


def write_ended(
    spec: RunSpec, status: Literal["failed", "pruned", "interrupted"], error: str | None = None
) -> RunResult:
    """`result.json` of a run whose workers are gone, from the evaluations in `metrics.jsonl`."""
    evaluations = _evaluations(spec.run_dir / METRICS)
    base = next((point for point in evaluations if point.examples == 0), None)
    points = [_with_checkpoint(point, spec.run_dir) for point in evaluations if point.examples]
    saved = [point for point in points if point.checkpoint] or points
    sign = 1 if spec.mode == "min" else -1
    result = RunResult(
        status=status,
        base=_numbers(base) if base else None,
        best=min(saved, key=lambda point: sign * getattr(point, spec.metric), default=None),
        final=points[-1] if points else None,
        seed=spec.config.seed,
        config_sha256=config_sha256(spec.config),
        error=error,
    )
    write_json_atomic(spec.run_dir / RESULT, result)
    return result


def _evaluations(path: Path) -> list[Point]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    points = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the half line of a killed writer
            record = json.loads(line)
            if record.get("eval_loss") is not None:
                points.append(Point(**{key: record[key] for key in EvalMetrics.__annotations__}))
    return points


def _with_checkpoint(point: Point, run_dir: Path) -> Point:
    path = f"{CHECKPOINTS}/{step_name(point.step)}"
    kept = path if (run_dir / path).is_dir() else None
    return Point(**_numbers(point), checkpoint=kept)


def _numbers(point: EvalMetrics) -> dict[str, Any]:
    return {name: getattr(point, name) for name in EvalMetrics.__annotations__}


def _report(values: dict[str, Any]) -> Report:
    numbers = {name: values[name] for name in EvalMetrics.__annotations__}
    return Report(EvalMetrics(**numbers), values["checkpoint"])


class _LeanTrainer(DataParallelTrainer):
    """Two processes less for each run, 1.5 s of a core each, and no torch beside the workers.

    There are no Ray Data sets. And the cleaner, which looks its cluster up through the State API
    and dies where a machine runs two of them, is what the switchboard replaces.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()
        return [callback for callback in every if not isinstance(callback, idle)]


def _fit(spec: RunSpec, name: str, callbacks: list[Any]) -> None:
    parallel = spec.config.parallel
    resources = {key: amount for key, amount in parallel.resources_per_worker.items() if amount}
    gpu = resources.get("GPU", 0) > 0
    # Ray's own notes on the run: nothing that anybody reads afterwards.
    storage = tempfile.mkdtemp(prefix="raytune-ft-")
    try:
        _LeanTrainer(
            train_worker,
            train_loop_config={"spec": spec},
            backend_config=_process_group(spec.config, gpu),
            scaling_config=ScalingConfig(
                num_workers=parallel.max_workers, use_gpu=gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(
                    max_failures=parallel.max_failures,
                    controller_failure_limit=CONTROLLER_FAILURES,
                ),
                callbacks=callbacks,
            ),
        ).fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _process_group(config: Config, gpu: bool) -> BackendConfig:
    """A worker of its own needs none; a group of one does, where its strategy is one of groups."""
    if choose_strategy(config)[0] == "single":
        return BackendConfig()
    return ProcessGroupConfig("cpu:gloo,cuda:nccl" if gpu else "gloo")
