"""Write an adapter, or a Hugging Face model in the dtype of its base, for other programs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from raytune_ft.files import flush_file, write_json_atomic
from raytune_ft.layout import MODEL_INDEX, shard_name
from raytune_ft.model.blocks import find_blocks
from raytune_ft.model.meta import BaseFiles, shapes_of
from raytune_ft.model.methods import adapter_writer, trained_parameters
from raytune_ft.model.methods.hooks import Read
from raytune_ft.records import FileRecord
from raytune_ft.tensors.write import Entry, ignore, write_tensors


class Exporter:
    """Made before a strategy lays the model out, and independent of the model afterwards.

    To save a sharded module would start collectives from the thread of one rank.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        frozen: BaseFiles | None = None,
        own: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """`frozen`: the base's files, for a model of which only some weights train. `own`: dtypes
        of the tensors of its files, for those that are not of `dtype`.
        """
        saver = model
        if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
            # PEFT reads the state of such modules, for which a sharded model would gather and free
            # its weights in the middle of a step.
            saver = shapes_of(model)
        self._write_adapter, self._one = adapter_writer(model, saver), Lock()
        self._names = list(trained_parameters(model))
        if self._write_adapter is None:
            self._model = _HuggingFaceModel(model, dtype, own or {})
            self._frozen = frozen

    def save(
        self,
        read: Read,
        directory: Path,
        rank: int,
        world_size: int,
        wrote: Callable[[int], None] = ignore,
    ) -> list[FileRecord]:
        """Add this rank's files to `directory` and return their records.

        Rank 0 writes an adapter. Of a model each rank writes some blocks, one after another, so
        that it holds one of them at a time.
        """
        if self._write_adapter is None:
            with self._reading(read) as either:
                return self._model.save(either, directory, rank, world_size, wrote)
        if rank > 0:
            return []
        before = set(directory.rglob("*"))
        with self._one:  # PEFT changes its configuration while it saves
            self._write_adapter(read, directory)
        made = sorted(path for path in set(directory.rglob("*")) - before if path.is_file())
        return [flush_file(path, directory) for path in made]

    @contextmanager
    def _reading(self, read: Read) -> Iterator[Read]:
        """A reader that takes frozen weights, which no checkpoint holds, from the base's files."""
        if self._frozen is None:
            yield read
            return
        trained = set(self._names)
        with self._frozen.open() as of_base:
            yield lambda name: read(name) if name in trained else of_base(name)


class _HuggingFaceModel:
    """The classes and configuration of a model, without its weights."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, own: Mapping[str, torch.dtype]
    ) -> None:
        self._dtype, self._own = dtype, own
        with torch.device("meta"):
            shell: Any = type(model)(copy.deepcopy(model.config))
        self._shell = shell
        if shell.can_generate():
            shell.generation_config = model.generation_config
        self._shell._weight_conversions = getattr(model, "_weight_conversions", None)
        self._rest: dict[str, Tensor] = revert_weight_conversion(shell, _saved_buffers(model))
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        self._units = _units(model, list(self._shapes))

    def save(
        self,
        read: Read,
        directory: Path,
        rank: int,
        world_size: int,
        wrote: Callable[[int], None] = ignore,
    ) -> list[FileRecord]:
        shares = self._shares(world_size)
        entries = [self._entries(share) for share in shares]
        records = []
        mine = self._tensors(shares[rank], read)
        if rank == 0:
            entries[0] += [Entry(n, t.dtype, tuple(t.shape)) for n, t in self._rest.items()]
            names = [shard_name("model", other, world_size) for other in range(world_size)]
            records += self._save_config(directory, set(names))
            if world_size > 1:
                records.append(write_index(directory, list(zip(names, entries, strict=True))))
        name = shard_name("model", rank, world_size)
        rest = self._rest.values() if rank == 0 else ()
        if entries[rank]:
            records.append(
                write_tensors(directory, name, entries[rank], chain(mine, rest), wrote=wrote)
            )
        return records

    def _shares(self, world_size: int) -> list[list[list[str]]]:
        """The units of each rank, in order, with about as many elements each."""
        sizes = [sum(self._shapes[name].numel() for name in unit) for unit in self._units]
        shares: list[list[list[str]]] = [[] for _ in range(world_size)]
        before, total = 0, sum(sizes)
        for unit, size in zip(self._units, sizes, strict=True):
            shares[min(world_size - 1, (before + size // 2) * world_size // total)].append(unit)
            before += size
        return shares

    def _entries(self, share: list[list[str]]) -> list[Entry]:
        """Names, dtypes and shapes of what `_tensors` will give, from meta tensors."""

        def empty(name: str) -> Tensor:
            return torch.empty(self._shapes[name], device="meta")

        return [
            Entry(name, tensor.dtype, tuple(tensor.shape))
            for unit in share
            for name, tensor in self._as_on_disk(unit, empty)
        ]

    def _tensors(self, share: list[list[str]], read: Read) -> Iterator[Tensor]:
        for unit in share:
            for _, tensor in self._as_on_disk(unit, read):
                yield tensor

    def _as_on_disk(self, unit: list[str], read: Read) -> list[tuple[str, Tensor]]:
        """Weights with the names, dtypes and layout of the model's files, which transformers may
        convert on loading, for example by joining experts in one tensor. Those of an encoder have
        another prefix under a head.
        """
        state = revert_weight_conversion(self._shell, {name: read(name) for name in unit})
        prefix = f"{self._shell.base_model_prefix}."

        def dtype(name: str) -> torch.dtype:
            return self._own.get(name, self._own.get(name.removeprefix(prefix), self._dtype))

        return [(name, tensor.to(dtype(name))) for name, tensor in sorted(state.items())]

    def _save_config(self, directory: Path, weights: set[str]) -> list[FileRecord]:
        """Records of the files made here; other ranks write those of `weights` meanwhile."""
        before = set(directory.iterdir())
        save_configs(self._shell, self._dtype, directory)
        made = sorted(p for p in set(directory.iterdir()) - before if p.name not in weights)
        return [flush_file(path, directory) for path in made]


def save_configs(shell: Any, dtype: torch.dtype, directory: Path) -> None:
    """What `save_pretrained` writes beside the weights of a model in `dtype`."""
    shell.config.dtype = str(dtype).removeprefix("torch.")
    shell.config.architectures = [type(shell).__name__]
    if shell.is_remote_code():
        custom_object_save(shell, str(directory), config=shell.config)
    shell.config.save_pretrained(str(directory))
    if shell.can_generate():
        shell.generation_config.save_pretrained(str(directory))


def _units(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Groups of weights that are converted together: those of a block, and each other alone."""
    prefixes = [f"{name}." for name in find_blocks(model)]
    units: dict[str, list[str]] = {}
    for name in names:
        owner = next((prefix for prefix in prefixes if name.startswith(prefix)), name)
        units.setdefault(owner, []).append(name)
    return list(units.values())


def write_index(directory: Path, shards: Sequence[tuple[str, Sequence[Entry]]]) -> FileRecord:
    """Write the index that names the file of each tensor."""
    files = {entry.name: name for name, entries in shards for entry in entries}
    size = sum(torch.Size(e.shape).numel() * e.dtype.itemsize for _, held in shards for e in held)
    path = directory / MODEL_INDEX
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    write_json_atomic(path, content)
    return flush_file(path, directory)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of persistent buffers; tied weights are left out, since they are saved once."""
    weights = {name for name, _ in model.named_parameters()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in weights and name not in tied
    }
