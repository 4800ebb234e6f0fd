"""Task heads: classes or numbers for whole examples, also where several share a row.

A head of transformers reads the first or the last token of a row. Here the token of each example is
selected from the hidden states and given to the head as a row of its own, so that the code of
transformers computes the logits.

Shapes: B rows, S tokens, E examples, H hidden units, L labels.
"""

from __future__ import annotations

import copy
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
    """A task head's problem and labels. `seed` draws its weights where the files lack them."""

    problem: str
    labels: tuple[str, ...]
    seed: int = 0

    def describe(self, config: Any) -> None:
        """Write problem and labels into a configuration of transformers."""
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: number for number, label in enumerate(self.labels)}
        config.problem_type = PROBLEM_TYPES[self.problem]

    def rows_in(self, written: Head) -> list[int] | None:
        """For each label its number in another head; None where that is for other labels."""
        if "regression" in (self.problem, written.problem):
            same = (self.problem, len(self.labels)) == (written.problem, len(written.labels))
            return list(range(len(self.labels))) if same else None
        if sorted(self.labels) != sorted(written.labels):
            return None
        return [written.labels.index(label) for label in self.labels]


def label_weights(base: nn.Module) -> dict[str, int]:
    """The weights with a part for each label, and the dimension that they have it in."""
    config = copy.deepcopy(base.config)
    config.num_labels += 1  # type: ignore[operator, union-attr]
    with torch.device("meta"):
        wider = type(base)(config)
    ours, theirs = dict(base.named_parameters()), dict(wider.named_parameters())
    return {
        name: next(dim for dim, size in enumerate(weight.shape) if theirs[name].shape[dim] != size)
        for name, weight in ours.items()
        if weight.shape != theirs[name].shape
    }


@torch.no_grad()
def draw_head(base: nn.Module, missing: list[str], seed: int) -> None:
    """Draw the weights that the files lack, equal in every process, and note the head's modules.

    Matrices are normal with the standard deviation of the model's configuration, biases are zero
    and scales one.
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
    """The head's modules, which train under every method; none where the base predicts tokens."""
    names: list[str] = getattr(base, _MODULES, [])
    return [name for name in names if next(base.get_submodule(name).parameters(), None) is not None]


def train_head(built: nn.Module) -> None:
    """Let the head train if the method froze it; PEFT trains a copy of the head by itself."""
    if not isinstance(built, PeftModel):
        for name in head_modules(built):
            built.get_submodule(name).requires_grad_(True)


@dataclass(frozen=True)
class Reading:
    """How a head reads an example: its first or last token, or, for "row", a whole row. The last
    token is never `pad`, since transformers looks for it in a padded row; where a tokenizer pads
    with EOS, it is the one before EOS.
    """

    backbone: nn.Module
    pooler: nn.Module | None
    place: Place
    segments: bool
    pad: int | None


def reading(model: nn.Module, place: Place) -> Reading:
    """The `Reading` of a built model, whether or not a strategy has wrapped it."""
    wrapped: Any = model
    base = wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped
    pooler = getattr(base.base_model, "pooler", None)
    segments = getattr(base.config, "type_vocab_size", 0) > 1
    pad = base.config.get_text_config().pad_token_id
    return Reading(base.base_model, pooler, place, segments, pad)


def example_logits(
    model: nn.Module, how: Reading, inputs: Mapping[str, Any], batch: MicroBatch
) -> Tensor:
    """`logits_EL` of the examples of a batch, in the order of its spans, float32 or wider."""
    inputs = {**inputs, **_segments(how, batch)}
    if how.place == "row":
        return wide(model(**inputs).logits[: len(batch.spans)])
    spans = [(span.row, span.start, span.stop) for span in batch.spans] or [(0, 0, 1)]
    device = batch.tokens_BS.device
    rows_E, places_E = torch.tensor(
        [(row, start if how.place == "first" else stop - 1) for row, start, stop in spans]
    ).T.to(device, non_blocking=True)
    if how.place == "last" and how.pad is not None:
        ends_E = batch.tokens_BS[rows_E, places_E] == how.pad
        places_E = (places_E - ends_E.long()).clamp_min(0)

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
        # The head is called as if each row had one token.
        stand_ins_E1 = torch.zeros_like(rows_E).unsqueeze(1)
        logits = model(input_ids=stand_ins_E1, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return wide(logits[: len(batch.spans)])


def wide(logits: Tensor) -> Tensor:
    """Logits as losses take them: float32 or wider."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _segments(how: Reading, batch: MicroBatch) -> dict[str, Tensor]:
    """Token types for models that take them: 0 for the first text of a pair, 1 for the second."""
    if not how.segments or SECOND not in batch.columns:
        return {}
    segments_BS = torch.zeros_like(batch.tokens_BS)
    places = [(span.row, span.start, span.stop) for span in batch.spans]
    places_E3 = torch.tensor(places, dtype=torch.int64).view(-1, 3)
    rows_E, starts_E, stops_E = places_E3.T.to(segments_BS.device, non_blocking=True)
    begins_E = starts_E + batch.columns[SECOND][:, 0].long()
    steps_S = torch.arange(segments_BS.shape[1], device=segments_BS.device)
    second_ES = (steps_S >= begins_E[:, None]) & (steps_S < stops_E[:, None])
    segments_BS.index_add_(0, rows_E, second_ES.long())
    return {"token_type_ids": segments_BS}
