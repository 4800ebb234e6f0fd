"""Run a model whose weights are not in memory: every operation gets its weights while it runs.

So the logits of a model of any size can be computed on a machine that cannot hold it. It
computes in float32. Wide linear layers compute some outputs at a time, and of an embedding only the
rows of the given tokens are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from raytune_ft.model.file_weights import Source
from raytune_ft.model.meta import Outline

CHUNK = 1 << 22
"""Elements at a time: 16 MB in float32; a computation holds several such chunks."""
CPU = torch.device("cpu")
_DEVICE = Tensor.device.__get__
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point),
}
"""What a weight on the meta device says of itself rightly."""


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
    with _Serving(model, find):
        found = model(**inputs, use_cache=False).logits
    if head_pad is not None:
        return found.float()
    return torch.cat([row[: len(ids)] for row, ids in zip(found, examples, strict=True)]).float()


class _Serving(TorchFunctionMode):
    """Inside, every operation that takes a weight on the meta device gets its values.

    So it does not matter which module a weight belongs to and which code uses it: a layer may take
    the weight of a layer inside it, or a parameter that is no layer's `weight`.
    """

    def __init__(self, model: nn.Module, find: Find) -> None:
        super().__init__()
        self._find = find
        self._absent = {id(p): (name, p) for name, p in model.named_parameters() if p.is_meta}
        self._owner, self._held = "", dict[str, Tensor]()

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FACTS:
            return function(*args, **kwargs)
        if function == _DEVICE:
            return CPU if id(args[0]) in self._absent else function(*args, **kwargs)
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        wide = id(weight) in self._absent and weight.numel() > CHUNK
        if wide and function is F.linear:
            return self._linear(*args, **kwargs)
        if wide and function is F.embedding:
            return self._embedding(*args, **kwargs)
        return function(*self._served(args), **self._served(kwargs))

    def _served(self, given: Any) -> Any:
        """The same arguments, with values in place of the weights among them."""
        if isinstance(given, dict):
            return {key: self._served(value) for key, value in given.items()}
        if type(given) in (list, tuple):
            return type(given)(map(self._served, given))
        return self._whole(id(given)) if id(given) in self._absent else given

    def _whole(self, key: int) -> Tensor:
        """Those of one module stay in memory together: experts are taken in a loop over them."""
        name, absent = self._absent[key]
        owner = name.rpartition(".")[0]
        if owner != self._owner:
            self._owner, self._held = owner, {}
        if name not in self._held:
            self._held[name] = self._find(name).whole().float().view(absent.shape)
        return self._held[name]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        read = self._find(self._absent[id(weight)][0])
        outputs = [F.linear(x, read.rows(*span).float()) for span in spans(read.shape)]
        y = torch.cat(outputs, -1)
        return y if bias is None else y + self._served(bias)

    def _embedding(self, ids: Tensor, weight: Tensor, *others: Any, **options: Any) -> Tensor:
        """Of a table without `max_norm`; its other options concern gradients."""
        read = self._find(self._absent[id(weight)][0])
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = [read.rows(int(i), int(i) + 1).float() for i in wanted]
        return F.embedding(places, torch.cat(rows))
