"""Run a model whose weights are not in memory: every layer gets its weights only while it runs.

So the logits of a model of any size can be computed on a machine that cannot hold it. Layers
compute in float32. Wide linear layers compute some outputs at a time, and of an embedding only the
rows of the given tokens are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.model.file_weights import Source
from raytune_ft.model.meta import Outline

CHUNK = 1 << 22
"""Elements at a time: 16 MB in float32; a computation holds several such chunks."""


class Weights(Protocol):
    """A model's tensors. `TensorFiles` is one."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by name, in the order of the file."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which it is written."""
        ...

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end`: in float32 if they were computed, else in the file's dtype. A
        scalar has one row.
        """
        ...


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor; a scalar has 1."""
    return shape[0] if shape else 1


def spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Spans of a tensor's rows, each of at most `CHUNK` elements or of one row."""
    run = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, row_count(shape), run):
        yield start, min(start + run, row_count(shape))


def whole(weights: Weights, name: str) -> Tensor:
    """A whole tensor."""
    return weights.rows(name, 0, row_count(weights.shapes[name]))


def converted(source: Source, outline: Outline, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The model's weights, in float32, that are made of the source's tensors."""
    if source.converter is None:
        return {source.target: read(source.tensors[0][1]).float()}
    return source.weights(outline.pattern, lambda name: read(name).float())


Rows = Callable[[int, int], Tensor]
"""(start, end) -> these rows of a weight, in float32."""
Find = Callable[[str], "Read"]


class Read:
    """One weight: its shape, and how its rows are read."""

    def __init__(self, shape: tuple[int, ...], rows: Rows) -> None:
        self.shape, self.rows = shape, rows

    def whole(self) -> Tensor:
        """All rows."""
        return self.rows(0, self.shape[0] if self.shape else 1)


@torch.no_grad()
def logits(
    model: nn.Module, find: Find, examples: Sequence[Tensor], head_pad: int | None = None
) -> Tensor:
    """`[N, V]`: the logits of all examples one after another.

    `find` gives the weights on the meta device by their names. Examples `[S]` are padded on the
    right, which no token of a causal model attends to. A task head gives `[E, L]`, and finds the
    ends of examples by the padding token `head_pad` and a mask.
    """
    width = max(len(ids) for ids in examples)
    tokens_BS = torch.stack(
        [F.pad(ids, (0, width - len(ids)), value=head_pad or 0) for ids in examples]
    )
    inputs = {"input_ids": tokens_BS}
    if head_pad is not None:
        lengths = torch.tensor([len(ids) for ids in examples])
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    model.eval()
    with _served(model, find):
        found = model(**inputs, use_cache=False).logits
    if head_pad is not None:
        return found.float()
    return torch.cat([row[: len(ids)] for row, ids in zip(found, examples, strict=True)]).float()


@contextmanager
def _served(model: nn.Module, find: Find) -> Iterator[None]:
    handles, linears = [], []
    for path, module in model.named_modules():
        if type(module) is nn.Linear and module.weight.is_meta:
            if module.weight.numel() > CHUNK:
                read = find(_join(path, "weight"))
                bias = find(_join(path, "bias")) if module.bias is not None else None
                module.forward = partial(_linear, module, read, bias)  # type: ignore[method-assign]
                linears.append(module)
                continue
        elif isinstance(module, nn.Embedding) and module.weight.is_meta:
            server: Any = _EmbeddingRows(find(_join(path, "weight")))
            handles += [
                module.register_forward_pre_hook(server.before),
                module.register_forward_hook(server.after),
            ]
            continue
        names = _own(module)
        if names:
            server = _Whole(path, names, find)
            handles += [
                module.register_forward_pre_hook(server.before, with_kwargs=True),
                module.register_forward_hook(server.after),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in linears:
            del module.forward


def _own(module: nn.Module) -> list[str]:
    """The weights that a module uses itself; PEFT's layers also use those of their submodules."""
    if isinstance(module, BaseTunerLayer):
        plain = isinstance(module, LoraLinear | LoraEmbedding)
        dora = bool(getattr(module, "lora_magnitude_vector", None))
        names = [name for name, p in module.named_parameters() if p.is_meta]
        if plain and not dora:
            return [name for name in names if not name.startswith("base_layer.")]
        return names
    return [name for name, p in module.named_parameters(recurse=False) if p.is_meta]


class _Whole:
    def __init__(self, path: str, names: list[str], find: Find) -> None:
        self._path, self._names, self._find = path, names, find
        self._absent: list[tuple[nn.Module, str, Any]] = []

    def before(self, module: nn.Module, arguments: Any, options: Any) -> None:
        for name in self._names:
            owner_name, _, last = name.rpartition(".")
            owner = module.get_submodule(owner_name)
            absent = owner._parameters.get(last)
            if absent is None or not absent.is_meta:  # an outer layer has it already
                continue
            value = self._find(_join(self._path, name)).whole().float().view(absent.shape)
            owner._parameters[last] = nn.Parameter(value, requires_grad=False)
            self._absent.append((owner, last, absent))

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        while self._absent:
            owner, name, absent = self._absent.pop()
            owner._parameters[name] = absent


class _EmbeddingRows:
    """The layer gets a small table of the rows it needs, and tokens that index that table."""

    def __init__(self, read: Read) -> None:
        self._read, self._absent = read, None

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if not module.weight.is_meta:  # an outer layer has it already
            return None
        ids, places = torch.unique(arguments[0], return_inverse=True)
        self._absent = module._parameters["weight"]  # type: ignore[assignment]
        rows = torch.cat([self._read.rows(int(i), int(i) + 1) for i in ids]).float()
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        module.__dict__["_padding"], module.padding_idx = module.padding_idx, None  # type: ignore
        return (places, *arguments[1:])

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._absent is not None:
            module._parameters["weight"] = self._absent
            module.padding_idx = module.__dict__.pop("_padding")
            self._absent = None


def _linear(module: nn.Linear, read: Read, bias: Read | None, x: Tensor) -> Tensor:
    if not module.weight.is_meta:  # an outer layer has it already
        return F.linear(x, module.weight, module.bias)
    run = max(1, CHUNK // math.prod(read.shape[1:]))
    outputs = [
        F.linear(x, read.rows(start, min(start + run, read.shape[0])).float())
        for start in range(0, read.shape[0], run)
    ]
    y = torch.cat(outputs, -1)
    return y if bias is None else y + bias.whole().float()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
