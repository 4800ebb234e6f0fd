"""Task heads: classes or numbers for whole examples, however many share a row.

A head of transformers reads the first or the last token of a row. Here the token of each example
is taken out of the hidden states, and the head is given each as a row of its own, so that it is
transformers' own code, and the output of the whole model, from which the loss comes.

Shapes: B rows, S tokens, E examples, H hidden units, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.classification import SECOND

PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_MODULES = "head_modules"
Place = Literal["first", "last", "row"]


@dataclass(frozen=True)
class Head:
    """What a task head is for. `seed` draws its weights where the model has none."""

    problem: str
    labels: tuple[str, ...]
    seed: int = 0

    def describe(self, config: Any) -> None:
        """Write it into a model's configuration, as transformers reads it."""
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        config.problem_type = PROBLEM_TYPES[self.problem]


@torch.no_grad()
def draw_head(base: nn.Module, missing: list[str], seed: int) -> None:
    """Draw the weights that the files lack, alike in every process, and note what is the head's.

    Matrices are normal with the model's own spread, biases zero and scales one.
    """
    rng = torch.Generator().manual_seed(seed)
    spread = getattr(base.config.get_text_config(), "initializer_range", None) or 0.02  # type: ignore[union-attr, operator]
    for name in missing:
        parameter = base.get_parameter(name)
        value = torch.zeros(parameter.shape)
        if name.endswith("bias"):
            pass
        elif parameter.ndim > 1:
            value.normal_(0.0, spread, generator=rng)
        else:
            value.fill_(1.0)
        parameter.copy_(value)
    backbone: Any = base.base_model
    outside = [name for name, child in base.named_children() if child is not backbone]
    inside = [name.rpartition(".")[0] for name in missing if name.split(".")[0] not in outside]
    setattr(base, _MODULES, list(dict.fromkeys([*outside, *inside])))


def head_modules(base: nn.Module) -> list[str]:
    """Modules of the base that train under every method; none where it predicts tokens."""
    names: list[str] = getattr(base, _MODULES, [])
    return [name for name in names if next(base.get_submodule(name).parameters(), None) is not None]


def train_head(built: nn.Module) -> None:
    """Whatever the method has frozen; PEFT trains a copy of the head, and does so by itself."""
    if not isinstance(built, PeftModel):
        for name in head_modules(built):
            built.get_submodule(name).requires_grad_(True)


@dataclass(frozen=True)
class Reading:
    """Which token of an example the head reads; "row": something else, of rows as they are."""

    backbone: nn.Module
    pooler: nn.Module | None
    place: Place
    segments: bool


def reading(model: nn.Module, place: Place) -> Reading:
    """Of a built model, before a strategy wraps it or after."""
    wrapped: Any = model
    base = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
    pooler = getattr(base.base_model, "pooler", None)
    segments = getattr(base.config, "type_vocab_size", 0) > 1
    return Reading(base.base_model, pooler, place, segments)


def example_logits(
    model: nn.Module, how: Reading, inputs: Mapping[str, Any], batch: MicroBatch
) -> Tensor:
    """`logits_EL` of the examples of a batch, in the order of its spans, float32 or wider."""
    inputs = {**inputs, **_segments(how, batch)}
    if how.place == "row":
        logits = model(**inputs).logits[: len(batch.spans)]
        return logits if logits.dtype == torch.float64 else logits.float()
    spans = [(span.row, span.start, span.stop) for span in batch.spans] or [(0, 0, 1)]
    rows_E = torch.tensor([row for row, _, _ in spans], device=batch.tokens_BS.device)
    places_E = torch.tensor(
        [start if how.place == "first" else stop - 1 for _, start, stop in spans],
        device=batch.tokens_BS.device,
    )

    def taken(hidden: Tensor) -> Tensor:
        return hidden[rows_E, places_E].unsqueeze(1) if hidden.ndim == 3 else hidden

    def true_inputs(module: nn.Module, arguments: Any, options: Any) -> Any:
        return (), {**options, **inputs}

    def pooled(module: nn.Module, arguments: Any) -> Any:
        return (taken(arguments[0]), *arguments[1:])

    def as_rows(module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (taken(output[0]), *output[1:])
        output.last_hidden_state = taken(output.last_hidden_state)
        return output

    handles = [
        how.backbone.register_forward_pre_hook(true_inputs, with_kwargs=True),
        how.backbone.register_forward_hook(as_rows),
    ]
    if how.pooler is not None:
        handles.append(how.pooler.register_forward_pre_hook(pooled))
    try:
        # One token a row: what the head believes it is given.
        stand_ins_E1 = torch.zeros_like(rows_E).unsqueeze(1)
        logits = model(input_ids=stand_ins_E1, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    logits = logits[: len(batch.spans)]
    return logits if logits.dtype == torch.float64 else logits.float()


def _segments(how: Reading, batch: MicroBatch) -> dict[str, Tensor]:
    """Which of two texts a token is of, for models that are told."""
    if not how.segments or SECOND not in batch.columns:
        return {}
    segments_BS = torch.zeros_like(batch.tokens_BS)
    for span, second in zip(batch.spans, batch.columns[SECOND][:, 0].long().tolist(), strict=True):
        segments_BS[span.row, span.start + second : span.stop] = 1
    return {"token_type_ids": segments_BS}
