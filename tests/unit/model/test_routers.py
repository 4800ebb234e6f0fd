"""The router loss of a mixture of experts is trained where the model asks for it, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from raytune_ft.data.prepared import open_prepared
from raytune_ft.model.routers import balance_of, router_notes
from raytune_ft.train.setup import plain_order
from tests.support.models import FAMILIES, save_tiny, true_float64
from tests.support.packed import run_packed
from tests.support.runs import evaluations, final_weights, losses, make_config, run, write_rows

WEIGHT = 0.5
ASKS = {"output_router_logits": True, "router_aux_loss_coef": WEIGHT}
SHORT: dict[str, Any] = {
    "train.precision": "float64",
    "train.max_examples": 28,
    "train.eval_every_examples": 28,
    "train.adam_epsilon": 1e-6,
}
ALONE = {"train.micro_tokens": 1, "data.packing": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"train.micro_tokens": 4096, "data.packing": True},
    "checkpointed": {
        "train.micro_tokens": 4096,
        "parallel.activation_checkpointing": "full",
    },
    "padded": {"train.micro_tokens": 96, "data.packing": False},
}


def agree(ours: Path, theirs: Path) -> None:
    assert max(np.abs(np.subtract(losses(ours), losses(theirs)))) < 1e-9
    assert max(np.abs(np.subtract(evaluations(ours), evaluations(theirs)))) < 1e-9
    for name, weight in final_weights(theirs).items():
        assert (final_weights(ours)[name] - weight).abs().max() < 1e-9


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"name": "full"}])
def test_layouts_agree(tmp_path: Path, method: dict[str, Any]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    base = save_tiny("mixtral", tmp_path / "base", **ASKS)
    for name, layout in {"alone": ALONE, **LAYOUTS}.items():
        config = make_config(base, data, {**SHORT, "method": method, **layout})
        with true_float64():
            result = run(config, tmp_path / name)
        assert result.status == "completed", result.error
        assert any("router loss" in note and "is trained" in note for note in result.notes)
        agree(tmp_path / name, tmp_path / "alone")
    save_tiny("mixtral", tmp_path / "base")  # asks for nothing
    with true_float64():
        run(make_config(base, data, {**SHORT, "method": method, **ALONE}), tmp_path / "without")
    ours, theirs = losses(tmp_path / "without"), losses(tmp_path / "alone")
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)  # it is no part of what is reported
    assert abs(ours[-1] - theirs[-1]) > 1e-6


def test_packed_trials_are_what_they_are_alone(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 40)
    base = save_tiny("mixtral", tmp_path / "base", **ASKS)
    own = {**SHORT, "method.targets": ["q_proj", "v_proj"]}
    configs = {
        str(rank): make_config(
            base, data, {**own, "method.rank": rank, "train.batch_size": 3 * rank}
        )
        for rank in (1, 2)
    }
    with true_float64():
        run_packed(configs, tmp_path / "packed", rank=2)
        for name, config in configs.items():
            run(config, tmp_path / "alone" / name)
            agree(tmp_path / "packed" / name, tmp_path / "alone" / name)


def test_a_step_is_that_of_plain_transformers_with_one_row_a_batch(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    base = save_tiny("mixtral", tmp_path / "base", **ASKS)
    changes = {**SHORT, "method": {"name": "full"}, "train.weight_decay": 0.0}
    once = {"train.batch_size": 6, "train.max_examples": 6, "train.warmup_fraction": 0.0}
    fixed = {"train.lr_schedule": "constant", "train.max_grad_norm": None}
    config = make_config(base, data, {**changes, **once, **fixed, "train.eval_every_examples": 6})
    with true_float64():
        run(config, tmp_path / "run")
        cache = next((tmp_path / "cache").glob("*/train.arrow")).parent
        split = open_prepared(cache).train
        chosen = plain_order(config, split).indices(0, 6)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model.set_experts_implementation("eager")
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.train.lr,
            eps=config.train.adam_epsilon,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            weight_decay=0.0,
        )
        labels = int(split.label_counts[chosen].sum())
        for i in chosen:
            ids, mask = (torch.from_numpy(np.array(part)) for part in split.example(int(i)))
            made = model(input_ids=ids.long()[None], use_cache=False)
            kept = mask[1:].bool()
            loss = F.cross_entropy(made.logits[0, :-1][kept], ids[1:].long()[kept], reduction="sum")
            (loss / labels + WEIGHT * made.aux_loss / len(chosen)).backward()
        optimizer.step()
    ours = final_weights(tmp_path / "run")
    for name, parameter in model.named_parameters():
        assert (ours[name] - parameter).abs().max() < 1e-9, name


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        plain, asking = (AutoModelForCausalLM.from_config(FAMILIES["mixtral"]()) for _ in range(2))
    for key, value in ASKS.items():
        setattr(asking.config, key, value)
    assert router_notes(plain) == ()
    assert balance_of(asking) is not None
    assert "0.5 times that of every example alone" in router_notes(asking)[0]
    module = "transformers.models.mixtral.modeling_mixtral"
    monkeypatch.delattr(f"{module}.load_balancing_loss_func")  # as in a model of its own kind
    assert "is left out" in router_notes(asking)[0]
