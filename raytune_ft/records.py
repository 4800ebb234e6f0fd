"""Facts that cross processes and files: frozen, JSON in, JSON out.

The names of the fields are the keys of `metrics.jsonl`, `result.json` and `manifest.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Tell = Callable[[str], None]
"""Shows one line of progress to the user."""

RunStatus = Literal["completed", "early_stopped", "failed", "interrupted"]
TrialStatus = Literal["completed", "early_stopped", "pruned", "failed", "interrupted"]


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over the whole job. `tokens` counts every token that is not padding."""

    step: int
    examples: int
    tokens: int
    label_tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    wall_s: float


@dataclass(frozen=True)
class EvalMetrics:
    """One evaluation of the whole validation set, taken after `examples` training examples.

    `eval_loss_by_source` has the name of each source that the set has examples of; it is empty
    where nobody tells sources apart.
    Which figures there are beside the loss depends on the objective; the others are None.
    """

    step: int
    examples: int
    eval_loss: float
    eval_token_accuracy: float | None = None
    eval_exact_match: float | None = None
    eval_perplexity: float | None = None
    eval_accuracy: float | None = None
    eval_macro_f1: float | None = None
    eval_calibration_error: float | None = None
    eval_mse: float | None = None
    eval_r2: float | None = None
    eval_pearson: float | None = None
    eval_loss_by_source: dict[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Those that there are, by name."""
        values = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in values.items() if value is not None}

    def value(self, metric: str) -> float:
        """A figure by its name, or by `eval_loss:SOURCE`."""
        name, _, source = metric.partition(":")
        found = self.eval_loss_by_source[source] if source else getattr(self, name)
        return float(found)


@dataclass(frozen=True)
class Point(EvalMetrics):
    """An evaluation that a result refers to; `checkpoint` is relative to the run directory."""

    checkpoint: str | None = None


BY_SOURCE = "eval_loss_by_source"
FIGURES = tuple(
    name for name in EvalMetrics.__annotations__ if name.startswith("eval_") and name != BY_SOURCE
)
OPTIONAL = frozenset(FIGURES) - {"eval_loss"}


@dataclass(frozen=True)
class RunResult:
    """`result.json` of a run directory. `notes` says what was chosen by measurement, and why."""

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
    """One row of `trials` in a sweep's `result.json`. `value` is its best of `search.metric`, of
    the first one where there are several; `values` are then all of them at that checkpoint.
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
    """`manifest.json`: written last, so a checkpoint without a valid one does not exist."""

    step: int
    examples: int
    eval_loss: float | None
    config_sha256: str
    method: str
    files: tuple[FileRecord, ...]
    format: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def plain_of(record: Any) -> dict[str, Any]:
    """A record as plain values, without the figures that its objective does not have."""
    plain: dict[str, Any] = _known(asdict(record))
    return plain


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _known(item)
            for key, item in value.items()
            if item is not None or key not in OPTIONAL
        }
    return [_known(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of a record, a dict or a list of them; NaN and the infinities become null."""
    plain = plain_of(value) if hasattr(value, "__dataclass_fields__") else value
    return json.dumps(_finite(plain), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return plain_of(value) if hasattr(value, "__dataclass_fields__") else value
