"""Greedy continuations of many prompts, batched by length; by transformers, or by vLLM on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import takewhile

import torch

from raytune_ft.config.schema import ModelConfig
from raytune_ft.errors import ConfigError
from raytune_ft.model.sampling import Request, sample
from raytune_ft.records import Tell
from raytune_ft.train.model_runner import ModelRunner

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
    """Up to `limit` tokens after each prompt, without the end token; in their order."""
    requests = [Request(prompt) for prompt in prompts]
    said = sample(
        runner.model, requests, limit, ends=ends, pad=runner.pad_token, apart=runner.apart
    )
    return [list(one.answer) for one in said]


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


BACKENDS: dict[str, Backend] = {"transformers": with_transformers, "vllm": with_vllm}
