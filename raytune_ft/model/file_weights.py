"""Where the files of a pretrained model hold each of its weights, and how to read parts of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from raytune_ft.errors import ModelError
from raytune_ft.tensors.read import TensorFiles
from raytune_ft.tensors.write import Part


class NotInParts(Exception):
    """The weights of this model cannot be read part by part; the text says why."""


@dataclass(frozen=True)
class Source:
    """Tensors of the files that become one or several weights of the model.

    `tensors` holds pairs of a converter's pattern and a name in the files, in the order in which
    transformers takes them. Without a converter the first one is the weight, perhaps renamed.
    """

    target: str
    tensors: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    def weights(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What the converter makes of the tensors that `read` gives for their names."""
        assert self.converter is not None
        converter: Any = copy.deepcopy(self.converter)
        for pattern, name in self.tensors:
            converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: w[0] if isinstance(w, list) else w for name, w in made.items()}


def find_sources(model: nn.Module, files: TensorFiles, mapping: Iterable[Any]) -> dict[str, Source]:
    """Names of weights and buffers to their sources, by the rules by which transformers loads.

    `mapping` holds its renamings and converters for this model, as `from_pretrained` chose them.
    """
    mapping = copy.deepcopy(list(mapping))  # they take note of what they have seen
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix: Any = model.base_model_prefix
    found: dict[str, list[tuple[str, str]]] = {}
    rules: dict[str, WeightConverter | None] = {}
    for name in sorted(files.shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            rules.setdefault(target, by_pattern[pattern] if pattern is not None else None)
            found.setdefault(target, []).append((pattern or name, name))
    sources: dict[str, Source] = {}
    for target, tensors in found.items():
        source = Source(target, tuple(tensors), rules[target])
        sources |= dict.fromkeys(_targets(source, model, files), source)
    return sources


def _targets(source: Source, model: nn.Module, files: TensorFiles) -> Iterable[str]:
    """The weights that a source becomes, found out on tensors without memory."""
    if source.converter is None:
        return [source.target]

    def empty(name: str) -> Tensor:
        return torch.empty(files.shapes[name], device="meta")

    try:
        return list(source.weights(model, empty))
    except Exception as error:  # any operation of transformers, none of which promises this
        raise NotInParts(f"{source.target} cannot be converted alone ({error})") from error


def same_values(files: TensorFiles, one: str, other: str, dtype: torch.dtype) -> bool:
    """Do two tensors hold the same, once they are in `dtype`?"""
    shape = files.shapes[one]
    if files.shapes[other] != shape:
        return False
    size, run = math.prod(shape), 1 << 22
    for start in range(0, size, run):
        a, b = (files.elements(name, start, min(start + run, size)) for name in (one, other))
        if not torch.equal(a.to(dtype), b.to(dtype)):
            return False
    return True


@dataclass(frozen=True)
class Place:
    """Where one weight comes from: a name that `source` makes, in the dtype it is loaded in."""

    source: Source
    name: str
    dtype: torch.dtype

    def whole(self, model: nn.Module, files: TensorFiles) -> Tensor:
        """The weight in its shape."""
        if self.source.converter is None:
            return files.whole(self.source.tensors[0][1]).to(self.dtype)
        made = self.source.weights(model, lambda name: files.whole(name).to(self.dtype))
        return made[self.name]


class FileWeights:
    """The weights of a model that was built without them, waiting in its files.

    `places` has the parameters by the names of the built model. `pattern` is a model of the same
    class, without memory, for converters that ask for its shapes.
    """

    def __init__(self, files: list[Path], places: dict[str, Place], pattern: nn.Module) -> None:
        self._files, self._places, self._pattern = files, places, pattern

    def fill(self, parts: Mapping[str, Part]) -> None:
        """Read into parts what they are to hold, and no other element of a tensor that lies in
        the files as it is. What has to be converted is made whole, one weight at a time.

        Raises:
            ModelError: a file has gone or changed since.
        """
        try:
            with TensorFiles(self._files) as files:
                self._fill(parts, files)
        except ModelError as error:
            raise ModelError(
                f"model.path={self._files[0].parent}",
                f"cannot be read ({error.value} {error.rule})",
                "run it again",
            ) from error

    @torch.no_grad()
    def _fill(self, parts: Mapping[str, Part], files: TensorFiles) -> None:
        converted: dict[int, dict[str, tuple[Part, Place]]] = {}
        for name, place in self._places.items():
            part = parts[name]
            if place.source.converter is None:
                narrower = None if part.values.dtype == place.dtype else place.dtype
                files.fill(part, place.source.tensors[0][1], narrower)
            elif part.values.numel():
                converted.setdefault(id(place.source), {})[place.name] = part, place
        for wanted in converted.values():
            _, place = next(iter(wanted.values()))
            dtype = place.dtype
            made = place.source.weights(self._pattern, lambda n, d=dtype: files.whole(n).to(d))  # type: ignore[misc]
            for name, (part, _) in wanted.items():
                part.values.copy_(made[name].reshape(-1)[part.start : part.end])
            del made
