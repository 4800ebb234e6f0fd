"""What methods that work on activations have in common: hooks in a frozen model, and their state.

Shapes: B rows, S tokens of a row, K tokens that a method touches, H hidden units.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from raytune_ft.data.batch import MicroBatch
from raytune_ft.errors import ModelError
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.model.blocks import find_blocks

Read = Callable[[str], Tensor]
"""A trained weight in its whole shape, by its name."""
_ATTRIBUTE = "raytune_ft_attached"


class Attached:
    """Hooks of one method in one model; its trained weights are modules inside the model.

    While a forward pass sees a `MicroBatch`, the hooks know where its examples stand. Without one,
    as in generation, a pass that begins a cache is a batch of prompts, padded on the left.
    """

    by_example = True
    """May the tokens of an example be taken out of their row for attention?"""
    unpackable: str | None = None
    """Why rows of several examples cannot be exact, None where they can."""

    def __init__(self, model: nn.Module) -> None:
        self.enabled = True
        self.batch: MicroBatch | None = None
        setattr(model, _ATTRIBUTE, self)

    @property
    def virtual(self) -> int:
        """Places that every example has in its row before its first token."""
        return 0

    @contextmanager
    def seeing(self, batch: MicroBatch) -> Iterator[None]:
        """Inside, forward passes are of `batch`."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes what its base does."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @contextmanager
    def generating(self, ids_BS: Tensor, mask_BS: Tensor) -> Iterator[dict[str, Any]]:
        """Arguments of `generate` for prompts padded on the left, which may be longer in front."""
        yield {"input_ids": ids_BS, "attention_mask": mask_BS}

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Of `adapter_config.json` and of `adapter_model.safetensors`."""
        raise NotImplementedError

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `contents` gave. Raises KeyError or RuntimeError for those of another."""
        raise NotImplementedError

    def save(self, read: Read, directory: Path) -> None:
        """Weights and how to use them, for whoever loads them without this package."""
        config, tensors = self.contents(read)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(kept, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def attached(model: nn.Module) -> Attached | None:
    """The method's hooks in a model, None where no method has put any there."""
    return getattr(model, _ATTRIBUTE, None)


def virtual_tokens(model: nn.Module) -> int:
    """See `Attached.virtual`; 0 for all other models."""
    found = attached(model)
    return 0 if found is None else found.virtual


def seeing(model: nn.Module, batch: MicroBatch) -> AbstractContextManager[None]:
    """Tell the method's hooks, if there are any, which batch the forward inside is of."""
    found = attached(model)
    return nullcontext() if found is None else found.seeing(batch)


def first_of(output: Any) -> Tensor:
    """The hidden states among what a module returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_first(output: Any, states: Tensor) -> Any:
    """The same with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def begins_cache(inputs: Mapping[str, Any]) -> bool:
    """Does a forward with these arguments see its tokens for the first time?"""
    cache = inputs.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def width_of(model: nn.Module) -> int:
    """Hidden units of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def base_name(model: nn.Module) -> str:
    """What a saved adapter calls its base."""
    return str(getattr(model, "name_or_path", "") or "")


def chosen_blocks(model: nn.Module, layers: str | list[int]) -> dict[int, tuple[str, nn.Module]]:
    """Blocks of the decoder by number, with their names in the model.

    Raises:
        ModelError: one that is asked for is not there.
    """
    config: Any = model.config
    blocks = list(find_blocks(model).items())
    count = getattr(config.get_text_config(), "num_hidden_layers", len(blocks))
    if len(blocks) != count:  # a tower beside the decoder has blocks as well
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        inside = {id(module) for module in decoder.modules()}
        blocks = [(name, block) for name, block in blocks if id(block) in inside]
    numbers = list(range(len(blocks))) if isinstance(layers, str) else layers
    missing = next((number for number in numbers if number >= len(blocks)), None)
    if missing is not None:
        raise ModelError(
            f"method.layers={layers}",
            f"names block {missing}, and this {type(model).__name__} has {len(blocks)}",
            f"write all, or numbers from 0 to {len(blocks) - 1}",
        )
    return {number: blocks[number] for number in sorted(numbers)}
