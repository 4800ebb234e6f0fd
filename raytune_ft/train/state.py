"""What a checkpoint holds, so that any strategy on any number of ranks continues from it.

At the top a PEFT adapter or a Hugging Face model; in `state/` the trained weights in master
precision and the moments, both under single-process names, and the rest as JSON. Small, because
data order, learning rate and noise are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raytune_ft.errors import CheckpointError
from raytune_ft.model.methods import Exporter
from raytune_ft.records import EvalMetrics, Point, to_json
from raytune_ft.train.engine import Engine

STATE = "state"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps.

    `unimproved` counts the evaluations in a row that did not improve on `best`.
    """

    step: int = 0
    examples: int = 0
    wall_s: float = 0.0
    base: EvalMetrics | None = None
    best: Point | None = None
    final: Point | None = None
    unimproved: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory; training may go on while it is written."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: Progress


def take_snapshot(
    engine: Engine, optimizer: torch.optim.Optimizer, progress: Progress
) -> Snapshot | None:
    """Gather the whole state; every rank must call it, rank 0 alone gets it."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.parameters.items():
        whole = {"": engine.strategy.gather(parameter)}
        for moment in MOMENTS:
            # A weight that took no part in any step, such as one of an unused tower, has none.
            value = optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
            whole[moment] = engine.strategy.gather(value)
        if engine.strategy.rank == 0:
            weights[name] = whole.pop("")
            moments |= {f"{name}.{moment}": value for moment, value in whole.items()}
    return Snapshot(weights, moments, progress) if engine.strategy.rank == 0 else None


def write_snapshot(snapshot: Snapshot, exporter: Exporter, directory: Path) -> None:
    """Fill a checkpoint's directory."""
    exporter.save(snapshot.weights, directory)
    state = directory / STATE
    state.mkdir()
    save_file(snapshot.weights, state / "model.safetensors")
    save_file(snapshot.moments, state / "optimizer.safetensors")
    (state / "state.json").write_text(to_json(snapshot.progress, indent=2), encoding="utf-8")


def read_progress(checkpoint: Path) -> Progress:
    """The JSON part of a checkpoint."""
    content = json.loads((checkpoint / STATE / "state.json").read_text(encoding="utf-8"))
    return Progress(
        **content
        | {
            "base": _record(EvalMetrics, content["base"]),
            "best": _record(Point, content["best"]),
            "final": _record(Point, content["final"]),
        }
    )


def load_state(checkpoint: Path, engine: Engine, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint's weights and moments into a freshly built engine.

    Raises:
        CheckpointError: it is of another model or method.
    """
    progress = read_progress(checkpoint)
    parameters = engine.parameters
    state = checkpoint / STATE
    with (
        safe_open(state / "model.safetensors", "pt") as weights,
        safe_open(state / "optimizer.safetensors", "pt") as moments,
    ):
        _check_names(checkpoint, set(weights.keys()), parameters)
        for name, parameter in parameters.items():
            whole = weights.get_tensor(name)
            if whole.shape != parameter.shape:
                raise CheckpointError(
                    f"{checkpoint} holds {name} with shape {tuple(whole.shape)}, "
                    f"the model built has {tuple(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(engine.strategy.shard(whole, parameter))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.step)),
                **{
                    moment: engine.strategy.shard(
                        moments.get_tensor(f"{name}.{moment}"), parameter.detach()
                    )
                    for moment in MOMENTS
                },
            }
    return progress


def _check_names(checkpoint: Path, saved: set[str], built: Mapping[str, Any]) -> None:
    if saved != set(built):
        odd = sorted(saved ^ set(built))
        raise CheckpointError(
            f"{checkpoint} is of another model or method: {len(odd)} of {len(built)} trained "
            f"weights differ, among them {odd[0]}"
        )


def _record(kind: type[Any], content: dict[str, Any] | None) -> Any:
    if content is None:
        return None
    known = {field.name for field in fields(kind)}
    return kind(**{key: value for key, value in content.items() if key in known})
