"""Logits of a few label tokens at a time: the same numbers, and never all logits together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prepared import PreparedData
from raytune_ft.model.load import load_tokenizer
from raytune_ft.model.meta import build
from raytune_ft.model.objectives.tokens import BLOCK_LOGITS
from raytune_ft.strategy.single import Single
from raytune_ft.train.evaluation import evaluate
from raytune_ft.train.loop import accumulate_gradients
from raytune_ft.train.material import Work
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.optim import build_optimizer
from raytune_ft.train.setup import build_objective, build_runner
from tests.support.models import VOCABULARY, save_character_tokenizer, true_float64
from tests.support.runs import make_config, make_inputs

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
}
# Models that scale or cap the logits of their head.
CHANGED: dict[str, Any] = {
    "gemma2": partial(transformers.Gemma2Config, head_dim=8, final_logit_softcapping=30.0),
    "cohere": partial(transformers.CohereConfig, logit_scale=0.0625),
    "granite": partial(transformers.GraniteConfig, logits_scaling=8.0),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 20)


def _built(config: Config, cache: Path) -> tuple[ModelRunner, PreparedData]:
    data = prepare_data(config.data, load_tokenizer(config.model), 0, cache)
    strategy = Single(config.parallel, config.train.precision)
    built = build(config.model, config.method, config.train.precision, 0, False, None)
    objective = build_objective(config, data, strategy)
    optimizer_of = partial(build_optimizer, train=config.train)
    return build_runner(built, config, strategy, optimizer_of, objective), data


class Largest(TorchDispatchMode):
    """The most rows of logits that an operator has made."""

    rows = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, leaf.numel() // VOCABULARY)
        return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_blocks_change_no_number(tmp_path: Path, inputs: tuple[Path, Path], method: str) -> None:
    changes = {"method": {"name": method}, "train.precision": "float64", "train.micro_tokens": 200}
    smooth = {"train.label_smoothing": 0.1}
    with true_float64():
        runner, data = _built(make_config(*inputs, changes | smooth), tmp_path)
        assert runner.block == BLOCK_LOGITS // VOCABULARY
        indices, found = np.arange(12), []
        for block in (None, 40, 7):
            runner = replace(runner, block=block)
            runner.model.zero_grad()
            batches = runner.micro_batches(data.train, indices)
            most = max(len(batch.labels_N) for batch in batches)
            with Largest() as seen:
                loss_sum, _ = accumulate_gradients(runner, Work.of(data.train, indices, batches))
                scores = evaluate(runner, data.validation)
            trained = [p for p in runner.model.parameters() if p.requires_grad]
            gradients = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
            found.append((loss_sum, gradients, scores.figures))
            # The transposed weight of the head looks like 32 rows of logits.
            assert seen.rows <= max(block or most, 32)
            assert block is not None or seen.rows == most > 40
    for loss_sum, gradients, figures in found[1:]:
        assert loss_sum.item() == pytest.approx(found[0][0].item(), abs=1e-10)
        assert (gradients - found[0][1]).abs().max() < 1e-11
        assert figures == pytest.approx(found[0][2], abs=1e-11)


@pytest.mark.parametrize("name", CHANGED)
def test_a_model_that_changes_its_logits_has_them_all(
    tmp_path: Path, inputs: tuple[Path, Path], name: str
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CHANGED[name](**SIZES)).save_pretrained(tmp_path / name)
    save_character_tokenizer(tmp_path / name)
    runner, _ = _built(make_config(tmp_path / name, inputs[1]), tmp_path)
    assert runner.block is None
