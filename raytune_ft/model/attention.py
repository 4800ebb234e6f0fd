"""Attention inside each example of a packed row.

With a mask over a packed row, scores would be computed for the whole row and most of them dropped.
Here the tokens of each example are gathered from their row, attend, and are put back. transformers
passes `examples` to the attention of every layer (its `AttentionInterface`).

Shapes: B rows of S tokens, H heads of D numbers, E examples of at most L tokens, T tokens of all
of them with their padding, N = E * H.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from raytune_ft.data.batch import MicroBatch, Move
from raytune_ft.model.methods.hooks import attached

NAME = "by_example"
MIN_LENGTH = 32
"""Examples up to this length form one group; longer ones are grouped by powers of two."""
MAX_HEAD, MAX_LENGTH = 32, 1024
"""Head size and length up to which `CausalBlocks` is faster on a CPU than torch's kernel, and needs
little memory."""
BLOCK = 32


@dataclass(frozen=True)
class Examples:
    """Positions of the examples of a micro-batch.

    tokens_EL: for each group of examples of similar length, indices of their tokens among those of
        all rows. A shorter example repeats its last token, not one of another example, since 0
        times a NaN is NaN.
    places_BS: the index among the T gathered tokens of each token, T for padding; None where every
        row is one example.
    owners_BS: the number of each token's example.
    """

    tokens_EL: tuple[Tensor, ...]
    places_BS: Tensor | None
    owners_BS: Tensor

    def moved(self, move: Move) -> Examples:
        """The same, with each of its tensors given to `move`."""
        places_BS = self.places_BS
        return Examples(
            tuple(map(move, self.tokens_EL)),
            None if places_BS is None else move(places_BS),
            move(self.owners_BS),
        )

    @staticmethod
    def of(batch: MicroBatch) -> Examples:
        """The examples of `batch`, on its device."""
        rows, width = batch.tokens_BS.shape
        owners_BS = batch.owners_BS()
        if batch.positions_BS is None:
            return Examples((), None, owners_BS)
        device = batch.tokens_BS.device
        starts_E = np.array([span.row * width + span.start for span in batch.spans])
        lengths_E = np.array([span.stop - span.start for span in batch.spans])
        bounds_E = np.maximum(MIN_LENGTH, 2 ** np.ceil(np.log2(lengths_E))).astype(int)
        places_P = np.full(rows * width, -1)
        groups, taken = [], 0
        for bound in np.unique(bounds_E):
            starts_G, lengths_G = starts_E[bounds_E == bound], lengths_E[bounds_E == bound]
            steps_L = np.arange(lengths_G.max())
            last_G1 = (starts_G + lengths_G - 1)[:, None]
            tokens_GL = np.minimum(starts_G[:, None] + steps_L, last_G1)
            own_GL = steps_L < lengths_G[:, None]
            places_P[tokens_GL[own_GL]] = taken + np.flatnonzero(own_GL)
            groups.append(torch.from_numpy(tokens_GL).to(device))
            taken += tokens_GL.size
        places_P[places_P < 0] = taken
        places_BS = torch.from_numpy(places_P).to(device).view(rows, width)
        return Examples(tuple(groups), places_BS, owners_BS)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    examples: Examples | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`[B, S, H, D]` from queries, keys and values `[B, H, S, D]`.

    A given mask, as of sliding windows, is kept, and tokens of other examples are masked too.
    Without `examples` this is transformers' `sdpa`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if examples is not None and causal and attention_mask is None:
        heads = query, key, value
        if examples.places_BS is not None:
            return _in_groups(module, heads, examples, dropout, scaling), None
        # Every row is one example, and no token attends to the padding after it.
        return _causal(module, heads, dropout, scaling).transpose(1, 2), None
    if examples is not None and (examples.places_BS is not None or not causal):
        owners_BS = examples.owners_BS
        same_B1SS = (owners_BS[:, :, None] == owners_BS[:, None, :]).unsqueeze(1)
        attention_mask = _both(same_B1SS, attention_mask)
    named = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **named)


def _both(same_B1SS: Tensor, mask: Tensor | None) -> Tensor:
    """The model's own mask, which may be added to the scores, with other examples masked too."""
    if mask is None:
        return same_B1SS
    if mask.is_floating_point():
        return mask.masked_fill(~same_B1SS, torch.finfo(mask.dtype).min)
    return same_B1SS & mask


def all_seen(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`[B, S]`: a mask that hides nothing, whose elements are one and the same."""
    return torch.ones((), dtype=torch.bool, device=device).expand(shape)


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    """transformers' `sdpa_mask`, which asks the device whether a mask hides anything."""
    if attention_mask is not None and not any(attention_mask.stride()):
        attention_mask = None
    return sdpa_mask(*arguments, attention_mask=attention_mask, **named)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)


