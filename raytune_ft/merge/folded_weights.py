"""A base with an adapter folded in, computed row by row in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from raytune_ft.errors import ModelError
from raytune_ft.layout import ADAPTER_WEIGHTS
from raytune_ft.merge.adapter_plan import AdapterPlan, Delta, is_adapters, key_of, plan_adapter
from raytune_ft.merge.streaming_forward import Weights, converted, spans, whole
from raytune_ft.model.file_weights import Source
from raytune_ft.model.meta import Outline
from raytune_ft.tensors.read import TensorFiles


class Headed:
    """`Weights` of a base's files, under the names of the same model with a task head.

    Files of an encoder have no prefix, and those of a language model hold an output layer that is
    left out. Tensors that are converted on loading keep their names. A weight that no file holds
    belongs to the head: the adapter has its values, and in the base it is zero.
    """

    def __init__(self, files: Weights, outline: Outline) -> None:
        """`outline` describes `files`; `self.outline` describes these weights."""
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
        """Shapes by name; the head's come last."""
        held = {name: self._files.shapes[stored] for name, stored in self._stored.items()}
        return {**held, **self._new}

    def dtype(self, name: str) -> torch.dtype:
        """The files'; that of the head is the one of the first weight."""
        stored = next(iter(self._stored.values())) if name in self._new else self._stored[name]
        return self._files.dtype(stored)

    def rows(self, name: str, start: int, end: int) -> Tensor:
        if name in self._new:
            return torch.zeros(end - start, *self._new[name][1:])
        return self._files.rows(self._stored[name], start, end)


def _itself(name: str) -> Source:
    return Source(name, ((name, name),), None)


