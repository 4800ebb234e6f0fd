"""Tiny real models on disk, and float64 that stays float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama

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
    """transformers runs norms and eager softmax in float32 whatever the model's dtype is.

    Inside, both stay in the dtype of their input, so that float64 means 1e-16 and not 1e-8.
    """

    def rms_norm(self: nn.Module, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        doubled = torch.cat([angles, angles], -1)
        return doubled.cos() * self.attention_scaling, doubled.sin() * self.attention_scaling

    softmax = F.softmax

    def softmax_in_own_dtype(x: Tensor, dim: int = -1, **_: object) -> Tensor:
        return softmax(x, dim=dim)

    with (
        mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", rms_norm),
        mock.patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", rotary),
        mock.patch.object(F, "softmax", softmax_in_own_dtype),
    ):
        yield
