"""A stand-in for vLLM 0.30.0 on a CPU, with the signatures of those parts that are called.

It loads real models and real adapters from the files that it is given, and computes with
transformers and PEFT. Like vLLM it keeps an adapter by its number and does not look at its files
again, and it answers from stale caches where these were not reset after new weights.

`VLLM_FAKE_FAULT=KIND:FILE` makes it misbehave, and write FILE when it does: `deaf` ignores new
weights, `dies` and `dies_once` end its process in the middle of a batch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_ft.model import sampling
from vllm.lora.request import LoRARequest

__version__ = "0.30.0+fake"


@dataclass
class SamplingParams:
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        max_model_len: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        distributed_executor_backend: str | None = None,
    ) -> None:
        assert dtype in ("float32", "bfloat16", "float16")
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        self._dtype, self._longest, self._mode = getattr(torch, dtype), max_model_len, logprobs_mode
        self._rank = max_lora_rank if enable_lora else 0
        self._most, self._adapters = max_loras, dict[int, Any]()
        self._read(model)
        self._stale = False

    def _read(self, path: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype).eval()

    def generate(
        self,
        prompts: Sequence[Mapping[str, Any]],
        sampling_params: Sequence[SamplingParams] | SamplingParams | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        assert not self._stale, "caches of older weights were not reset"
        assert isinstance(sampling_params, Sequence)
        assert len(sampling_params) == len(prompts)
        if _fault("dies") or _fault("dies_once"):
            os.kill(os.getpid(), signal.SIGKILL)
        model = self._model if lora_request is None else self._adapted(lora_request)
        made = []
        for number, (prompt, own) in enumerate(zip(prompts, sampling_params, strict=True)):
            made.append(self._answer(model, number, list(prompt["prompt_token_ids"]), own))
        if lora_request is not None and isinstance(model, PeftModel):
            self._model = model.unload()
        return made

    def _answer(
        self, model: Any, number: int, prompt: list[int], own: SamplingParams
    ) -> RequestOutput:
        assert prompt, "The prompt cannot be empty"
        assert own.seed is not None
        assert own.max_tokens is not None
        assert self._longest is not None
        limit = min(own.max_tokens, self._longest - len(prompt))
        assert limit > 0, "longer than max_model_len"
        ends = list(own.stop_token_ids or ())
        if not own.ignore_eos:
            ends.append(model.config.eos_token_id)
        (said,) = _drawn_by(
            own.seed,
            lambda: sampling.sample(
                model,
                [sampling.Request(prompt)],
                limit,
                settings=sampling.SamplingConfig(temperature=own.temperature),
                ends=ends,
            ),
        )
        heat = own.temperature if self._mode == "processed_logprobs" else 1.0
        with torch.no_grad():
            ids_1S = torch.tensor([[*prompt, *said.ids]])
            logits_SV = model(input_ids=ids_1S).logits[0, len(prompt) - 1 : -1].float()
        logps_SV = (logits_SV / heat).log_softmax(-1)
        logps = [{i: Logprob(logps_SV[at, i].item())} for at, i in enumerate(said.ids)]
        reason = "stop" if said.ended else "length"
        given = logps if own.logprobs is not None else None
        output = CompletionOutput(0, "", list(said.ids), None, given, reason)
        return RequestOutput(str(number), prompt, [output])

    def _adapted(self, request: LoRARequest) -> Any:
        if _fault("deaf"):
            return self._model
        if request.lora_int_id not in self._adapters:
            model = PeftModel.from_pretrained(self._model, request.lora_path)
            config = model.peft_config["default"]
            assert config.r <= self._rank
            assert not config.rank_pattern, "PEFTHelper does not know it"
            assert not config.alpha_pattern, "PEFTHelper does not know it"
            weights = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
            self._adapters[request.lora_int_id] = config, weights
            while len(self._adapters) > self._most:
                del self._adapters[next(iter(self._adapters))]
            return model
        config, weights = self._adapters[request.lora_int_id]
        model = PeftModel(self._model, config)
        model.load_state_dict(weights, strict=False)
        return model.eval()

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[None]:
        assert method == "reload_weights"
        if not _fault("deaf"):
            self._read((kwargs or {})["weights_path"])
        self._stale = True
        return [None]

    def reset_prefix_cache(self) -> bool:
        self._stale = False
        return True


def _drawn_by(seed: int, act: Callable[[], Any]) -> Any:
    """As a generator for each request does; other numbers than those of the embedded sampler."""
    before = sampling.numbers_of
    sampling.numbers_of = lambda _seed, _request, limit: np.random.default_rng(seed).random(limit)
    try:
        return act()
    finally:
        sampling.numbers_of = before


def _fault(kind: str) -> bool:
    written, _, file = os.environ.get("VLLM_FAKE_FAULT", "").partition(":")
    if written != kind or (kind == "dies_once" and Path(file).exists()):
        return False
    with Path(file).open("a") as log:
        log.write(f"{kind}\n")
    return True
