"""What is traced without memory is what a real step keeps."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from raytune_ft.config.methods import FullMethod, LoraMethod
from raytune_ft.config.schema import ModelConfig
from raytune_ft.config.train import KdConfig
from raytune_ft.estimate.activations import trace, trace_head
from raytune_ft.estimate.parameters import build_shell
from raytune_ft.model.load import build_model
from tests.support.models import save_tiny_llama

ROWS, WIDTH = 4, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=str(save_tiny_llama(tmp_path_factory.mktemp("tiny"))))


@pytest.mark.parametrize("method", [FullMethod(name="full"), LoraMethod(rank=4)])
def test_a_shell_has_the_weights_of_the_built_model(
    model: ModelConfig, method: FullMethod | LoraMethod
) -> None:
    shell = build_shell(model, method, "float32")
    whole = list(build_model(model, method, "float32", 0).parameters())
    assert shell.total == sum(p.numel() for p in whole)
    assert shell.trained == sum(p.numel() for p in whole if p.requires_grad)
    assert len(shell.blocks) == 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", [FullMethod(name="full"), LoraMethod(rank=4)])
def test_what_is_kept_is_what_autograd_saves(
    model: ModelConfig,
    method: FullMethod | LoraMethod,
    precision: Literal["float32", "bfloat16"],
) -> None:
    shell = build_shell(model, method, precision)
    traced = trace(shell, (ROWS,), WIDTH, "none")
    assert traced.exact
    built = build_model(model, method, precision, 0)
    built.get_output_embeddings().forward = lambda hidden: hidden[:1, :1]  # type: ignore[operator]
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones((ROWS, 1, WIDTH, WIDTH), dtype=torch.bool)
    tokens = torch.zeros((ROWS, WIDTH), dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = built(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        output.sum()
    assert traced.kept.at(ROWS, 2) == pytest.approx(sum(saved.values()), rel=0.1)


def test_checkpointing_keeps_less_and_full_the_least(model: ModelConfig) -> None:
    shell = build_shell(model, FullMethod(name="full"), "bfloat16")
    none, selective, full = (
        trace(shell, (ROWS,), WIDTH, policy).kept.at(ROWS, 80)
        for policy in ("none", "selective", "full")
    )
    assert none > 1.5 * selective > 3 * full
    # Of each block its input, a bfloat16 or float32 for every token and hidden unit.
    assert full < 80 * ROWS * WIDTH * 32 * 4 * 1.2


def test_rows_between_the_traced_ones_are_on_the_line_between(model: ModelConfig) -> None:
    shell = build_shell(model, FullMethod(name="full"), "float32")
    kept = trace(shell, (2, 6), WIDTH, "none").kept
    assert kept.at(4, 2) == pytest.approx(trace(shell, (4,), WIDTH, "none").kept.at(4, 2), rel=0.01)


def test_logits_are_three_times_the_vocabulary_in_float32(model: ModelConfig) -> None:
    shell = build_shell(model, LoraMethod(rank=4), "float32")
    labels = 1000
    assert trace_head(shell, labels) == pytest.approx(12 * labels * shell.vocabulary, rel=0.1)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_with_a_teacher_they_are_eight_times(
    model: ModelConfig, divergence: Literal["forward", "reverse"]
) -> None:
    """By the resident memory of a process 7.5 and 8.0 times (torch 2.13, 4,000 x 8,192)."""
    shell = build_shell(model, LoraMethod(rank=4), "float32")
    kd = KdConfig(teacher="any", divergence=divergence, temperature=2.0)
    found = trace_head(shell, 1000, False, kd)
    assert found == pytest.approx(32 * 1000 * shell.vocabulary, rel=0.1)


def test_a_model_that_cannot_be_traced_has_a_formula(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError

    shell = build_shell(model, LoraMethod(rank=4), "float32")
    monkeypatch.setattr("raytune_ft.estimate.activations._run", fail)
    traced = trace(shell, (1,), WIDTH, "none")
    assert not traced.exact
    assert traced.peak.at(1, 80) > traced.kept.at(1, 80) > 0
