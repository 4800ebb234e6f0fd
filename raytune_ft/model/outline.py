"""A model without its weights, and which tensors of its files they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError
from raytune_ft.model.file_weights import NotInParts, Source
from raytune_ft.model.heads import Head
from raytune_ft.model.load import load_base
from raytune_ft.model.meta import fill_buffers, shadows, shapes_of
from raytune_ft.tensors.read import open_files


@dataclass(frozen=True)
class Outline:
    """A model whose weights are on the meta device, and which tensors of its files they are.

    `sources` go by the names of the model's weights and of the buffers that lie in the files. The
    other buffers are there. `pattern` is a copy that stays as it is, whatever is put into `model`.
    `head` is the task head that it was built with.
    """

    model: Any
    pattern: Any
    sources: dict[str, Source]
    files: tuple[Path, ...] = ()
    head: Head | None = None


def outline(
    model: ModelConfig, dtype: torch.dtype = torch.float32, head: Head | None = None
) -> Outline:
    """The model as `from_pretrained` would build it, and nothing of its files but their headers.

    Raises:
        ModelError: see `load_base`; or its weights can only be read all together.
    """
    try:
        with shadows() as seen:
            base = load_base(model, dtype, head)
        if not seen.files:
            raise NotInParts("transformers reads its files in a way of its own")
        with open_files(seen.files) as shards:
            fill_buffers(base, seen.sources, shards)
    except NotInParts as reason:
        raise ModelError(
            f"model.path={model.path}",
            f"cannot be read tensor by tensor, because {reason}",
            "write a model that transformers reads from safetensors as it is",
        ) from reason
    base = shapes_of(base)  # a head that the files lack was drawn, and is nobody's weights
    return Outline(base, copy.deepcopy(base), seen.sources, tuple(seen.files), head)


class BaseFiles:
    """The weights of a pretrained model, read from its files one by one."""

    def __init__(self, model: ModelConfig, head: Head | None = None) -> None:
        """
        Raises:
            ModelError: see `outline`.
        """
        self._outline = outline(model, head=head)

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """A weight in its shape, by the name that the model has for it."""
        with open_files(list(self._outline.files)) as shards:

            def read(name: str) -> Tensor:
                source = self._outline.sources[name]
                if source.converter is None:
                    return shards.whole(source.tensors[0][1])
                return source.weights(self._outline.pattern, shards.whole)[name]

            yield read
