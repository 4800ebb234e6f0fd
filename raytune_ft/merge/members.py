"""A merge of checkpoints as `Weights`: only the rows being merged are in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.files import read_object
from raytune_ft.layout import ADAPTER_CONFIG
from raytune_ft.merge.fold import Opened, open_checkpoint
from raytune_ft.merge.methods import Formula, MergeSettings, Position
from raytune_ft.merge.streaming_forward import CHUNK, Weights, row_count
from raytune_ft.merge.write_model import plan_hash
from raytune_ft.model.heads import Head
from raytune_ft.model.load import base_folder

REMEDY = "merge checkpoints of one base"


def check_members(base: Path, members: Sequence[Path]) -> None:
    """Check that the members are of one base, as far as their files name it.

    Raises:
        ModelError: adapters name different bases, or a tokenizer is not the base's.
    """
    named: dict[str, Path] = {}
    for member in members:
        config = read_object(member / ADAPTER_CONFIG)
        if config and config.get("base_model_name_or_path"):
            named.setdefault(_real(config["base_model_name_or_path"]), member)
        _check_tokenizer(base, member)
    if len(named) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        raise ModelError(
            str(second),
            f"is an adapter of {other}, and {first} is one of {one}",
            REMEDY,
        )


def _check_tokenizer(base: Path, member: Path) -> None:
    """Refuses another tokenizer: equal rows of the embeddings would stand for other tokens."""
    ours, theirs = read_object(base / "tokenizer.json"), read_object(member / "tokenizer.json")
    if ours and theirs and _vocabulary(ours) != _vocabulary(theirs):
        raise ModelError(
            str(member / "tokenizer.json"),
            f"is another tokenizer than the one in {base}",
            "merge checkpoints that share their tokenizer",
        )


def _vocabulary(tokenizer: dict[str, Any]) -> Any:
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return tokenizer.get("model", {}).get("vocab"), added


def _real(name: str) -> str:
    return os.path.realpath(name) if os.path.isdir(name) else name


class Merged:
    """`Weights` of a merge. Tensors of integers or booleans are the base's."""

    def __init__(
        self, formula: Formula, members: Sequence[Weights], base: Weights, settings: MergeSettings
    ) -> None:
        self._formula, self._members, self._base = formula, list(members), base
        self._settings = settings
        self._facts = lru_cache(maxsize=1)(self._measure)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's."""
        return self._base.shapes

    def dtype(self, name: str) -> torch.dtype:
        """The base's."""
        return self._base.dtype(name)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        if not self.dtype(name).is_floating_point:
            return self._base.rows(name, start, end)
        shape = self.shapes[name]
        row = 1
        for size in shape[1:]:
            row *= size
        facts = self._facts(name)
        made = [
            self._formula.combine(
                *self._read(name, low, high), self._settings, facts, Position(name, low * row)
            )
            for low, high in self._runs(name, start, end)
        ]
        return torch.cat(made) if len(made) > 1 else made[0]

    def _runs(self, name: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Spans of rows; the more members, the fewer rows at a time."""
        shape = self.shapes[name]
        run = max(1, CHUNK // (len(self._members) + 1) // max(1, torch.Size(shape[1:]).numel()))
        for low in range(start, end, run):
            yield low, min(low + run, end)

    def _read(self, name: str, start: int, end: int) -> tuple[list[Tensor], Tensor]:
        tensors = [member.rows(name, start, end).float() for member in self._members]
        return tensors, self._base.rows(name, start, end).float()

    def _measure(self, name: str) -> Any:
        if self._formula.measure is None:
            return None
        shape = self.shapes[name]

        def rows() -> Iterator[tuple[list[Tensor], Tensor]]:
            for low, high in self._runs(name, 0, row_count(shape)):
                yield self._read(name, low, high)

        return self._formula.measure(rows, torch.Size(shape).numel(), self._settings)


@dataclass(frozen=True)
class Untied:
    """Weights whose head is the input embedding, with a separate head of the same rows."""

    inner: Weights
    heads: Mapping[str, str]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The inner weights' shapes and the heads'."""
        own = self.inner.shapes
        return {**own, **{head: own[origin] for head, origin in self.heads.items()}}

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(self.heads.get(name, name))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        return self.inner.rows(self.heads.get(name, name), start, end)


@dataclass(frozen=True)
class Opening:
    """The base and the members, open."""

    base: Opened
    members: tuple[Opened, ...]

    def merged(self, formula: Formula, chosen: Sequence[int], settings: MergeSettings) -> Opened:
        """A merge of some of the members; -1 stands for the base.

        Raises:
            ConfigError: the formula takes another number of members.
        """
        most = formula.most
        if len(chosen) < formula.least or (most is not None and len(chosen) > most):
            raise ConfigError(
                f"promote.merge={formula.name}",
                f"takes {most or formula.least} models, and there are {len(chosen)}",
                f"write promote.top_k: {formula.least} or more, or another merge",
            )
        parts = [self.base if index < 0 else self.members[index] for index in chosen]
        weights = Merged(formula, [part.weights for part in parts], self.base.weights, settings)
        identity = [formula.name, repr(settings), [p.identity for p in (self.base, *parts)]]
        return Opened(weights, self.base.outline, self.base.tied, None, plan_hash(identity))


@contextmanager
def open_members(
    model: ModelConfig, members: Sequence[Path], head: Head | None = None
) -> Iterator[Opening]:
    """Open the base and its checkpoints, adapters of any rank or whole models, with equal shapes.

    With the task `head` of the checkpoints, the base has one as well, of zeros.

    Raises:
        ModelError, CheckpointError: they do not fit together; see `check_members` and `fold`.
    """
    folder = base_folder(model)
    check_members(folder, members)
    with ExitStack() as stack:
        every = (folder, *members)
        opened = [stack.enter_context(open_checkpoint(model, path, head)) for path in every]
        untied = next((one for one in opened if not one.tied), None)
        if untied is not None:
            opened = [_untie(one, untied) for one in opened]
        for path, one in zip(members, opened[1:], strict=True):
            _require_same_shapes(path, one.weights, opened[0].weights)
        yield Opening(opened[0], tuple(opened[1:]))


def _untie(one: Opened, like: Opened) -> Opened:
    if not one.tied:
        return one
    ties = one.outline.pattern.all_tied_weights_keys
    heads = {
        head: one.outline.sources[origin].tensors[0][1]
        for head, origin in ties.items()
        if head in like.weights.shapes and head not in one.weights.shapes
    }
    return Opened(Untied(one.weights, heads), one.outline, False, one.reference, one.identity)


def _require_same_shapes(path: Path, member: Weights, base: Weights) -> None:
    ours, theirs = dict(base.shapes), dict(member.shapes)
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise ModelError(
            str(path),
            f"holds other tensors than its base ({odd[0]} and {len(odd) - 1} more)",
            REMEDY,
        )
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise ModelError(
                str(path),
                f"holds {name} in the shape {list(theirs[name])}, and the base in {list(shape)}",
                REMEDY,
            )
