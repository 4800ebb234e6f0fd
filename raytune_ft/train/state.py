"""What a checkpoint holds, so that any strategy on any number of ranks continues from it.

At the top a PEFT adapter or a Hugging Face model; in `state/` the trained weights in master
precision and the moments, both under single-process names, and the rest as JSON. Small, because
data order, learning rate and noise are functions of the step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raytune_ft.errors import CheckpointError
from raytune_ft.files import flush_file
from raytune_ft.records import EvalMetrics, FileRecord, Point, to_json
from raytune_ft.strategy.exchange import Exchange
from raytune_ft.tensors.part import Part
from raytune_ft.tensors.read import Shards, open_shards, shard_name
from raytune_ft.tensors.write import ignore, write_parts

STATE = "state"
WEIGHTS, OPTIMIZER = "model", "optimizer"


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


class Holder(Protocol):
    """Whose weights and moments are saved and loaded; a `Strategy` is one, see there."""

    @property
    def device(self) -> torch.device:
        """Where the parts are."""

    def start_from(self, step: int) -> None:
        """See `Strategy.start_from`."""

    def parts(self, name: str) -> dict[str, Part]:
        """See `Strategy.parts`."""

    def loaded(self) -> None:
        """See `Strategy.loaded`."""

    def exchange(self) -> Exchange:
        """See `Strategy.exchange`."""


@dataclass(frozen=True)
class Snapshot:
    """A copy in host memory of what this rank saves; training may go on while it is written."""

    weights: dict[str, Part]
    moments: dict[str, Part]
    progress: Progress


class SnapshotTaker:
    """Copies into the same memory each time: the first touch of new pages costs more than a copy.

    So a snapshot must be written before the next one is taken.
    """

    def __init__(self, holder: Holder, names: list[str]) -> None:
        self._holder, self._names = holder, names
        self._memory: dict[str, Tensor] = {}

    def take(self, progress: Progress) -> Snapshot:
        """Nothing is sent between ranks."""
        weights: dict[str, Part] = {}
        moments: dict[str, Part] = {}
        for name in self._names:
            for moment, part in self._holder.parts(name).items():
                if part.writes:
                    key = f"{name}.{moment}" if moment else name
                    kept = moments if moment else weights
                    kept[key] = replace(part, values=self._copy(key, part.values))
        if self._holder.device.type == "cuda":
            torch.cuda.synchronize()
        return Snapshot(weights, moments, progress)

    def _copy(self, key: str, values: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != values.shape:
            pinned = self._holder.device.type == "cuda"
            memory = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self._memory[key] = memory
        return memory.copy_(values, non_blocking=True)


def write_state(
    snapshot: Snapshot,
    directory: Path,
    rank: int,
    world_size: int,
    wrote: Callable[[int], None] = ignore,
) -> list[FileRecord]:
    """Add this rank's files to a checkpoint's directory; rank 0 adds the JSON."""
    (directory / STATE).mkdir(exist_ok=True)
    records = [
        write_parts(directory, f"{STATE}/{shard_name(stem, rank, world_size)}", parts, wrote)
        for stem, parts in ((WEIGHTS, snapshot.weights), (OPTIMIZER, snapshot.moments))
    ]
    if rank == 0:
        path = directory / STATE / "state.json"
        path.write_text(to_json(snapshot.progress, indent=2), encoding="utf-8")
        records.append(flush_file(path, directory))
    return records


def read_progress(checkpoint: Path) -> Progress:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or lacks what this version needs.
    """
    path = checkpoint / STATE / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"base": EvalMetrics, "best": Point, "final": Point}
        records = {key: _record(kind, content[key]) for key, kind in kinds.items()}
        progress: Progress = _record(Progress, content | records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error
    return progress


def load_state(checkpoint: Path, holder: Holder, names: list[str]) -> Progress:
    """Put a checkpoint's weights and moments into a freshly built model and optimizer.

    Every rank reads its own parts.

    Raises:
        CheckpointError: it is of another model or method.
    """
    progress = read_progress(checkpoint)
    holder.start_from(progress.step)
    state = checkpoint / STATE
    with open_shards(state, WEIGHTS) as weights, open_shards(state, OPTIMIZER) as moments:
        _check_names(checkpoint, set(weights.shapes), names)
        for name in names:
            for moment, part in holder.parts(name).items():
                source, key = (moments, f"{name}.{moment}") if moment else (weights, name)
                _fill(checkpoint, part, source, key)
    holder.loaded()
    return progress


def _fill(checkpoint: Path, part: Part, source: Shards, key: str) -> None:
    found = source.shapes.get(key)
    if found != part.shape:
        raise CheckpointError(
            f"{checkpoint} holds {key} with shape {found}, the model built has {part.shape}"
        )
    source.fill(part, key)


def _check_names(checkpoint: Path, saved: set[str], built: list[str]) -> None:
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
