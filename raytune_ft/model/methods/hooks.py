"""Methods that work on activations: hooks in a frozen model, and how their weights are saved.

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
    """Whether attention may take the tokens of an example out of their row."""
    unpackable: str | None = None
    """Why a row cannot hold several examples, None where it can."""

    def __init__(self, model: nn.Module) -> None:
        self.enabled = True
        self.batch: MicroBatch | None = None
        setattr(model, _ATTRIBUTE, self)

    @property
    def virtual(self) -> int:
        """Positions that every example has in its row before its first token."""
        return 0

    @contextmanager
    def seeing(self, batch: MicroBatch) -> Iterator[None]:
        """A context whose forward passes are of `batch`."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model computes what its base does."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @contextmanager
    def generating(self, ids_BS: Tensor, mask_BS: Tensor) -> Iterator[dict[str, Any]]:
        """Arguments of `generate` for prompts padded on the left; rows may get longer there."""
        yield {"input_ids": ids_BS, "attention_mask": mask_BS}

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The contents of `adapter_config.json` and of `adapter_model.safetensors`."""
        raise NotImplementedError

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of `contents`. Raises KeyError or RuntimeError if others are given."""
        raise NotImplementedError

    def save(self, read: Read, directory: Path) -> None:
        """Write both files, which can be used without this package."""
        config, tensors = self.contents(read)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (directory / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(kept, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def attached(model: nn.Module) -> Attached | None:
    """The hooks of the model's method, None where it has none."""
    return getattr(model, _ATTRIBUTE, None)


def virtual_tokens(model: nn.Module) -> int:
    """Positions before the first token of every example; 0 without hooks."""
    found = attached(model)
    return 0 if found is None else found.virtual


def seeing(model: nn.Module, batch: MicroBatch) -> AbstractContextManager[None]:
    """A context whose forward passes are of `batch`, for the hooks of the model if it has any."""
    found = attached(model)
    return nullcontext() if found is None else found.seeing(batch)


def first_of(output: Any) -> Tensor:
    """The hidden states among what a module returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def with_first(output: Any, states: Tensor) -> Any:
    """The output of a module with its hidden states replaced."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def begins_cache(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward pass with these arguments starts at the first token of its rows."""
    cache = inputs.get("past_key_values")
    return cache is None or cache.get_seq_length() == 0


def width_of(model: nn.Module) -> int:
    """Hidden units of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def base_name(model: nn.Module) -> str:
    """The name or path of the base that a saved adapter refers to."""
    return str(getattr(model, "name_or_path", "") or "")


def chosen_blocks(model: nn.Module, layers: str | list[int]) -> dict[int, tuple[str, nn.Module]]:
    """Blocks of the decoder by number, with their names in the model.

    Raises:
        ModelError: the model has no block of that number.
    """
    config: Any = model.config
    blocks = list(find_blocks(model).items())
    count = getattr(config.get_text_config(), "num_hidden_layers", len(blocks))
    if len(blocks) != count:  # another tower beside the decoder has blocks too
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
