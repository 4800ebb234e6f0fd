"""Metrics for TensorBoard, MLflow, Weights & Biases and Trackio: one run for each run or trial.

A tracker is one small class and one entry of `TRACKERS`. It is called in the process of rank 0 that
trains, never through Ray. What talks to a server does so in a thread of its own, so that a slow one
costs no step; a failure is one warning, and the run continues without the tracker.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.config.environment import without_secrets
from raytune_ft.config.schema import PACKAGES, TrackingConfig
from raytune_ft.config.yaml_text import read_mapping
from raytune_ft.errors import ConfigError
from raytune_ft.files import read_object, write_text_atomic
from raytune_ft.layout import CONFIG, METRICS, TENSORBOARD, TRACKING_IDS, TRIALS
from raytune_ft.records import EvalMetrics, StepMetrics
from raytune_ft.rundir import RunSpec
from raytune_ft.train.report import MetricsFile, Several

SHOWN = ("seed", "model", "method", "data", "train")


class Log(Several):
    """The `Reporter` of rank 0: `metrics.jsonl` first, then each tracker."""

    def __init__(self, spec: RunSpec, resume_step: int | None) -> None:
        tracking = spec.config.tracking
        self._file = MetricsFile(spec.run_dir / METRICS, resume_step)
        run = identity_of(spec, resume_step)
        self._trackers = [Tracked(name, tracking, run) for name in tracking.to]
        super().__init__([self._file, *self._trackers])

    def close(self) -> None:
        """Close the file and the trackers, also after a failure."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def identity_of(spec: RunSpec, resume_step: int | None) -> Identity:
    """What trackers call the run; the group of a trial is its sweep, known by its directory."""
    run_dir = spec.run_dir
    in_sweep = run_dir.parent.name == TRIALS
    saved = _saved(run_dir / CONFIG)
    return Identity(
        spec.config.name,
        run_dir.parent.parent.name if in_sweep else spec.config.name,
        run_dir,
        _flat({key: value for key, value in saved.items() if key in SHOWN}),
        resume_step,
        str((saved.get("tracking") or {}).get("uri") or ""),
    )


def _saved(path: Path) -> dict[str, Any]:
    """The config as it was saved, where secrets are still `${ENV_NAME}`."""
    return read_mapping(path) if path.is_file() else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        dotted: item
        for key, inner in value.items()
        for dotted, item in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


CLOSE_S = 20.0
"""How long the end of a run waits for a tracking server to take the remaining figures."""
MLFLOW_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
"""MLflow's defaults are 7 retries and 120 s, for which the end of a run would wait."""
MLFLOW_URI = "MLFLOW_TRACKING_URI"
STEP = ("loss", "lr", "grad_norm", "tokens_per_s", "peak_gib", "mfu")


@dataclass(frozen=True)
class Identity:
    """What a tracker calls a run. `group` is the sweep's name, or the run's own outside a sweep.

    `params` is the config with dotted keys, as written: `${ENV_NAME}` is not expanded.
    `resume_step` is the step of the checkpoint that the run continues from, None for a new run.
    `uri` is `tracking.uri` as written, to be kept out of messages.
    """

    name: str
    group: str
    run_dir: Path
    params: Mapping[str, Any]
    resume_step: int | None
    uri: str = ""


class Tracker(Protocol):
    """Takes the figures of one run. An exception ends the tracker, not the run."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Record figures such as {"train/loss": 2.3, "train/examples": 128}."""

    def close(self) -> None:
        """Send what is left; the run is over."""


