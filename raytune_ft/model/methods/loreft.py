"""LoReFT: low-rank edits of the residual stream at the ends of the prompt (arXiv 2404.03592).

Equation 2 of the paper, for the output h of a block: h + R^T (W h + b - R h), where the rows of R
are orthonormal. R is the Q of a QR decomposition of an unconstrained parameter, computed in every
forward pass, so that the optimizer, shards and checkpoints need not keep a constraint. The signs of
the rows are chosen such that an orthonormal parameter is its own R.

Shapes: R ranks, otherwise as in `attached`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raytune_ft.config.methods import LoreftMethod, Positions
from raytune_ft.data.batch import MicroBatch
from raytune_ft.errors import ModelError
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import (
    Attached,
    Read,
    base_name,
    begins_cache,
    chosen_blocks,
    first_of,
    width_of,
    with_first,
)

Places = tuple[Tensor, Tensor]
"""First and last tokens of prompts, counted through all rows; no token is in both."""
_KEYS = {"rotation": "R", "weight": "W", "bias": "b"}


def apply_loreft(base: nn.Module, method: LoreftMethod) -> nn.Module:
    """Freeze the base and put interventions behind the blocks that `method.layers` names.

    Raises:
        ModelError: the model has no such block, or fewer hidden units than the rank.
    """
    hidden = width_of(base)
    if method.rank > hidden:
        raise ModelError(
            f"method.rank={method.rank}",
            f"is above the {hidden} hidden units of this {type(base).__name__}",
            f"write at most {hidden}",
        )
    base.requires_grad_(False)
    Loreft(base, method)
    return base


class Intervention(nn.Module):
    """One R, W and b. It begins as the identity, with W = R and b = 0."""

    def __init__(self, hidden: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.rotation = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, hidden)))
        self.weight = nn.Parameter(self.rotation.detach().clone())
        self.bias = nn.Parameter(torch.zeros(rank))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states_KH: Tensor) -> Tensor:
        """The edit of each state. Computed in float32 at least, since QR supports nothing below."""
        with torch.autocast(states_KH.device.type, enabled=False):
            dtype = torch.promote_types(self.rotation.dtype, torch.float32)
            states = states_KH.to(dtype)
            r_RH = orthonormal(self.rotation.to(dtype))
            edit_KR = F.linear(states, self.weight.to(dtype), self.bias.to(dtype))
            added_KH: Tensor = self.dropout((edit_KR - F.linear(states, r_RH)) @ r_RH)
        return added_KH.to(states_KH.dtype)


def orthonormal(rotation_RH: Tensor) -> Tensor:
    """Orthonormal rows that span the same space, by QR; an orthonormal matrix stays as it is."""
    q_HR, upper_RR = torch.linalg.qr(rotation_RH.mT)
    signs_R = torch.where(upper_RR.diagonal() < 0, -1.0, 1.0).to(q_HR.dtype)
    return (q_HR * signs_R).mT


class Ends(nn.Module):
    """The interventions of one block: one for each end of the prompt, or one for both."""

    def __init__(self, hidden: int, method: LoreftMethod) -> None:
        super().__init__()
        names = ("both",) if method.tied else ("first", "last")
        counts = {"both": 1, "first": method.positions.first, "last": method.positions.last}
        self.ends = nn.ModuleDict(
            {n: Intervention(hidden, method.rank, method.dropout) for n in names if counts[n]}
        )

    def forward(self, states_BSH: Tensor, places: Places) -> Tensor:
        """Every intervention takes part, also in a batch without a position for it, so that its
        weights always get a gradient.
        """
        edited = states_BSH.flatten(0, 1)
        by_name = {"both": torch.cat(places), "first": places[0], "last": places[1]}
        for name, intervention in self.ends.items():
            at_K = by_name[name]
            edited = edited.index_add(0, at_K, intervention(edited.index_select(0, at_K)))
        return edited.view_as(states_BSH)


class Loreft(Attached):
    """The interventions of one model, by the numbers of the blocks that they follow."""

    def __init__(self, model: nn.Module, method: LoreftMethod) -> None:
        super().__init__(model)
        self._method, self._model, self._base = method, model, base_name(model)
        self._blocks = {n: name for n, (name, _) in chosen_blocks(model, method.layers).items()}
        self._places: Places | None = None
        model.register_forward_pre_hook(self._look, with_kwargs=True)
        for name in self._blocks.values():
            block = model.get_submodule(name)
            ends = Ends(width_of(model), method)
            ends.train()  # dropout is the only noise; 0 by default
            block.add_module("loreft", ends)
            block.register_forward_hook(self._intervene)

    def _look(self, model: nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        """Find where the prompts of this forward pass begin and end."""
        positions, ids = self._method.positions, inputs.get("input_ids")
        ids = arguments[0] if ids is None else ids
        if self.batch is not None:
            found = _places_in(self.batch, positions)
        elif begins_cache(inputs):
            found = _places_under(inputs.get("attention_mask"), ids, positions)
        else:
            found = _flat([]), _flat([])
        first, last = (places.to(ids.device, non_blocking=True) for places in found)
        self._places = first, last

    def _intervene(self, block: nn.Module, arguments: Any, output: Any) -> Any:
        if not self.enabled or self._places is None:
            return output
        ends: Any = block.loreft
        return with_first(output, ends(first_of(output), self._places))

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The file holds R itself, not the parameter that it is computed from."""
        method = self._method
        config = {
            **method.model_dump(exclude={"name", "dropout"}),
            "method": "loreft",
            "base_model_name_or_path": self._base,
            "layers": list(self._blocks),
            "blocks": {str(number): name for number, name in self._blocks.items()},
        }
        tensors = {}
        for number, block in self._blocks.items():
            for end in self._ends(block):
                for own, key in _KEYS.items():
                    value = read(f"{block}.loreft.ends.{end}.{own}")
                    value = orthonormal(value.float()) if key == "R" else value
                    tensors[f"{number}.{end}.{key}"] = value
        return config, tensors

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        for number, block in self._blocks.items():
            for end in self._ends(block):
                for own, key in _KEYS.items():
                    parameter = self._model.get_parameter(f"{block}.loreft.ends.{end}.{own}")
                    parameter.copy_(tensors[f"{number}.{end}.{key}"])

    def _ends(self, block: str) -> list[str]:
        ends: Any = self._model.get_submodule(f"{block}.loreft.ends")
        return list(ends)


