"""What a model's configuration says about rows: how long they may be, and which change others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from raytune_ft.data.batch import Apart

_OF_LENGTH = re.compile("position|window|chunk")


def apart_of(config: Any) -> Apart:
    """Which rows may not share a forward pass, because transformers chooses the frequencies of
    rotary positions by the longest of them.
    """
    thresholds, each_above = set[int](), list[int]()
    for kind, scaling, text in _rotations(config):
        if kind == "longrope":
            thresholds.add(scaling["original_max_position_embeddings"])
        elif "dynamic" in kind:
            each_above.append(text.max_position_embeddings)
    return Apart(tuple(sorted(thresholds)), min(each_above, default=None))


def _rotations(config: Any) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """Kind and parameters of the rotary positions of every type of layer, and whose they are."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    nested = [each for each in found.values() if isinstance(each, Mapping)]
    for each in nested or [found]:
        yield each.get("rope_type", "default"), each, text


def notes_of(config: Any, extent: tuple[int, int]) -> tuple[str, ...]:
    """What `plan` and a run say where examples from the shortest to the longest are kept apart."""
    apart, (shortest, longest) = apart_of(config), extent
    kinds = ", ".join(sorted({kind for kind, *_ in _rotations(config)}))
    because = f"because the model's rotary positions ({kinds}) depend on the longest row of a pass"
    notes = [
        f"rows of up to {threshold} tokens and longer ones do not share a micro-batch, {because}"
        for threshold in apart.thresholds
        if shortest <= threshold < longest
    ]
    if apart.each_above is not None and apart.each_above < longest:
        notes.append(
            f"rows of more than {apart.each_above} tokens share a micro-batch only with rows of "
            f"the same length, {because}"
        )
    return tuple(notes)


def thresholds_of(config: Any, longest: int) -> list[int]:
    """Lengths below `longest` that the configuration names: of windows, chunks and positions."""

    def named(content: Any) -> Iterator[int]:
        for key, value in content.items():
            if isinstance(value, dict):
                yield from named(value)
            elif isinstance(value, int) and _OF_LENGTH.search(key):
                yield value

    return sorted(
        {each for each in named(config.get_text_config().to_dict()) if 1 < each < longest}
    )


def usable_positions(model: Any) -> int | None:
    """The longest row that a model can take; None where nothing limits it."""
    config = model.config.get_text_config()
    written: int | None = getattr(config, "max_position_embeddings", None)
    if written is None:
        return None
    found = [written]
    for name, module in model.named_modules():
        # A table that is computed, as XGLM's, grows with the row.
        learnt = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if learnt and module.padding_idx is not None:
            # As in RoBERTa, where positions begin after that of padding.
            found.append(len(module.weight) - module.padding_idx - 1)
    factors = [each["factor"] for kind, each, _ in _rotations(model.config) if "dynamic" in kind]
    return int(min(found) * min(factors, default=1))


def forget_longest(base: nn.Module) -> None:
    """Let dynamic rotary positions depend on the rows of a pass, not on those of earlier passes."""

    def forget(module: Any, arguments: Any, options: Any) -> None:
        for name in vars(module):  # one for each type of layer
            if name.endswith("max_seq_len_cached"):
                setattr(module, name, 0)

    for module in base.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(forget, with_kwargs=True)
