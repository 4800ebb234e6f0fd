"""Packed runs against PEFT and torch's own AdamW, in a loop that a user would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import Config
from raytune_ft.data.order import Order
from raytune_ft.data.split import TokenizedSplit
from tests.support.models import true_float64
from tests.support.packed import Packed
from tests.support.runs import final_weights, losses, make_config, make_inputs

STEPS = 20
RUNS: dict[str, dict[str, Any]] = {
    "a": {"method.rank": 2, "train.lr": 1e-3, "train.batch_size": 5},
    "b": {"method.rank": 8, "train.weight_decay": 0.1, "train.max_grad_norm": 0.1, "seed": 4},
}


def test_twenty_steps(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    configs = {}
    for name, changes in RUNS.items():
        steady = {
            "train.precision": "float64",
            "train.lr_schedule": "constant",
            "train.warmup_fraction": 0.0,
        }
        batch = changes.get("train.batch_size", 7)
        budget = {"train.max_examples": STEPS * batch, "train.eval_every_examples": 1000}
        configs[name] = make_config(*inputs, {**steady, **budget, **changes})
    with true_float64():
        _compare(configs, tmp_path)


def _compare(configs: dict[str, Config], tmp_path: Path) -> None:
    packed = Packed(configs["a"], tmp_path, slots=2)
    for name, config in configs.items():
        packed.enter(name, config)
    packed.finish(2)
    for name, config in configs.items():
        expected, weights = _plain_loop(config, packed.data.train)
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-9)
        saved = final_weights(tmp_path / name)
        assert saved.keys() == weights.keys()
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=1e-9)


def _plain_loop(config: Config, data: TokenizedSplit) -> tuple[list[float], dict[str, Tensor]]:
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    torch.manual_seed(config.seed)
    method, train = config.method, config.train
    model = get_peft_model(
        model,
        LoraConfig(
            r=method.rank,
            lora_alpha=int(method.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=train.lr, weight_decay=train.weight_decay)
    found, order = [], Order.plain(config.seed, len(data))
    for step in range(STEPS):
        indices = order.indices(step * train.batch_size, train.batch_size)
        losses_N = torch.cat([_token_losses(model, data, int(index)) for index in indices])
        losses_N.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses_N.mean().item())
    return found, {name: p.detach() for name, p in trained.items()}


def _token_losses(model: Any, data: TokenizedSplit, index: int) -> Tensor:
    ids, mask = data.example(index)
    tokens_S = torch.tensor(ids, dtype=torch.int64)
    logits_SV = model(input_ids=tokens_S[None], use_cache=False).logits[0]
    keep_S = torch.tensor(mask[1:])
    return F.cross_entropy(logits_SV[:-1][keep_S], tokens_S[1:][keep_S], reduction="none")
