"""What a model says: continuations of prompts, drawn so that no row depends on its neighbours.

Token t of sample k at place p is decided by one number in [0, 1), which is a function of the seed,
p, k and t alone: the token is where the cumulative sum of the probabilities, in float64, passes
that number. So a row is the same alone, in any batch and on any worker. In float64 that is exact;
in float32 until a number falls within rounding of an edge, and such choices are counted. `generate`
of transformers draws from one global generator, so that there a row depends on the rows beside it.

Shapes: B requests, R rows that still run, S tokens of a prompt, L tokens of a continuation, V
entries of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.batch import FREELY, Apart
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.report import DataReport
from raytune_ft.model.lengths import usable_positions
from raytune_ft.model.load import resolve_model_path
from raytune_ft.model.methods.hooks import attached, virtual_tokens

Ids = Sequence[int]
Numbers = npt.NDArray[np.float64]

BATCH_TOKENS = {"cpu": 32768, "cuda": 131072}
"""Of one batch: prompts, padding and continuations."""
NEAR = 1e-5
"""A choice is a near tie where rounding of this size in a probability may change it."""
STREAM = 2**32 - 3
"""Tells the numbers of samples from those of other things that the seed draws."""
GREEDY = SamplingConfig(temperature=0.0)


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `place` is its number in the stream of prompts, `sample` tells several
    continuations of one prompt apart.
    """

    prompt: Ids
    place: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Said:
    """A continuation: its token ids, the end token included where it `ended`; else it was cut at
    the limit. `near_ties` counts the tokens that rounding may have decided. `logps`: of each id,
    where a copy of the model said it.
    """

    ids: tuple[int, ...]
    ended: bool
    near_ties: int = 0
    logps: tuple[float, ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The ids without the end token."""
        return self.ids[:-1] if self.ended else self.ids


def requests_of(prompts: Iterable[tuple[int, Prompt]], count: int) -> list[Request]:
    """`count` of each of (place, prompt)."""
    return [Request(one.ids, place, number) for place, one in prompts for number in range(count)]


def by_prompt(said: Sequence[Said], count: int) -> list[Sequence[Said]]:
    """The continuations of each prompt, of what was said to `requests_of`."""
    return [said[start : start + count] for start in range(0, len(said), count)]


def numbers_of(seed: int, request: Request, limit: int) -> Numbers:
    """`[L]` numbers in [0, 1): what decides the tokens of a request, whatever is beside it."""
    return np.random.default_rng([seed, STREAM, request.place, request.sample]).random(limit)


def probabilities(logits_BV: Tensor, settings: SamplingConfig) -> Tensor:
    """`[B, V]`, not normalised, in the order of transformers' filters: temperature, top-k, top-p
    (arXiv 1904.09751), min-p (arXiv 2407.01082). In float32, or in float64 as the logits are.
    """
    wide = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
    scaled_BV = logits_BV.to(wide) / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled_BV.shape[-1]:
        least_B1 = scaled_BV.topk(settings.top_k).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < least_B1, -torch.inf)
    shares_BV = scaled_BV.softmax(-1)
    if settings.top_p < 1:
        falling_BV, order_BV = torch.sort(shares_BV, descending=True, stable=True)
        before_BV = falling_BV.cumsum(-1) - falling_BV
        dropped_BV = torch.empty_like(before_BV, dtype=torch.bool)
        dropped_BV.scatter_(-1, order_BV, before_BV >= settings.top_p)
        shares_BV = shares_BV.masked_fill(dropped_BV, 0.0)
    if settings.min_p > 0:
        most_B1 = shares_BV.amax(-1, keepdim=True)
        shares_BV = shares_BV.masked_fill(shares_BV < settings.min_p * most_B1, 0.0)
    return shares_BV


def choose(logits_BV: Tensor, numbers_B: Tensor, settings: SamplingConfig) -> tuple[Tensor, Tensor]:
    """`[B]` tokens by inverse transform sampling, and whether each is a near tie. At temperature 0
    the likeliest token, the first of equal ones.
    """
    if settings.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        best_B2 = logits_BV.topk(2).values.double()
        return tokens_B, best_B2[:, 0] - best_B2[:, 1] < NEAR
    sums_BV = probabilities(logits_BV, settings).cumsum(-1, dtype=torch.float64)
    aims_B1 = numbers_B.unsqueeze(-1) * sums_BV[:, -1:]
    tokens_B1 = torch.searchsorted(sums_BV, aims_B1, right=True)
    # An aim that rounding puts on the last sum is that of the last token with a probability.
    tokens_B1 = tokens_B1.minimum((sums_BV < sums_BV[:, -1:]).sum(-1, keepdim=True))
    over_B1 = sums_BV.gather(-1, tokens_B1) - aims_B1
    under_B1 = aims_B1 - sums_BV.gather(-1, (tokens_B1 - 1).clamp(min=0))
    near_B1 = (over_B1 < NEAR) | ((under_B1 < NEAR) & (tokens_B1 > 0))
    return tokens_B1.squeeze(-1), near_B1.squeeze(-1)


@dataclass(frozen=True)
class Requests:
    """Requests to one model: up to `limit` tokens each. `seed` draws their numbers."""

    requests: Sequence[Request]
    limit: int
    seed: int = 0


def sample(
    model: nn.Module,
    requests: Sequence[Request],
    limit: int,
    *,
    settings: SamplingConfig = GREEDY,
    ends: Ids = (),
    pad: int = 0,
    seed: int = 0,
    apart: Apart = FREELY,
    forward: Callable[..., Any] | None = None,
    beat: Callable[[], object] = lambda: None,
) -> list[Said]:
    """Up to `limit` tokens after each prompt, in the order of the requests; see `sample_groups`."""
    asked = [Requests(requests, limit, seed)]
    return sample_groups(
        model,
        asked,
        settings=settings,
        ends=ends,
        pad=pad,
        apart=apart,
        forward=forward,
        beat=beat,
    )[0]


def sample_groups(
    model: nn.Module,
    asked: Sequence[Requests],
    *,
    settings: SamplingConfig = GREEDY,
    ends: Ids = (),
    pad: int = 0,
    apart: Apart = FREELY,
    forward: Callable[..., Any] | None = None,
    beat: Callable[[], object] = lambda: None,
) -> list[list[Said]]:
    """Continuations by each of several models that share the passes of one, in the order of the
    requests. The rows of a pass are grouped by model, all groups are equally large, and `model`
    computes the g-th of them with what the g-th model has of its own.

    Prompts of similar length share a batch, so that little of it is padding; those of equal length,
    where the model keeps rows of such lengths apart. The passes over one prompt are one pass. Rows
    that have ended leave their batch, and the next one begins when all have. The model is in eval
    mode; a row that reaches its last position is cut there.

    Args:
        ends: tokens that end a continuation.
        pad: the token that fills rows up on the left.
        apart: see `model.lengths.apart_of`.
        forward: computes a pass of the model, in place of the model itself.
        beat: called after every pass.
    """
    positions, virtual = usable_positions(model), virtual_tokens(model)
    device = next(model.parameters()).device
    most = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    limit = max(each.limit for each in asked)
    rows_G = [_rows_of(each, positions, virtual) for each in asked]
    found = [[Said((), ended=False)] * len(rows) for rows in rows_G]
    waiting_G = [sorted((row for row in rows if row.limit > 0), key=_by_length) for rows in rows_G]
    while any(waiting_G):
        longest = max(waiting[0].length for waiting in waiting_G if waiting)
        height = max(1, most // ((longest + limit) * len(asked)))
        batch_G = [waiting[:height] for waiting in waiting_G]
        batch = [row for own in batch_G for row in own]
        shortest = min(row.length for row in batch)
        widest = longest + max(row.limit for row in batch)
        past_end = positions is not None and widest > positions
        if past_end or apart.group(shortest) != apart.group(widest):
            batch_G = [[row for row in own if row.length == longest] for own in batch_G]
        for number, own in enumerate(batch_G):
            waiting_G[number] = waiting_G[number][len(own) :]
        made = _decode(model, batch_G, settings, ends, pad, forward, beat)
        for of_model, own, said in zip(found, batch_G, made, strict=True):
            for row, one in zip(own, said, strict=True):
                of_model[row.number] = one
    return found


@dataclass(frozen=True)
class _Row:
    """A request as a batch takes it: its number among those of its model, the seed of its draws,
    the positions of its prompt, and the tokens that it may get.
    """

    number: int
    request: Request
    seed: int
    length: int
    limit: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """Its token ids."""
        return tuple(self.request.prompt)


def _rows_of(asked: Requests, positions: int | None, virtual: int) -> list[_Row]:
    rows = []
    for number, request in enumerate(asked.requests):
        length = max(1, len(request.prompt)) + virtual
        limit = asked.limit if positions is None else min(asked.limit, positions - length)
        rows.append(_Row(number, request, asked.seed, length, limit))
    return rows


def _by_length(row: _Row) -> int:
    return -row.length


@torch.no_grad()
def _decode(
    model: Any,
    batch_G: Sequence[Sequence[_Row]],
    settings: SamplingConfig,
    ends: Ids,
    pad: int,
    forward: Callable[..., Any] | None,
    beat: Callable[[], object],
) -> list[list[Said]]:
    """One batch of requests to each model, padded on the left. A model with fewer than another has
    rows that get no token.
    """
    device, groups = next(model.parameters()).device, len(batch_G)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    indexed = _is_indexed(base)
    some = next(row for own in batch_G for row in own)
    idle, height = replace(some, limit=0), max(map(len, batch_G))
    filled_G = [[*own, *[idle] * (height - len(own))] for own in batch_G]
    batch = [row for own in filled_G for row in own]
    read, places = _prompts_of(filled_G, indexed)
    ids_BS, mask_BS = _padded(read, pad, device)
    limit = max(row.limit for row in batch)
    numbers_BL = torch.zeros(len(batch), limit, dtype=torch.float64)
    if settings.temperature > 0:
        drawn = [numbers_of(row.seed, row.request, limit) for row in batch]
        numbers_BL = torch.from_numpy(np.stack(drawn))
    numbers_BL = numbers_BL.to(device)
    ends_E = torch.tensor([*ends], dtype=torch.int64, device=device)
    method = attached(model)
    plain = {"input_ids": ids_BS, "attention_mask": mask_BS}
    with method.generating(ids_BS, mask_BS) if method else nullcontext(plain) as inputs:
        rows = _Rows(base, inputs, forward or base)
        lengths_B = torch.tensor([row.limit for row in batch], device=device)
        ended_B = torch.zeros(len(batch), dtype=torch.bool, device=device)
        tokens_BL = torch.full((len(batch), limit), pad, device=device)
        near_BL = torch.zeros(len(batch), limit, dtype=torch.bool, device=device)
        asked_R = torch.arange(len(batch), device=device)  # the requests of the rows
        logits_RV = rows.logits()
        if places != list(range(len(batch))):
            copied_R = torch.tensor(places, device=device)
            rows.take(copied_R)
            logits_RV = logits_RV[copied_R]
        for step in range(limit):
            beat()
            tokens_R, near_R = choose(logits_RV, numbers_BL[asked_R, step], settings)
            tokens_BL[asked_R, step], near_BL[asked_R, step] = tokens_R, near_R
            running_R = step < lengths_B[asked_R]
            ending = asked_R[running_R & torch.isin(tokens_R, ends_E)]
            ended_B[ending], lengths_B[ending] = True, step + 1
            kept = _still_running(step + 1 < lengths_B[asked_R], groups)
            if len(kept) == 0:
                break
            rows.append(tokens_R)
            if len(kept) < len(asked_R) and indexed:
                rows.take(kept)
                asked_R = asked_R[kept]
            logits_RV = rows.logits()
    within_BL = torch.arange(limit, device=device) < lengths_B[:, None]
    near_B = (near_BL & within_BL).sum(-1).tolist()
    found = [
        Said(tuple(ids[:length]), ended, near)
        for ids, length, ended, near in zip(
            tokens_BL.tolist(), lengths_B.tolist(), ended_B.tolist(), near_B, strict=True
        )
    ]
    return [found[g * height : g * height + len(own)] for g, own in enumerate(batch_G)]


def _prompts_of(
    filled_G: Sequence[Sequence[_Row]], shared: bool
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompts of the first pass, equally many for each model, and the place there of each row.
    If `shared`, samples of one prompt have one place, since the cache is copied from row to row.
    """
    if not shared:
        rows = [row for own in filled_G for row in own]
        return [row.prompt for row in rows], list(range(len(rows)))
    at_G = [
        {p: n for n, p in enumerate(dict.fromkeys(row.prompt for row in own))} for own in filled_G
    ]
    height = max(map(len, at_G))
    read = [p for at in at_G for p in (*at, *[next(iter(at))] * (height - len(at)))]
    places = [
        g * height + at[row.prompt]
        for g, (own, at) in enumerate(zip(filled_G, at_G, strict=True))
        for row in own
    ]
    return read, places


def _still_running(running_R: Tensor, groups: int) -> Tensor:
    """The rows that go on. Every group keeps as many as the one in which most still run."""
    running_Gh = running_R.view(groups, -1)
    count = int(running_Gh.sum(1).max())
    first_Gh = torch.argsort((~running_Gh).to(torch.uint8), dim=1, stable=True)[:, :count]
    begins_G1 = torch.arange(groups, device=running_R.device)[:, None] * running_Gh.shape[1]
    return (begins_G1 + first_Gh).reshape(-1)


def _padded(prompts: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[B, S]` ids and mask. An empty prompt is one token of padding that is seen."""
    longest = max(1, *(len(prompt) for prompt in prompts))
    ids_BS = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask_BS[row, longest - max(1, len(prompt)) :] = 1
    return ids_BS.to(device), mask_BS.to(device)


def _is_indexed(base: Any) -> bool:
    """Whether rows of the model's cache can be chosen: of transformers' caches only those of keys
    and values alone can be indexed, and other states of a model are its own matter.
    """
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return base._supports_default_dynamic_cache() and all(
        type(layer) in kinds for layer in _cache_of(base).layers
    )


def _cache_of(base: Any) -> DynamicCache:
    return DynamicCache(config=base.config.get_text_config(decoder=True))


class _Rows:
    """Rows of one length and the model's cache of them, by the functions that transformers'
    `generate` uses, so that each model gets the arguments and the cache that it needs.
    """

    def __init__(self, base: Any, inputs: dict[str, Any], forward: Callable[..., Any]) -> None:
        self._base, self._forward = base, forward
        self._ids_BS: Tensor = inputs.pop("input_ids")
        named = inspect.signature(base.forward).parameters
        mask_BS: Tensor = inputs["attention_mask"]
        self._more: dict[str, Any] = {"use_cache": True, **inputs}
        if "position_ids" in named:
            places_BS = mask_BS.cumsum(-1) - 1
            self._more["position_ids"] = places_BS.masked_fill(mask_BS == 0, 0)
        if bool(mask_BS.all()):  # as in `generate`; models then make none
            self._more.pop("attention_mask")
        if "logits_to_keep" in named:
            self._more["logits_to_keep"] = 1
        cache = "cache_params" if "cache_params" in named else "past_key_values"
        self._fresh: int | None = None
        if cache in inputs:  # a method has begun it
            self._fresh = self._ids_BS.shape[1] - inputs[cache].get_seq_length()
        elif base._supports_default_dynamic_cache():
            self._more[cache] = _cache_of(base)
        self._first = True

    def logits(self) -> Tensor:
        """`[B, V]` of the next token of every row."""
        inputs = self._base.prepare_inputs_for_generation(
            self._ids_BS,
            next_sequence_length=self._fresh,
            is_first_iteration=self._first,
            **self._more,
        )
        outputs = self._forward(**inputs, return_dict=True)
        self._more = self._base._update_model_kwargs_for_generation(outputs, self._more)
        self._first, self._fresh = False, 1
        last_BV: Tensor = outputs.logits[:, -1]
        return last_BV

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to every row."""
        self._ids_BS = torch.cat([self._ids_BS, tokens_B[:, None]], -1)

    def take(self, rows_R: Tensor) -> None:
        """Go on with these rows, of which one may be there several times."""
        self._ids_BS = self._ids_BS[rows_R]
        for key, value in self._more.items():
            if isinstance(value, Tensor):
                self._more[key] = value[rows_R]
            elif isinstance(value, Cache):
                value.batch_select_indices(rows_R)


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, report: DataReport
) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's EOS, the tokens that the model's generation config
    names, and those that ended trained turns.
    """
    try:
        written = GenerationConfig.from_pretrained(resolve_model_path(model.path)).eos_token_id
    except OSError:  # it has none
        written = None
    return tuple(end_tokens(written, tokenizer, report))


def end_tokens(
    written: int | list[int] | None, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> list[int]:
    """What a generation config names, then the tokenizer's EOS and the ends of trained turns."""
    known = written if isinstance(written, list) else [written]
    trained = tokenizer.convert_tokens_to_ids(report.turn_ends)
    named = dict.fromkeys([*known, tokenizer.eos_token_id, *trained])
    return [end for end in named if isinstance(end, int)]
