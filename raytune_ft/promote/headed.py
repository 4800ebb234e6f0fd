"""A base under the task head that it was trained with, as weights that can be folded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from raytune_ft.model.file_weights import Source
from raytune_ft.model.outline import Outline
from raytune_ft.promote.weights import Weights


class Headed:
    """`Weights` of the files of a base, under the names that the model with the head has for them.

    Files of an encoder alone have no prefix there, and those of a language model hold an output
    layer that goes. What is converted on loading keeps its names. A weight that no file holds is
    the head's: an adapter has it, and as the base's it is zero.
    """

    def __init__(self, files: Weights, outline: Outline) -> None:
        """`outline` is of `files`; that of these weights is `self.outline`."""
        self._files = files
        self._stored: dict[str, str] = {}
        sources: dict[str, Source] = {}
        for target, source in outline.sources.items():
            if source.converter is None:
                self._stored[target] = source.tensors[0][1]
                sources[target] = _itself(target)
            else:
                self._stored |= {name: name for _, name in source.tensors}
                sources[target] = source
        tied = getattr(outline.pattern, "all_tied_weights_keys", None) or {}
        self._new = {
            name: tuple(parameter.shape)
            for name, parameter in outline.pattern.named_parameters()
            if name not in sources and name not in tied
        }
        self.outline = replace(outline, sources=sources | {n: _itself(n) for n in self._new})

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Weights`; the head last."""
        held = {name: self._files.shapes[stored] for name, stored in self._stored.items()}
        return {**held, **self._new}

    def dtype(self, name: str) -> torch.dtype:
        """See `Weights`."""
        return torch.float32 if name in self._new else self._files.dtype(self._stored[name])

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """See `Weights`."""
        if name in self._new:
            return torch.zeros(end - start, *self._new[name][1:])
        return self._files.rows(self._stored[name], start, end)


def _itself(name: str) -> Source:
    return Source(name, ((name, name),), None)
