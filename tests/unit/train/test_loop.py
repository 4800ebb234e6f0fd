"""The loop against a plain PyTorch one over the Hugging Face model's own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from raytune_ft.config.schema import Config
from raytune_ft.data.order import Order, draw_validation
from tests.support.runs import evaluations, losses, make_config, make_inputs, run

STEPS, BATCH = 20, 7
CHANGES = {
    "train.max_examples": STEPS * BATCH,
    "train.weight_decay": 0.0,
    "train.warmup_fraction": 0.0,
    "train.eval_every_examples": STEPS * BATCH,
}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_steps(tmp_path: Path, method: str) -> None:
    model, data = make_inputs(tmp_path)
    changes = CHANGES | ({"method": {"name": "full"}} if method == "full" else {})
    config = make_config(model, data, changes)
    run(config, tmp_path / "run")
    expected, expected_eval, weights = _plain_loop(config)
    measured = losses(tmp_path / "run")
    assert len(measured) == STEPS
    assert max(abs(a - b) for a, b in zip(measured, expected, strict=True)) < 1e-5
    assert evaluations(tmp_path / "run") == pytest.approx(expected_eval, abs=1e-5)

    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}"
    saved = load_file(checkpoint / "state" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-5)


def _plain_loop(config: Config) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """What a user would write: padding, -100, model(labels=...), AdamW, the library's schedule."""
    rows = [json.loads(line) for line in Path(config.data.train.path).read_text().splitlines()]
    assert isinstance(config.data.validation, float)
    is_held = draw_validation(len(rows), config.data.validation, config.seed)
    train, validation = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    torch.manual_seed(config.seed)
    if config.method.name == "lora":
        lora = LoraConfig(
            r=config.method.rank,
            lora_alpha=int(config.method.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=config.train.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)

    def loss(indices: list[int]) -> Tensor:
        examples = [_encode(tokenizer, rows[index]) for index in indices]
        width = max(len(ids) for ids, _ in examples)
        ids = [tokens + [0] * (width - len(tokens)) for tokens, _ in examples]
        labels = [label + [-100] * (width - len(label)) for _, label in examples]
        mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in examples]
        output = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            labels=torch.tensor(labels),
        )
        result: Tensor = output.loss
        return result

    found = []
    with torch.no_grad():
        measured = [loss(validation).item()]
    for step in range(STEPS):
        indices = Order.plain(config.seed, len(train)).indices(step * BATCH, BATCH)
        value = loss([train[int(index)] for index in indices])
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(value.item())
    with torch.no_grad():
        measured.append(loss(validation).item())
    return found, measured, {name: p.detach() for name, p in trained.items()}


def _encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
    completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return prompt + completion, [-100] * len(prompt) + completion
