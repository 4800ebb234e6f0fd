"""What engines of vLLM are started with, and what they draw from; tests/engines/ runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Config
from raytune_ft.model.sampling import Request
from raytune_ft.ray_backend.vllm import OF_VLLM, options, seed_of
from tests.support.models import save_tiny_llama
from tests.support.runs import make_config


def config_with(model: Path, **changes: Any) -> Config:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    rollout = {"engine": "vllm", "max_completion_length": 40, "vllm": {"gpus": 2}}
    return make_config(model, Path("rows.jsonl"), {"train.rollout": rollout, **dotted})


def test_options_of_an_engine(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")  # of 256 positions
    plain = {
        "model": str(model),
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "logprobs_mode": "processed_logprobs",
    }
    full = {"method": {"name": "full"}, "train__precision": "bfloat16"}
    assert options(config_with(model, **full)) == {**plain, "max_model_len": 256}
    short = options(config_with(model, **full, data__max_length=100))
    assert short == {**plain, "max_model_len": 140}


@pytest.mark.parametrize(
    ("rank", "init", "largest"), [(4, "default", 8), (8, "pissa", 16), (257, "default", 320)]
)
def test_an_engine_has_room_for_the_adapter(
    rank: int, init: str, largest: int, tmp_path: Path
) -> None:
    method = {"name": "lora", "rank": rank, "init": init}
    found = options(config_with(save_tiny_llama(tmp_path / "model"), method=method))
    assert (found["enable_lora"], found["max_loras"], found["max_lora_rank"]) == (True, 1, largest)


def test_a_seed_is_of_the_run_the_place_and_the_sample() -> None:
    places = [(0, 0), (0, 1), (1, 0), (1, 11), (11, 1), (2**62, 3)]
    found = [
        seed_of(seed, Request((1,), place, sample)) for seed in (0, 1) for place, sample in places
    ]
    assert len(set(found)) == len(found)
    assert all(0 <= each < 2**63 for each in found)
    assert seed_of(0, Request((5, 6), 1, 11)) == found[3]  # whatever is asked


def test_engines_get_no_secret_of_the_environment() -> None:
    """Ray shows the environment of an actor to everybody on the cluster."""
    names = ["VLLM_BATCH_INVARIANT", "VLLM_API_KEY", "VLLM_S3_SECRET", "AWS_REGION", "HF_TOKEN"]
    assert [name for name in names if OF_VLLM.match(name)] == ["VLLM_BATCH_INVARIANT"]
