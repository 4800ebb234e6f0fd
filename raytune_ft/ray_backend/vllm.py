"""Completions by vLLM: an actor for each engine on GPUs of its own, and the client of rank 0.

Every call brings the weights, by reference into Ray's object store, so that an engine that was lost
and started again needs nothing else. What is called of vLLM is named in docs/seams.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raytune_ft.config.methods import LoraMethod
from raytune_ft.config.paths import is_hub_model
from raytune_ft.config.schema import Config
from raytune_ft.errors import ClusterError, RunFailed, first_line
from raytune_ft.model.hub import commit_of, fetch
from raytune_ft.ray_backend.placement import for_ray
from raytune_ft.records import Tell

if TYPE_CHECKING:
    from raytune_ft.model.sampling import Request, Said
    from raytune_ft.train.copies import Asked

Files = Mapping[str, npt.NDArray[np.uint8]]
"""The content of files by name."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""
RESTARTS = 3
"""Of an engine, over a command."""
START_S = 1800.0
"""For the engines to get their GPUs and to load the model, which may have to be downloaded."""
CLOSE_S = 5.0
OF_VLLM = re.compile(r"VLLM_(?!.*(?:KEY|TOKEN|SECRET|PASSWORD))")
"""Environment variables that engines get. Ray shows them, so no secret may be among them."""


class Engine:
    """The actor: one vLLM. It loads when it is first needed, also after a restart."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._llm: Any = None
        self._version: str | None = None
        self._adapter: Any = None
        self._adapters = 0
        self._folder = Path(tempfile.mkdtemp(prefix="raytune-ft-"))

    def close(self) -> None:
        """Delete its files; it is killed then."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def ready(self) -> str:
        """Load the base. The version of vLLM."""
        import vllm

        if self._llm is None:
            self._llm = vllm.LLM(**options(self._config))
        return str(vllm.__version__)

    def say(self, version: str, files: Files, asked: Asked) -> list[Said]:
        """See `Sampler.say`; with the weights in `files`, which `version` names."""
        from vllm import SamplingParams

        from raytune_ft.model.sampling import Said

        self.ready()
        if version != self._version:
            self._load(version, files)
        settings = [
            SamplingParams(
                temperature=asked.temperature,
                max_tokens=asked.limit,
                seed=seed_of(asked.seed, request),
                stop_token_ids=[*asked.ends],
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for request in asked.requests
        ]
        prompts = [{"prompt_token_ids": [*one.prompt] or [asked.pad]} for one in asked.requests]
        made = self._llm.generate(prompts, settings, use_tqdm=False, lora_request=self._adapter)
        said = []
        for one in made:
            (output,) = one.outputs
            ids = tuple(output.token_ids)
            logps = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
            said.append(Said(ids, output.finish_reason == "stop", logps=tuple(logps)))
        return said

    def _load(self, version: str, files: Files) -> None:
        self.close()
        folder = self._folder / version  # vLLM keeps what it computed by the path of the adapter
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.tofile(path)
        if isinstance(self._config.method, LoraMethod):
            from vllm.lora.request import LoRARequest

            self._adapters += 1
            self._adapter = LoRARequest(version, self._adapters, str(folder))
        else:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self._llm.reset_prefix_cache()
            shutil.rmtree(folder)
        self._version = version


def options(config: Config) -> dict[str, Any]:
    """The arguments of `vllm.LLM`; loads torch, and downloads the model where it is not there."""
    from raytune_ft.model.load import load_model_config, resolve_model_path

    model, own = config.model, config.train.rollout
    path = resolve_model_path(model.path)
    if is_hub_model(model.path):
        path = fetch(model, commit_of(model)).folder
    text = load_model_config(model).get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    found = {
        "model": path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": config.train.precision,
        "tensor_parallel_size": own.vllm.gpus,
        "max_model_len": min(config.data.max_length + own.max_completion_length, positions),
        "logprobs_mode": "processed_logprobs",  # at the temperature of sampling
    }
    if own.vllm.gpus > 1:
        found["distributed_executor_backend"] = "mp"  # not Ray, which would look for other GPUs
    if isinstance(config.method, LoraMethod):
        largest = next(each for each in RANKS if each >= config.method.exported_rank)
        found |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": largest}
    return found


def seed_of(seed: int, request: Request) -> int:
    """What a request's tokens are drawn from: a hash of the run's seed, its place and its sample,
    below 2^63.
    """
    key = f"{seed}/{request.place}/{request.sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


class Engines:
    """The `Sampler` of a run: it spreads requests evenly over actors, in their order."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._version, self._files = "", None

    def take(self, folder: Path) -> None:
        """Put the files into the object store, from which each engine's node fetches them once."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): np.fromfile(path, np.uint8) for path in paths}
        self._version, self._files = uuid.uuid4().hex, ray.put(files)

    def say(self, asked: Asked) -> list[Said]:
        """See `Sampler.say`."""
        ends = [len(asked.requests) * n // len(self._actors) for n in range(len(self._actors) + 1)]
        shares = [
            replace(asked, requests=asked.requests[start:end]) for start, end in pairwise(ends)
        ]
        calls = [
            actor.say.remote(self._version, self._files, share)
            for actor, share in zip(self._actors, shares, strict=True)
            if share.requests
        ]
        return [one for said in _answers(calls) for one in said]


def _answers(calls: Sequence[Any], timeout_s: float | None = None) -> list[Any]:
    """Raises RunFailed where an engine fails, and GetTimeoutError."""
    try:
        return list(ray.get(calls, timeout=timeout_s))
    except RayTaskError as error:
        cause = error.cause or error
        raise RunFailed(f"vLLM: {type(cause).__name__}: {first_line(cause)}") from error
    except GetTimeoutError:
        raise
    except RayError as error:
        raise RunFailed(
            f"an engine of vLLM was lost, and {RESTARTS} restarts did not help (is it out of "
            "memory?); continue with --resume"
        ) from error


@contextmanager
def engines(config: Config, tell: Tell) -> Iterator[list[Any]]:
    """Actors for `train.rollout.engine: vllm`, which end with the context; none for another.

    Raises:
        ClusterError: they do not get their GPUs.
        RunFailed: vLLM cannot load the model.
    """
    own, parallel = config.train.rollout, config.parallel
    if not own.on_vllm:
        yield []
        return
    passed = {name: value for name, value in os.environ.items() if OF_VLLM.match(name)}
    remote: Any = ray.remote(
        num_gpus=own.vllm.gpus,
        num_cpus=1,
        accelerator_type=parallel.accelerator,
        label_selector=for_ray(parallel.label_selector),
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        runtime_env={"env_vars": passed} if passed else None,
    )(Engine)
    actors = [remote.remote(config) for _ in range(own.vllm.engines)]
    several = f"{own.vllm.engines} engine{'s' * (own.vllm.engines > 1)}"
    each = f"{own.vllm.gpus} GPU{'s' * (own.vllm.gpus > 1)} each"
    try:
        tell(f"starting {several} of vLLM with {each}")
        try:
            version = _answers([actor.ready.remote() for actor in actors], START_S)[0]
        except GetTimeoutError as error:
            raise ClusterError(
                f"train.rollout.vllm: {several} with {each}",
                f"did not start within {START_S:g} s",
                "look whether the cluster has as many free GPUs on single nodes",
            ) from error
        tell(f"vLLM {version} samples")
        yield actors
    finally:
        ray.wait([each.close.remote() for each in actors], num_returns=len(actors), timeout=CLOSE_S)
        for actor in actors:
            ray.kill(actor)