def attend_by_example(model: nn.Module, wanted: bool) -> bool:
    """Switch attention by example on or off; whether it is on now.

    It needs a model that uses transformers' `sdpa` and passes further arguments of its forward on
    to attention, and a method that allows it.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    if not wanted:
        base.set_attn_implementation("sdpa")
        return False
    named = inspect.signature(type(base).forward).parameters.values()
    method = attached(model)
    can = (
        (method is None or method.by_example)
        and base.config._attn_implementation == "sdpa"
        and not getattr(base.config.get_text_config(), "output_router_logits", False)
        and any(each.kind is inspect.Parameter.VAR_KEYWORD for each in named)
    )
    if can:
        base.set_attn_implementation(NAME)
    return can


def _in_groups(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    examples: Examples,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in heads]
    attended = []
    for tokens_EL in examples.tokens_EL:
        taken = [
            tensor.index_select(0, tokens_EL.view(-1)).unflatten(0, tokens_EL.shape).transpose(1, 2)
            for tensor in flat
        ]
        out_EHLD = _causal(module, (taken[0], taken[1], taken[2]), dropout, scaling)
        attended.append(out_EHLD.transpose(1, 2).flatten(0, 1))
    assert examples.places_BS is not None
    out_THD = torch.cat([*attended, attended[0].new_zeros(1, *attended[0].shape[1:])])
    out_PHD = out_THD.index_select(0, examples.places_BS.view(-1))
    return out_PHD.unflatten(0, examples.places_BS.shape)


def _causal(
    module: nn.Module,
    heads: tuple[Tensor, Tensor, Tensor],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """`[E, H, L, D]`; every token attends to itself and the tokens before it."""
    query, key, value = heads
    groups = getattr(module, "num_key_value_groups", 1)
    length, size = query.shape[-2:]
    small = size <= MAX_HEAD and length <= MAX_LENGTH and not dropout
    exact = query.dtype in (torch.float32, torch.float64) and query.device.type == "cpu"
    alike = key.dtype == value.dtype == query.dtype and not torch.is_autocast_enabled("cpu")
    if small and exact and alike:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        scale = size**-0.5 if scaling is None else scaling
        out_NLD: Tensor = CausalBlocks.apply(
            query.flatten(0, 1) * scale, key.flatten(0, 1), value.flatten(0, 1)
        )
        return out_NLD.unflatten(0, query.shape[:2])
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
    )


class CausalBlocks(torch.autograd.Function):
    """Causal attention of small heads, one block of queries at a time.

    Small products are fast in the layout `x_NDL` and slow in `x_NLD`. Keys after the block of a
    query are not computed, and the probabilities are kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, query_NLD: Tensor, key_NLD: Tensor, value_NLD: Tensor) -> Tensor:
        """`[N, L, D]`; `query_NLD` is already scaled."""
        q_NDL, k_NDL, v_NDL = (x.mT.contiguous() for x in (query_NLD, key_NLD, value_NLD))
        out_NDL = torch.empty_like(v_NDL)
        hidden_bb = q_NDL.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)
        kept = []
        for start, stop in _blocks(q_NDL):
            p_NbL = torch.bmm(q_NDL[..., start:stop].mT, k_NDL[..., :stop])
            p_NbL[..., start:] += hidden_bb[: stop - start, : stop - start]
            p_NbL = torch.softmax(p_NbL, -1)
            out_NDL[..., start:stop] = torch.bmm(v_NDL[..., :stop], p_NbL.mT)
            kept.append(p_NbL)
        ctx.save_for_backward(q_NDL, k_NDL, v_NDL, out_NDL, *kept)
        return out_NDL.mT

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_NDL, k_NDL, v_NDL, out_NDL, *kept = ctx.saved_tensors
        d_NDL = outputs[0].mT.contiguous()
        inner_NL1 = (d_NDL * out_NDL).sum(1).unsqueeze(-1)
        dq_NDL, dk_NDL, dv_NDL = (torch.zeros_like(x) for x in (q_NDL, k_NDL, v_NDL))
        for (start, stop), p_NbL in zip(_blocks(q_NDL), kept, strict=True):
            d_NDb = d_NDL[..., start:stop]
            dv_NDL[..., :stop] += torch.bmm(d_NDb, p_NbL)
            ds_NbL = torch.bmm(d_NDb.mT, v_NDL[..., :stop])
            ds_NbL.sub_(inner_NL1[:, start:stop]).mul_(p_NbL)
            dq_NDL[..., start:stop] = torch.bmm(k_NDL[..., :stop], ds_NbL.mT)
            dk_NDL[..., :stop] += torch.bmm(q_NDL[..., start:stop], ds_NbL)
        return dq_NDL.mT, dk_NDL.mT, dv_NDL.mT


def _blocks(x_NDL: Tensor) -> list[tuple[int, int]]:
    length = x_NDL.shape[-1]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
