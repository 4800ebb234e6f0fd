"""Facts that cross processes and files: frozen, JSON in, JSON out.

The names of fields are the keys of `metrics.jsonl`, `result.json` and `manifest.json`; so are the
names of an evaluation's figures, which stand beside the fields.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Self

Tell = Callable[[str], None]
"""Shows one line of progress to the user."""

RunStatus = Literal["completed", "early_stopped", "failed", "interrupted"]
TrialStatus = Literal["completed", "early_stopped", "pruned", "failed", "interrupted"]


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over the whole job. `tokens` counts every token that is not padding.

    On a GPU `peak_gib` is the most memory that tensors took so far on the first worker's, and `mfu`
    the share of the peak rate of all GPUs, where that is known. A file has no key for None.
    `figures` are those of the rollout that the step trains on; each is a key of its own in a file.
    """

    step: int
    examples: int
    tokens: int
    label_tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    wall_s: float
    peak_gib: float | None = None
    mfu: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> dict[str, Any]:
        """Its keys and values in a file."""
        found = dict(vars(self))
        figures = found.pop("figures")
        absent = [key for key in ("peak_gib", "mfu") if found[key] is None]
        return {key: value for key, value in found.items() if key not in absent} | figures


@dataclass(frozen=True)
class Forecast:
    """What a driver expects of a run on GPUs; None where it cannot know.

    flops_a_token: FLOPs of training on a token that is no padding. peak_flops: FLOP/s of the data
    sheet, of a worker. peak_gib: the most memory of a worker's GPU. tokens_per_s: of the whole job.
    """

    flops_a_token: float
    peak_flops: float | None = None
    peak_gib: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation of the whole validation set, taken after `examples` training examples.

    Attributes:
        figures: by name, `eval_loss` and what else the objective declares; each is a key of its
            own in a file.
        eval_loss_by_source: the loss over the examples of each source, where there are several.
    """

    step: int
    examples: int
    figures: dict[str, float]
    eval_loss_by_source: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From its plain values; keys that are not its own and figures that are null are left out.

        Raises:
            KeyError, TypeError: it has no `eval_loss`, step or examples.
        """
        own = {each.name: plain[each.name] for each in fields(cls) if each.name in plain}
        scores = {
            name: value
            for name, value in plain.items()
            if name.startswith("eval_") and name != BY_SOURCE and value is not None
        }
        return cls(**{**own, "figures": {"eval_loss": plain["eval_loss"]} | scores})

    @property
    def plain(self) -> dict[str, Any]:
        """Its keys and values in a file."""
        own = dict(vars(self))
        scores = own.pop("figures")
        first = {key: own.pop(key) for key in ("step", "examples")}
        return {**first, **scores, **own}

    @property
    def eval_loss(self) -> float:
        """The loss over all examples."""
        return self.figures["eval_loss"]

    def value(self, metric: str) -> float:
        """A figure by its name, or the loss on a source by `eval_loss:SOURCE`."""
        if metric in self.figures:
            return self.figures[metric]
        return self.eval_loss_by_source[metric.partition(":")[2]]


BY_SOURCE = "eval_loss_by_source"


@dataclass(frozen=True)
class Point(EvalMetrics):
    """An evaluation that a result refers to; `checkpoint` is relative to the run directory."""

    checkpoint: str | None = None


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
class RunResult:
    """`result.json` of a run directory. `notes` are sentences on what was chosen by measurement."""

    status: RunStatus | Literal["pruned"]
    base: dict[str, Any] | None
    best: Point | None
    final: Point | None
    seed: int
    config_sha256: str
    error: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialRecord:
    """One row of `trials` in a sweep's `result.json`.

    `value` is its best value of `search.metric`. Of several metrics it is that of the first, and
    `values` has all of them at the same checkpoint.
    """

    id: str
    params: dict[str, Any]
    status: TrialStatus
    eval_loss: float | None
    examples: int
    wall_s: float
    error: str | None = None
    value: float | None = None
    values: dict[str, float] | None = None


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint, by its path relative to the checkpoint."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """`manifest.json`. It is written last: a checkpoint without a valid one counts as absent."""

    step: int
    examples: int
    eval_loss: float | None
    config_sha256: str
    method: str
    files: tuple[FileRecord, ...]
    format: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def plain_of(record: Any) -> Any:
    """A record, or records inside mappings and lists, as plain values."""
    if isinstance(record, EvalMetrics | StepMetrics):
        return plain_of(record.plain)
    if is_dataclass(record):
        return {each.name: plain_of(getattr(record, each.name)) for each in fields(record)}
    if isinstance(record, Mapping):
        return {key: plain_of(value) for key, value in record.items()}
    return [plain_of(value) for value in record] if isinstance(record, list | tuple) else record


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of a record, a dict or a list of them; NaN and the infinities become null."""
    return json.dumps(as_json(value), indent=indent, ensure_ascii=False, allow_nan=False)


def as_json(value: Any) -> Any:
    """The plain values that a reader of `to_json` gets."""
    return _finite(plain_of(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
