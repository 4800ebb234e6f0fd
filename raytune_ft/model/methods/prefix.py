"""Prefix tuning: keys and values of virtual tokens in every layer (arXiv 2101.00190).

As in PEFT, whose module and files are used, they are a cache that the model is given with the first
token. A cache belongs to a row, so that each row holds one example.

Shapes: V virtual tokens, L layers, otherwise as in `attached`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PrefixEncoder, PrefixTuningConfig
from torch import Tensor, nn
from transformers import DynamicCache

from raytune_ft.config.methods import METHODS, PrefixMethod
from raytune_ft.errors import ModelError
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import begins_cache
from raytune_ft.model.methods.virtual import ENCODER, Encoded


def apply_prefix(base: nn.Module, method: PrefixMethod) -> nn.Module:
    """Freeze the base and train the keys and values that its layers find in their caches.

    Raises:
        ModelError: the model takes no cache of keys and values with one shape for all layers.
    """
    base.requires_grad_(False)
    keys = _peft_keys(base, method.tokens)
    size = {
        "prefix_projection": method.projection,
        "encoder_hidden_size": method.hidden or keys["token_dim"],
    }
    encoder = PrefixEncoder(PrefixTuningConfig(**keys, **size))
    # Of an MLP only the output is saved.
    Prefix(base, encoder, PrefixTuningConfig(**keys, encoder_hidden_size=keys["token_dim"]))
    return base


class FixedCache(DynamicCache):
    """A cache that does not grow, so that a block that is computed again finds the same cache."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        """The keys and values of the prefix, followed by those of the pass."""
        kept: Any = self.layers[layer]
        both = (kept.keys, keys), (kept.values, values)
        return tuple(torch.cat([old.to(new.dtype), new], dim=-2) for old, new in both)


class Prefix(Encoded):
    """The prefix of one model."""

    by_example = False
    unpackable = METHODS["prefix"].one_example_rows

    def _look(self, model: nn.Module, arguments: Any, inputs: dict[str, Any]) -> Any:
        """Give the prefix to a pass that has no cache."""
        if not self.enabled or not begins_cache(inputs):
            return None
        ids_BS: Tensor = inputs["input_ids"]
        mask_BS = inputs.get("attention_mask")
        given: dict[str, Any] = {"past_key_values": self._cache(FixedCache, len(ids_BS))}
        if mask_BS is not None:
            seen_BV = mask_BS.new_ones(len(mask_BS), self._tokens)
            given["attention_mask"] = torch.cat([seen_BV, mask_BS], 1)
        return arguments, inputs | given

    @contextmanager
    def generating(self, ids_BS: Tensor, mask_BS: Tensor) -> Iterator[dict[str, Any]]:
        """A cache of V tokens, for which `generate` needs V ids before those of the prompt."""
        room_BV = ids_BS.new_zeros(len(ids_BS), self._tokens)
        yield {
            "input_ids": torch.cat([room_BV, ids_BS], 1),
            "attention_mask": torch.cat([torch.ones_like(room_BV), mask_BS], 1),
            "past_key_values": self._cache(DynamicCache, len(ids_BS)),
        }

    def _cache(self, kind: type[DynamicCache], rows: int) -> DynamicCache:
        """PEFT's `get_prompt`: `[V, 2 L heads size]` to keys and values `[B, heads, V, size]`."""
        encoder: Any = self._model.get_submodule(ENCODER)
        config: Any = self._config
        embedding: Any = self._model.get_input_embeddings()  # type: ignore[operator]
        device, dtype = embedding.weight.device, embedding.weight.dtype
        flat_VN = encoder(torch.arange(self._tokens, device=device).unsqueeze(0))[0]
        size = config.token_dim // config.num_attention_heads
        shape = (self._tokens, config.num_layers, 2, config.num_attention_heads, size)
        layers_L2HVD = flat_VN.view(shape).permute(1, 2, 3, 0, 4).to(dtype)
        base: Any = self._model.config
        cache = kind(config=base)
        for layer, states in enumerate(layers_L2HVD):
            key, value = states.unsqueeze(1).expand(-1, rows, -1, -1, -1)
            DynamicCache.update(cache, key, value, layer)
        return cache


def _peft_keys(base: nn.Module, tokens: int) -> dict[str, Any]:
    """The keys about a model in PEFT's configuration of a prefix."""
    config: Any = base.config.get_text_config()  # type: ignore[operator, union-attr]
    named = inspect.signature(type(base).forward).parameters
    written = config.to_dict()
    layered = written.get("per_layer_config") or written.get("global_head_dim")
    recurrent = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    if "past_key_values" not in named or layered or recurrent or config.is_encoder_decoder:
        raise ModelError(
            "method.name=prefix",
            f"needs keys and values of one shape in all layers, which this {type(base).__name__} "
            "does not have",
            "write lora, loreft or prompt",
        )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": kept,
        "token_dim": kept * size,
    }


def _restore(base: nn.Module, written: Mapping[str, Any]) -> None:
    apply_prefix(base, PrefixMethod(name="prefix", tokens=written["num_virtual_tokens"]))


PREFIX = Implementation(apply_prefix, restore=_restore)