def _places_in(batch: MicroBatch, positions: Positions) -> Places:
    """A prompt is all tokens before the first label of an example."""
    width = batch.tokens_BS.shape[1]
    starts = [span.row * width + span.start for span in batch.spans]
    return _ends_of(starts, list(batch.prompts), positions)


def _places_under(mask_BS: Tensor | None, ids_BS: Tensor, positions: Positions) -> Places:
    """Each row without its padding is a prompt."""
    rows, width = ids_BS.shape
    if mask_BS is None or mask_BS.ndim != 2:
        return _ends_of([row * width for row in range(rows)], [width] * rows, positions)
    seen_BS = mask_BS.cpu().numpy() > 0
    starts = [row * width + int(seen.argmax()) for row, seen in enumerate(seen_BS)]
    return _ends_of(starts, seen_BS.sum(1).tolist(), positions)


def _ends_of(starts: list[int], lengths: list[int], positions: Positions) -> Places:
    """A token of a short prompt that is among its first and its last tokens counts for the nearer
    end.
    """
    first: list[npt.NDArray[np.int64]] = []
    last: list[npt.NDArray[np.int64]] = []
    for start, length in zip(starts, lengths, strict=True):
        steps = np.arange(length)
        is_first, is_last = steps < positions.first, steps >= length - positions.last
        nearer = 2 * steps < length
        first.append(start + steps[is_first & (nearer | ~is_last)])
        last.append(start + steps[is_last & ~(nearer & is_first)])
    return _flat(first), _flat(last)


def _flat(parts: list[npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))


def _restore(base: nn.Module, written: Mapping[str, Any]) -> None:
    own = {key: written[key] for key in ("rank", "layers", "tied")}
    positions = Positions(**written["positions"])
    apply_loreft(base, LoreftMethod(name="loreft", positions=positions, **own))


LOREFT = Implementation(apply_loreft, restore=_restore)
