"""Greedy continuations of many prompts, batched by length; by transformers, or by vLLM on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.report import DataReport
from raytune_ft.errors import ConfigError
from raytune_ft.model.lengths import usable_positions
from raytune_ft.model.load import resolve_model_path
from raytune_ft.model.methods.hooks import attached, virtual_tokens
from raytune_ft.records import Tell
from raytune_ft.train.model_runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = {"cpu": 32768, "cuda": 131072}
"""Of one batch, prompts, padding and continuations."""

Ids = Sequence[int]
Backend = Callable[[ModelRunner, ModelConfig, Sequence[Ids], int, Ids], list[list[int]]]
"""(runner, model, prompts, most new tokens, tokens that end an answer) -> continuations."""


def choose_backend(written: str) -> str:
    """The backend that `promote.generation` names on this machine.

    Raises:
        ConfigError: vLLM is written, and it is not installed or there is no GPU.
    """
    ready = find_spec("vllm") is not None and torch.cuda.is_available()
    if written == "vllm" and not ready:
        raise ConfigError(
            "promote.generation=vllm",
            "needs a GPU and the package vllm, which this machine does not have",
            "write promote.generation: auto, or pip install vllm",
        )
    return "vllm" if ready and written != "transformers" else "transformers"


def check_generation(written: str, tell: Tell) -> None:
    """See `choose_backend`; for the process that will generate."""
    choose_backend(written)


def with_transformers(
    runner: ModelRunner, model: ModelConfig, prompts: Sequence[Ids], limit: int, ends: Ids
) -> list[list[int]]:
    """Up to `limit` tokens after each prompt, without the end token; in the order of the prompts.

    Prompts of similar length share a batch, so that little of it is padding; those of equal length,
    where the model keeps rows of such lengths apart.
    """
    built: Any = runner.model
    positions = usable_positions(built)
    device = runner.strategy.device
    found: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while waiting:
        longest = max(1, len(prompts[waiting[0]])) + virtual_tokens(built)
        new = limit if positions is None else min(limit, positions - longest)
        batch = waiting[: max(1, TOKENS.get(device.type, 32768) // (longest + max(new, 1)))]
        last = len(prompts[batch[-1]])
        if runner.apart.group(last) != runner.apart.group(longest + new):
            batch = [i for i in batch if len(prompts[i]) == len(prompts[batch[0]])]
        del waiting[: len(batch)]
        if new > 0:
            texts = _generate(built, [prompts[i] for i in batch], new, ends, runner.pad_token)
            for i, ids in zip(batch, texts, strict=True):
                found[i] = ids
    return found


@torch.no_grad()
def _generate(model: Any, prompts: Sequence[Ids], new: int, ends: Ids, pad: int) -> list[list[int]]:
    """One batch, padded on the left."""
    longest = max(map(len, prompts))
    ids_BS = torch.full((len(prompts), longest), pad, device=model.device)
    mask_BS = torch.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask_BS[row, longest - len(prompt) :] = 1
    # The model's own generation config may ask for sampling.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new, eos_token_id=[*ends] or None, pad_token_id=pad
    )
    method = attached(model)
    if method:  # it tells the prompt from continuations by an empty cache
        model.generation_config.use_cache = True
    plain = {"input_ids": ids_BS, "attention_mask": mask_BS}
    with method.generating(ids_BS, mask_BS) if method else nullcontext(plain) as inputs:
        made_BS = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [until(ids, ends) for ids in made_BS.tolist()]


def with_vllm(
    runner: ModelRunner, model: ModelConfig, prompts: Sequence[Ids], limit: int, ends: Ids
) -> list[list[int]]:
    """As `with_transformers`, with vLLM's own copy of the model. No test of ours runs this."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        gpu_memory_utilization=0.5,  # the other half is the engine's
    )
    settings = SamplingParams(temperature=0.0, max_tokens=limit, stop_token_ids=[*ends])
    made = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], settings)
    return [until(list(one.outputs[0].token_ids), ends) for one in made]


def until(ids: Ids, ends: Ids) -> list[int]:
    """The ids before the first end token."""
    return list(takewhile(lambda one: one not in ends, ids))


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


BACKENDS: dict[str, Backend] = {"transformers": with_transformers, "vllm": with_vllm}