class TensorBoard:
    """Event files below the run's directory: `tensorboard --logdir` takes a run or a sweep."""

    def __init__(self, tracking: TrackingConfig, run: Identity) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        directory = run.run_dir / TENSORBOARD
        directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        if run.resume_step is not None:  # steps after that checkpoint are written again
            self._write(run.resume_step + 1, restart=True)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write one event with all figures."""
        self._write(step, figures)

    def close(self) -> None:
        self._events.close()

    def _write(
        self, step: int, figures: Mapping[str, float] | None = None, restart: bool = False
    ) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        event = Event(wall_time=time.time(), step=step)
        if restart:
            event.session_log.CopyFrom(SessionLog(status=SessionLog.START))
        else:
            values = [
                Summary.Value(tag=name, simple_value=v) for name, v in (figures or {}).items()
            ]
            event.summary.CopyFrom(Summary(value=values))
        self._events.write_event(event)
        if any(name.startswith("eval/") for name in figures or ()):
            self._events.flush()


class MLflow:
    """A run of MLflow with the trial's name, in the experiment PROJECT/SWEEP."""

    def __init__(self, tracking: TrackingConfig, run: Identity) -> None:
        for variable, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(tracking_uri=tracking.uri), Metric
        name = f"{tracking.project}/{run.group}"
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._created(name)
        self._id = _kept_id(run, "mlflow")
        if self._id is None:
            tags = {"mlflow.runName": run.name, "raytune_ft.sweep": run.group}
            self._id = self._client.create_run(experiment, tags=tags).info.run_id
            params = [Param(key, str(value)[:500]) for key, value in run.params.items()]
            for start in range(0, len(params), 100):  # the server's own limit
                self._client.log_batch(self._id, params=params[start : start + 100])
            _keep(run, "mlflow", self._id)
        else:
            self._client.update_run(self._id, status="RUNNING")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _created(self, name: str) -> str:
        """Create the experiment, unless another trial created it meanwhile."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)


class Wandb:
    """A run of Weights & Biases with the trial's name, in the group of the sweep's name."""

    def __init__(self, tracking: TrackingConfig, run: Identity) -> None:
        import wandb

        kept = _kept_id(run, "wandb")
        self._run = wandb.init(
            project=tracking.project,
            group=run.group,
            name=run.name,
            id=kept,
            resume="allow" if kept else None,
            dir=str(run.run_dir),
            config=dict(run.params),
            reinit="create_new",  # several runs may train in one process
            settings=wandb.Settings(silent=True, console="off"),
        )
        _keep(run, "wandb", self._run.id)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the step as a figure: wandb drops steps that do not ascend."""
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio with the trial's name, in the group of the sweep's name, on this machine."""

    def __init__(self, tracking: TrackingConfig, run: Identity) -> None:
        import trackio

        with Path("/dev/null").open("w") as nowhere, redirect_stdout(nowhere):
            self._run = trackio.init(
                project=tracking.project,
                name=f"{run.group}/{run.name}",
                group=run.group,
                config=dict(run.params),
                resume="never" if run.resume_step is None else "allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackingConfig, Identity], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(tracking: TrackingConfig) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in tracking.to:
        if find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"tracking.to={name}",
                f"needs the package {PACKAGES[name]}, which is not installed",
                f"pip install 'raytune-ft[{name}]', or leave it out",
            )


class Tracked:
    """A `Reporter` for one tracker, which runs in its own thread; its failure is a warning."""

    def __init__(self, name: str, tracking: TrackingConfig, run: Identity) -> None:
        self._name, self._every, self._run = name, tracking.every_steps, run
        # A client's exception may contain its server's URL, with a password.
        self._hidden = (run.uri, tracking.uri or "", os.environ.get(MLFLOW_URI, ""))
        self._waiting: queue.SimpleQueue[tuple[dict[str, float], int] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(
            target=self._work, args=(tracking,), name=f"tracking-{name}", daemon=True
        )
        self._thread.start()

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step % self._every == 0:
            own, names = metrics.plain, (*STEP, *metrics.figures)
            figures = {f"train/{name}": float(own[name]) for name in names if name in own}
            self._put({**figures, "train/examples": float(metrics.examples)}, metrics.step)

    def evaluation(self, metrics: EvalMetrics, checkpoint: str | None) -> None:
        figures = {
            **{f"eval/{name.removeprefix('eval_')}": v for name, v in metrics.figures.items()},
            **{f"eval/loss/{name}": loss for name, loss in metrics.eval_loss_by_source.items()},
            "eval/examples": float(metrics.examples),
        }
        self._put(figures, metrics.step)

    def close(self) -> None:
        """Wait for the remaining figures, at most `CLOSE_S` seconds."""
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warn(f"did not take all figures within {CLOSE_S:.0f} s; the rest is dropped")

    def _put(self, figures: dict[str, float], step: int) -> None:
        if not self._failed:
            self._waiting.put((figures, step))

    def _work(self, tracking: TrackingConfig) -> None:
        try:
            tracker = TRACKERS[self._name](tracking, self._run)
            while (item := self._waiting.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # noqa: BLE001 - no failure of a tracker may end the run
            self._failed = True
            lines = str(error).strip().splitlines() or [""]
            self._warn(f"failed; the run continues without it: {type(error).__name__}: {lines[0]}")

    def _warn(self, what: str) -> None:
        """Warn on stderr and in the run's directory, since a worker's output may be lost."""
        text = without_secrets(f"tracking by {self._name} {what}", *self._hidden)
        print(f"warning: {text}", file=sys.stderr, flush=True)
        with suppress(OSError):
            _keep(self._run, f"{self._name}_warning", text)


_IDS_LOCK = threading.Lock()


def _kept_id(run: Identity, tracker: str) -> str | None:
    """The server's id of a resumed run."""
    return _ids(run).get(tracker) if run.resume_step is not None else None


def _keep(run: Identity, key: str, value: str) -> None:
    with _IDS_LOCK:
        content = json.dumps({**_ids(run), key: value}, indent=2) + "\n"
        write_text_atomic(run.run_dir / TRACKING_IDS, content)


def _ids(run: Identity) -> dict[str, str]:
    return read_object(run.run_dir / TRACKING_IDS) or {}
