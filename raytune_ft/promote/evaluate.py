"""What a model directory scores on a split, and what it says to some of its prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from raytune_ft.config.schema import Config, ModelConfig, ParallelConfig
from raytune_ft.data.prepare import PreparedData, prepare_data
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.model.build import disk_dtype, load_base, load_tokenizer, pad_token
from raytune_ft.strategy.single import Single
from raytune_ft.train.engine import Engine, choose_micro_tokens
from raytune_ft.train.evaluation import evaluate

SAMPLE_TOKENS = 64
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the first one that carries loss, and the labels from there on."""

    ids: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """Metrics of a split, and the greedy continuation of each prompt as text."""

    metrics: dict[str, float]
    continuations: tuple[str, ...]


def evaluate_directory(
    directory: Path, config: Config, cache_dir: Path
) -> tuple[str, int, dict[str, float]]:
    """(split, examples, metrics) of any model directory on the test data of `config`.

    The tokens are those of the directory's own tokenizer. Without data.test the split is
    "validation". See `measure` for the metrics.

    Raises:
        DataError, ModelError: the data or the directory cannot be read.
    """
    model = config.model.model_copy(update={"path": str(directory), "revision": None})
    tokenizer = load_tokenizer(model)
    name, split = measured_split(prepare_data(config.data, tokenizer, config.seed, cache_dir))
    return name, len(split), measure(model, tokenizer, split).metrics


def measured_split(data: PreparedData) -> tuple[str, TokenizedSplit]:
    """The test split if there is one, else the validation split; with its name."""
    return ("validation", data.validation) if data.test is None else ("test", data.test)


def measure(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: TokenizedSplit,
    prompts: Sequence[Prompt] = (),
) -> Measured:
    """Scores of a model with its weights in the dtype that they have on disk.

    `eval_loss` is the loss per label token, `perplexity` its exponential, `token_accuracy` the
    share of label tokens that are the most likely one given the reference before them.
    `exact_match` is the share of examples of which all label tokens are: greedy decoding picks
    the first of them, so sees the reference before the second, picks it too, and so on; it
    reproduces the whole completion, end token included, exactly where every single one is right.

    Raises:
        ModelError: the model cannot be loaded.
    """
    engine = _engine(model, tokenizer)
    scores = evaluate(engine, split)
    metrics = {
        "eval_loss": scores.loss,
        "perplexity": math.exp(min(scores.loss, _LARGEST_EXPONENT)),
        "token_accuracy": scores.token_accuracy,
        "exact_match": scores.exact_match,
    }
    return Measured(metrics, tuple(_continue(engine, tokenizer, prompt) for prompt in prompts))


def sample_prompts(split: TokenizedSplit, count: int) -> list[Prompt]:
    """The first examples of a split that begin with something to continue."""
    prompts: list[Prompt] = []
    for i in range(len(split)):
        if len(prompts) == count:
            break
        ids, mask = split.example(i)
        start = int(np.argmax(mask))
        if start > 1:
            length = int(np.argmin(np.append(mask[start:], False)))
            prompts.append(
                Prompt(tuple(ids[:start].tolist()), tuple(ids[start : start + length].tolist()))
            )
    return prompts


def _engine(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    strategy = Single(ParallelConfig(), "float32")  # no autocast: computes in the dtype on disk
    built: Any = load_base(model, disk_dtype(model)).eval()
    return Engine(
        model=built,
        wrapped=strategy.lay_out(built),
        head=built.get_output_embeddings(),
        names=[],
        strategy=strategy,
        precision=strategy.precision,
        pad_token=pad_token(tokenizer),
        micro_tokens=choose_micro_tokens("auto", strategy.device),
        packing=False,
    )


@torch.no_grad()
def _continue(engine: Engine, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    ids_BS = torch.tensor([prompt.ids], device=engine.strategy.device)
    model: Any = engine.model
    # The model's own generation config may ask for sampling.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(len(prompt.reference) + 8, SAMPLE_TOKENS),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=engine.pad_token,
    )
    generated_BS = model.generate(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
    return decode(tokenizer, generated_BS[0, len(prompt.ids) :].tolist())


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of token ids without special tokens and outer blanks."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