class Adapted:
    """`Weights` of base + adapter, under the names of the base's files.

    An output head that shares its weight with the input embedding gets a separate tensor if the
    adapter changes either of them: with a shared tensor one delta would change both or be lost.
    `tied`: they still share it.
    """

    def __init__(self, base: Weights, outline: Outline, adapter: Path) -> None:
        """`outline` describes `base`; PEFT's layers are put into its model.

        Raises:
            CheckpointError: the adapter is not of this base.
            ModelError: it cannot be folded.
        """
        self._base, self._outline = base, outline
        self._ties = dict(getattr(outline.model, "all_tied_weights_keys", None) or {})
        self._sources = dict(outline.sources)
        self.adapter = TensorFiles([adapter / ADAPTER_WEIGHTS])
        self.plan: AdapterPlan = plan_adapter(outline, adapter, self.adapter.shapes)
        self._targets: dict[str, str] = {}
        self._groups: dict[str, Source] = {}
        self._extra: dict[str, str] = {}
        self.tied = bool(self._ties)
        self._untie()
        for target, source in self._sources.items():
            self._place(target, source)
        self._factors = lru_cache(maxsize=1)(self._read_factors)
        self._lengths = lru_cache(maxsize=1)(self._measure_lengths)
        self._group = lru_cache(maxsize=1)(self._compute_group)
        self._layer = lru_cache(maxsize=1)(self._merge_layer)
        for key in self.plan.shared:
            getattr(self.plan.peft.base_model, key.split(".")[1])["default"] = whole(
                self.adapter, key
            ).float()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's shapes, and that of a head with a separate tensor."""
        extra = {name: self._base.shapes[origin] for name, origin in self._extra.items()}
        return {**self._base.shapes, **extra}

    def dtype(self, name: str) -> torch.dtype:
        """The base's."""
        return self._base.dtype(self._extra.get(name, name))

    def rows(self, name: str, start: int, end: int) -> Tensor:
        if name in self._groups:
            return self._group(self._groups[name].target)[name][start:end]
        stored = self._extra.get(name, name)
        target = self._targets.get(name)
        if target is None:
            return self._base.rows(stored, start, end)
        if key := self.plan.replaced.get(target):
            base = self.adapter.rows(key, start, end).float()
        else:
            base = self._base.rows(stored, start, end).float()
        delta = self.plan.deltas.get(target)
        if delta is not None and delta.kind == "layer":
            return self._layer(target.rpartition(".")[0])[target][start:end]
        return base if delta is None else self._fold(target, base, delta, start)

    def replaced(self) -> list[str]:
        """Names of the adapter's whole weights that differ from the base's; PEFT saves more."""
        return [
            target
            for target, key in self.plan.replaced.items()
            if not torch.equal(
                whole(self.adapter, key).float(), whole(self._base, self.stored(target)).float()
            )
        ]

    def stored(self, target: str) -> str:
        """The name in the files of a weight that is not converted on loading."""
        name = self._sources[target].tensors[0][1]
        return self._extra.get(name, name)

    def _fold(self, target: str, base: Tensor, delta: Delta, start: int) -> Tensor:
        folded = self._add(target, base, delta, start)
        if delta.magnitude is None:
            return folded
        lengths = self._lengths(target)
        scale = whole(self.adapter, delta.magnitude).float() / lengths
        if delta.kind == "columns":
            return folded * scale
        return folded * scale[start : start + len(base), None]

    def _add(self, target: str, base: Tensor, delta: Delta, start: int) -> Tensor:
        end = start + len(base)
        a, b = self._factors(target)
        if delta.kind == "bias":
            return base + delta.scale * b[start:end]
        if delta.kind == "rows":
            return base + delta.scale * (b[start:end] @ a)
        return base + delta.scale * (a[:, start:end].T @ b.T)

    @torch.no_grad()
    def _merge_layer(self, module: str) -> dict[str, Tensor]:
        """Weight and bias of a layer as PEFT merges them, in float32: only here is a whole layer in
        memory.
        """
        ends = [end for end in ("weight", "bias") if f"{module}.{end}" in self.plan.deltas]
        given = {end: whole(self._base, self.stored(f"{module}.{end}")).float() for end in ends}
        return self._merged(self.plan.deltas[f"{module}.weight"], module, given)

    def _merged(self, delta: Delta, module: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layer = delta.layer
        values = {
            name: whole(self.adapter, key_of(f"{delta.a}.{name}")).float()
            for name, _ in layer.named_parameters()
            if is_adapters(f".{name}")
        }
        values |= {f"base_layer.{end}": weight.clone() for end, weight in given.items()}
        absent = dict(layer.named_parameters())
        try:
            for name, value in values.items():
                _put(layer, name, nn.Parameter(value.view(absent[name].shape), False))
            layer.merge(adapter_names=["default"])
            base = layer.get_base_layer()
            return {f"{module}.{end}": getattr(base, end).detach() for end in given}
        finally:
            layer.merged_adapters.clear()
            for name in values:
                _put(layer, name, absent[name])

    def _read_factors(self, target: str) -> tuple[Tensor, Tensor]:
        delta = self.plan.deltas[target]
        b = whole(self.adapter, delta.b).float()
        return (whole(self.adapter, delta.a).float() if delta.a else b), b

    def _measure_lengths(self, target: str) -> Tensor:
        """The norm of every output's row of W + delta; DoRA keeps the row's direction."""
        delta = self.plan.deltas[target]
        name = self.stored(target)
        squares = []
        for start, end in spans(self._base.shapes[name]):
            moved = self._add(target, self._base.rows(name, start, end).float(), delta, start)
            squares.append(moved.double().square().sum(0 if delta.kind == "columns" else 1))
        total = sum(squares[1:], squares[0]) if delta.kind == "columns" else torch.cat(squares)
        return total.sqrt().float()

    def _untie(self) -> None:
        """Separate tied weights if the adapter changes any: config.json ties all or none."""
        if not {*self._ties, *self._ties.values()} & self.plan.touched:
            return
        self.tied = False
        for target, origin in self._ties.items():
            source = self._sources[origin]
            if source.converter is not None:
                raise ModelError(
                    f"{target} of the base",
                    "is tied and converted, and cannot be untied",
                    "write an adapter that leaves the embedding and the head alone",
                )
            stored = source.tensors[0][1]
            if target not in self._base.shapes:
                self._extra[target] = stored
            self._sources[target] = Source(target, ((target, target),), None)

    def _place(self, target: str, source: Source) -> None:
        """Note which tensors of the files the adapter changes for this weight of the model."""
        if source.converter is None:
            if target in self.plan.touched:
                self._targets[source.tensors[0][1]] = target
        elif target in self.plan.touched:
            for _, name in source.tensors:
                self._groups[name] = source

    @torch.no_grad()
    def _compute_group(self, first: str) -> dict[str, Tensor]:
        """Tensors that the model holds in another form, such as all experts in one tensor: all that
        are converted together, whole.
        """
        source = next(s for s in self._groups.values() if s.target == first)
        state = converted(source, self._outline, lambda name: whole(self._base, name))
        for target, weight in state.items():
            if key := self.plan.replaced.get(target):
                weight = state[target] = whole(self.adapter, key).float()
            delta = self.plan.deltas.get(target)
            if delta is not None and delta.kind == "layer":
                module, _, end = target.rpartition(".")
                state |= self._merged(delta, module, {end: weight})
            elif delta is not None:
                state[target] = weight + self._expert_delta(target, delta)
        found: dict[str, Tensor] = revert_weight_conversion(self._outline.pattern, state)
        return found

    def _expert_delta(self, target: str, delta: Delta) -> Tensor:
        if delta.kind == "rows":
            a, b = self._factors(target)
            return delta.scale * (b @ a)
        layer: Any = delta.layer
        absent = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a, b = self._factors(target)
        try:
            layer.lora_A["default"].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B["default"].weight = nn.Parameter(b, requires_grad=False)
            layer.get_param = lambda: torch.empty(0)  # PEFT reads only its dtype
            found: Tensor = layer.get_delta_weight("default")
            return found
        finally:
            layer.__dict__.pop("get_param", None)
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = absent

    def close(self) -> None:
        """Close the adapter's file."""
        self.adapter.__exit__()


def _put(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    layer.get_submodule(owner)._parameters[last] = parameter
