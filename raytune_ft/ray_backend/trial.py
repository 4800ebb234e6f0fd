"""One trial as Ray Tune sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.tune import PlacementGroupFactory, Trainable

from raytune_ft.config.schema import Config
from raytune_ft.errors import RaytuneFtError
from raytune_ft.ray_backend.cluster import set_train_defaults, stop_grace_s
from raytune_ft.records import RunResult, plain_of
from raytune_ft.rundir import TRIALS
from raytune_ft.search.ray_places import Place
from raytune_ft.search.trial import apply_params
from raytune_ft.train.ended import read_result, write_ended
from raytune_ft.train.ray_job import Ended, Job, Report, StopRequested
from raytune_ft.train.spec import RunSpec


def driver_place() -> PlacementGroupFactory:
    """Where a trial's driver runs: on this node, so that no other one takes trials with it.

    It takes no CPU; one byte of memory, since Tune refuses to ask for nothing at all.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return PlacementGroupFactory([{"CPU": 0, "memory": 1}], bundle_label_selector=[here])


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common. `config` is resolved, `${ENV_NAME}` expanded."""

    config: Config
    sweep_dir: Path
    data_dir: Path
    metric: str
    mode: str
    environment: dict[str, str]


class SweepTrial(Trainable):
    """A trial, whose run trains at a `Place` from its first step on, and leaves it with the trial.

    A class and not a function: Tune calls `reset_config` before the actor's next trial and
    `cleanup` after its last, and both return only when nothing of the trial is left, however it
    ended. A function that Tune stops leaves its thread, its controller and its workers behind.
    Each step is one evaluation; training goes on while Tune thinks about it.
    """

    def setup(self, config: dict[str, Any], shared: Shared, place: Place) -> None:
        """See `Trainable`; `shared` and `place` come by `tune.with_parameters`."""
        set_train_defaults(shared.environment)
        self._shared, self._place = shared, place
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial takes over this process, so that Ray and torch are loaded once."""
        self._end()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """See `Trainable`."""
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        self._spec = spec_of(self._shared, config["trial"], config["params"])
        self._job: Job | None = None
        self._over = False
        self._begun = time.monotonic()

    def step(self) -> dict[str, Any]:
        """The next evaluation, or the outcome."""
        try:
            if self._job is None:
                self._job = self._place.job(self._spec)
                self._job.start()
            while True:
                event = self._job.next()
                if isinstance(event, Report):
                    return {**plain_of(event.metrics), "wall_s": self._wall_s()}
                if isinstance(event, Ended):
                    return self._outcome(event.error)
        except StopRequested:
            self._end(stopping=True)
            return {"done": True, "interrupted": True}

    def _outcome(self, error: RaytuneFtError | None) -> dict[str, Any]:
        self._over = True
        try:
            result = read_result(self._spec, error)
        except RaytuneFtError as failure:
            line = f"{type(failure).__name__}: {failure}"
            return {"done": True, "outcome": "failed", "error": line, "wall_s": self._wall_s()}
        return {
            "done": True,
            **outcome_of(result, self._metrics()),
            "wall_s": self._wall_s(),
        }

    def _end(self, stopping: bool = False) -> None:
        if self._job is None:
            return
        stopping = stopping or self._place.is_stopping()
        if stopping and not self._over:
            # The whole sweep stops. The trial stays unfinished, for the next driver.
            self._over = True
            self._job.wind_down(stop_grace_s())
        self._job.stop()
        if not self._over:
            write_ended(self._spec, "pruned")
        self._job, self._over = None, True

    def _metrics(self) -> list[str]:
        search = self._shared.config.search
        assert search is not None
        return search.metrics

    def _wall_s(self) -> float:
        return round(time.monotonic() - self._begun, 3)


def spec_of(shared: Shared, trial: str, params: dict[str, Any]) -> RunSpec:
    """The run of a trial. Raises ConfigError where the values do not go together."""
    trials = shared.sweep_dir / TRIALS
    config = apply_params(shared.config, params, trial, str(trials))
    return RunSpec(config, trials / trial, shared.data_dir, shared.metric, shared.mode)


def outcome_of(result: RunResult, metrics: Sequence[str]) -> dict[str, Any]:
    """How a run ended, for the study: its status, and the metrics of its best by the first."""
    best, final = result.best, result.final
    return {
        "outcome": result.status,
        "error": result.error,
        "best_eval_loss": best.eval_loss if best else None,
        "values": [best.value(metric) for metric in metrics] if best else None,
        "examples": final.examples if final else 0,
    }
