"""A merge of adapters as one adapter of a chosen rank: the nearest one, by SVD (Eckart-Young)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ModelError, StorageError
from raytune_ft.files import new_folder
from raytune_ft.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from raytune_ft.merge.adapter_plan import Delta
from raytune_ft.merge.folded_weights import Adapted
from raytune_ft.merge.members import Opening, Untied, open_members
from raytune_ft.merge.methods import LINEAR, Formula, MergeSettings
from raytune_ft.merge.streaming_forward import whole
from raytune_ft.tensors.write import Entry, write_tensors

_OVERSAMPLE, _ITERATIONS = 16, 6


@dataclass(frozen=True)
class Refactored:
    """`lost`: what the rank cannot hold, as a share of the merged delta's Frobenius norm."""

    path: Path
    rank: int
    lost: float


def refactor(
    model: ModelConfig,
    members: Sequence[Path],
    target: Path,
    rank: int,
    formula: Formula = LINEAR,
    settings: MergeSettings | None = None,
) -> Refactored:
    """Write the merge of some adapters of `model` as one PEFT adapter into the new folder `target`.

    A merge that is a sum of deltas (`formula.shares`) is decomposed exactly, from the factors
    alone. For any other merge, and for DoRA, the delta of every weight is computed and decomposed
    by a randomised SVD (Halko et al., arXiv 0909.4061).

    Raises:
        ModelError: members that are not adapters, that hold whole weights or biases, or that do not
            fit together.
        StorageError: `target` exists.
    """
    settings = settings or MergeSettings()
    if target.exists():
        raise StorageError(str(target), "exists", "write another directory")
    with open_members(model, members) as opening:
        adapters = [
            _adapter(path, one.weights) for path, one in zip(members, opening.members, strict=True)
        ]
        deltas = _targets(members, adapters)
        plain = all(d.magnitude is None for a in adapters for d in a.plan.deltas.values())
        if plain and formula.shares is not None:
            found = _from_factors(adapters, deltas, formula.shares(settings, len(adapters)), rank)
        else:
            found = _from_deltas(opening, adapters, deltas, formula, settings, rank)
        tensors: dict[str, Tensor] = {}
        kept = total = 0.0
        for name, (a, b, held, all_of_it) in found:
            delta = deltas[name]
            tensors |= {delta.a: a.contiguous(), delta.b: b.contiguous()}
            kept, total = kept + held, total + all_of_it
        config = asdict(adapters[0].plan.config)
    _write(target, tensors, config, rank, sorted(map(_module, deltas)), model)
    return Refactored(target, rank, max(0.0, 1 - kept / total) ** 0.5 if total else 0.0)


def _adapter(path: Path, weights: Any) -> Adapted:
    inner = weights.inner if isinstance(weights, Untied) else weights
    if not isinstance(inner, Adapted):
        raise ModelError(
            str(path), "is a whole model, not an adapter", "merge adapters, or leave the rank out"
        )
    return inner


def _targets(members: Sequence[Path], adapters: Sequence[Adapted]) -> Mapping[str, Delta]:
    deltas: dict[str, Delta] = {}
    for path, adapter in zip(members, adapters, strict=True):
        for name, delta in adapter.plan.deltas.items():
            if delta.kind in ("experts", "bias") or delta.layer is not None:
                raise _whole_weights(path, name)
            deltas.setdefault(name, delta)
        if changed := adapter.replaced():
            raise _whole_weights(path, min(changed))
    return deltas


def _whole_weights(path: Path, name: str) -> ModelError:
    return ModelError(
        str(path),
        f"changes {name} by more than two factors of a layer",
        "leave the rank out, which folds the merge",
    )


Found = tuple[Tensor, Tensor, float, float]
"""A `[r, in]`, B `[out, r]`, and the squared norms of B @ A and of the whole delta."""


def _from_factors(
    adapters: Sequence[Adapted], deltas: Mapping[str, Delta], shares: Sequence[float], rank: int
) -> Iterator[tuple[str, Found]]:
    """Side by side, factors of ranks r1, r2, ... are factors of the sum, of rank r1 + r2 + ..."""
    for name in deltas:
        ones, others = [], []
        for adapter, share in zip(adapters, shares, strict=True):
            if (delta := adapter.plan.deltas.get(name)) is not None:
                ones.append(whole(adapter.adapter, delta.a).double())
                others.append(share * delta.scale * whole(adapter.adapter, delta.b).double())
        a, b = torch.cat(ones), torch.cat(others, 1)
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        yield name, _split(q_b @ u[:, : len(s)], s, vh[: len(s)] @ q_a.T, rank, s.square().sum())


def _from_deltas(
    opening: Opening,
    adapters: Sequence[Adapted],
    deltas: Mapping[str, Delta],
    formula: Formula,
    settings: MergeSettings,
    rank: int,
) -> Iterator[tuple[str, Found]]:
    merged = opening.merged(formula, range(len(adapters)), settings).weights
    for name, like in deltas.items():
        stored = name if name in merged.shapes else adapters[0].stored(name)
        delta = whole(merged, stored).float() - whole(opening.base.weights, stored).float()
        matrix = (delta.T if like.kind == "columns" else delta).double()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, min(rank + _OVERSAMPLE, *matrix.shape), _ITERATIONS)
        yield name, _split(u, s, v.T, rank, matrix.square().sum())


def _split(u: Tensor, s: Tensor, vh: Tensor, rank: int, total: Tensor) -> Found:
    """Both factors get the roots of the singular values; ranks beyond those are zero."""
    root = s[:rank].clamp(min=0).sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    missing = rank - len(root)
    if missing > 0:
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(b, (0, missing))
    return a.float(), b.float(), s[:rank].double().square().sum().item(), total.item()


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _write(
    target: Path,
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    rank: int,
    modules: list[str],
    model: ModelConfig,
) -> None:
    config |= {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": modules,
        "base_model_name_or_path": config.get("base_model_name_or_path") or model.path,
    }
    plain = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with new_folder(target) as folder:
        write_tensors(folder, ADAPTER_WEIGHTS, entries, tensors.values())
        (folder / ADAPTER_CONFIG).write_text(plain + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
