"""Tiny real models on disk, and float64 that stays float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 96


def save_tiny_llama(directory: Path, seed: int = 0, tied: bool = False) -> Path:
    """Two layers with grouped-query attention, random weights, and a character tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # so that attention matters and a leak between examples shows
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
# A window shorter than the rows, so that layers with and without one differ.
_WINDOW = {"sliding_window": 12}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, **_WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED,
        **_WINDOW,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED),  # fused projections
    "gpt2": lambda: transformers.GPT2Config(  # Conv1D, biases, tied embeddings
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
    "bert": lambda: transformers.BertConfig(**_SIZES, is_decoder=True),
}


def save_tiny(family: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Two layers of a family with random weights, biases too, and a character tokenizer."""
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    save_character_tokenizer(directory)
    return directory


def save_tiny_encoder(directory: Path, seed: int = 0) -> Path:
    """A BERT of two layers without a head, with [CLS] and [SEP] around its characters."""
    torch.manual_seed(seed)
    sizes = {**_SIZES, "initializer_range": 0.2}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(directory)
    save_character_tokenizer(directory)
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>",
        pair="</s> $A </s> $B:1 </s>:1",
        special_tokens=[("</s>", 1)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(directory)
    return directory


def save_character_tokenizer(directory: Path) -> None:
    """Printable ASCII, one token a character; `</s>` ends and pads."""
    characters = [chr(code) for code in range(32, 32 + VOCABULARY - 2)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


@contextmanager
def true_float64() -> Iterator[None]:
    """transformers runs norms, rotations, eager softmax and routers in float32 whatever the
    model's dtype is. Inside, what asks for float32 gets float64, so that it means 1e-16, not 1e-8.
    """

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(_wide, args), **{k: _wide(v) for k, v in kwargs.items()})

        return call

    with (
        mock.patch.object(Tensor, "float", Tensor.double),
        mock.patch.object(Tensor, "to", widened(Tensor.to)),
        mock.patch.object(F, "softmax", widened(F.softmax)),
        mock.patch.object(torch, "zeros", widened(torch.zeros)),
    ):
        yield


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
