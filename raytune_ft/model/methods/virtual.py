"""Virtual tokens before every example: prompt tuning (arXiv 2104.08691), p-tuning (2103.10385).

PEFT puts them at the front of a row. Here every example has positions for them in its row, where
the output of the model's embedding is replaced, so that packed rows compute what single examples
do. The modules and the files are PEFT's.

Shapes: V virtual tokens, otherwise as in `attached`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PromptEmbedding, PromptEncoder, PromptEncoderConfig, PromptTuningConfig
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from raytune_ft.config.methods import PromptMethod, PTuningMethod
from raytune_ft.errors import ModelError, first_line
from raytune_ft.model.methods.base import Implementation
from raytune_ft.model.methods.hooks import Attached, Read, base_name, begins_cache

ENCODER = "prompt_encoder"
KEY = "prompt_embeddings"
"""The one tensor of PEFT's file."""


def apply_prompt(base: nn.Module, method: PromptMethod) -> nn.Module:
    """Freeze the base and train embeddings of virtual tokens, which begin as those of words.

    Raises:
        ModelError: `init_text` cannot be tokenised here.
    """
    base.requires_grad_(False)
    config = PromptTuningConfig(**_peft_keys(base, method.tokens), inference_mode=True)
    encoder = PromptEmbedding(config, None)  # without PEFT's initialisation; see _begin
    Virtual(base, encoder, PromptTuningConfig(**_peft_keys(base, method.tokens)))
    _begin(base, encoder, _first_ids(base, method))
    return base


def apply_p_tuning(base: nn.Module, method: PTuningMethod) -> nn.Module:
    """Freeze the base and train an MLP that computes virtual tokens."""
    base.requires_grad_(False)
    keys = _peft_keys(base, method.tokens)
    size = {"encoder_hidden_size": method.hidden or keys["token_dim"]}
    Virtual(base, PromptEncoder(PromptEncoderConfig(**keys, **size)), PromptEncoderConfig(**keys))
    return base


class Encoded(Attached):
    """Virtual tokens of one model that an encoder of PEFT's computes; `_look` gives them to a pass.
    `config` is what PEFT writes beside the weights.
    """

    def __init__(self, model: nn.Module, encoder: nn.Module, config: Any) -> None:
        super().__init__(model)
        self._model, self._config = model, config
        self._tokens: int = config.num_virtual_tokens
        config.base_model_name_or_path, config.inference_mode = base_name(model), True
        encoder.train()
        model.add_module(ENCODER, encoder)
        self._blank = copy.deepcopy(encoder)
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, model: nn.Module, arguments: Any, inputs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def contents(self, read: Read) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's two files; of an MLP only its output is written, as PEFT does."""
        encoder = copy.deepcopy(self._blank)
        encoder.load_state_dict({name: read(f"{ENCODER}.{name}") for name in encoder.state_dict()})
        with torch.no_grad():
            found: Tensor = encoder.eval()(torch.arange(self._tokens).unsqueeze(0))[0]
        written = self._config.to_dict().items()
        plain = {key: sorted(v) if isinstance(v, set) else v for key, v in written}
        return plain, {KEY: found}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self._model.get_parameter(f"{ENCODER}.embedding.weight").copy_(tensors[KEY])


class Virtual(Encoded):
    """The virtual tokens of one model."""

    def __init__(self, model: nn.Module, encoder: nn.Module, config: Any) -> None:
        super().__init__(model, encoder, config)
        self._places: tuple[Tensor, Tensor] | None = None
        self._prompts: list[int] = []
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_hook(self._replace)

    @property
    def virtual(self) -> int:
        return self._tokens if self.enabled else 0

    @contextmanager
    def generating(self, ids_BS: Tensor, mask_BS: Tensor) -> Iterator[dict[str, Any]]:
        """Put V positions for the virtual tokens between the padding and each prompt."""
        room_BV = ids_BS.new_zeros(len(ids_BS), self.virtual)
        width = ids_BS.shape[1] + self.virtual
        firsts = mask_BS.argmax(1).tolist()
        self._prompts = [row * width + first for row, first in enumerate(firsts)]
        try:
            yield {
                "input_ids": torch.cat([room_BV, ids_BS], 1),
                "attention_mask": torch.cat([mask_BS, torch.ones_like(room_BV)], 1),
            }
        finally:
            self._prompts = []

    def _look(self, model: nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        """Find the positions of virtual tokens in the rows of this forward pass."""
        starts: list[int] = []
        if self.enabled and self.batch is not None:
            width = self.batch.tokens_BS.shape[1]
            starts = [span.row * width + span.start for span in self.batch.spans]
        elif self.enabled and begins_cache(inputs):
            starts = self._prompts
        steps_V = torch.arange(self._tokens)
        places_EV = torch.tensor(starts, dtype=torch.int64)[:, None] + steps_V
        self._places = places_EV.flatten(), steps_V.repeat(len(starts))

    def _replace(self, embedding: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """Every virtual token takes part, also in a batch without a position for it, so that its
        weights always get a gradient.
        """
        if not self.enabled or self._places is None:
            return output
        encoder: Any = self._model.get_submodule(ENCODER)
        table_VH = encoder(torch.arange(self._tokens, device=output.device).unsqueeze(0))[0]
        places_K, which_K = (index.to(output.device, non_blocking=True) for index in self._places)
        virtual_KH = table_VH.index_select(0, which_K).to(output.dtype)
        return output.flatten(0, 1).index_copy(0, places_K, virtual_KH).view_as(output)


def _peft_keys(base: nn.Module, tokens: int) -> dict[str, Any]:
    """The keys about a model in PEFT's configurations of virtual tokens."""
    config: Any = base.config.get_text_config()  # type: ignore[operator, union-attr]
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "token_dim": embedding.embedding_dim,
    }


def _first_ids(base: nn.Module, method: PromptMethod) -> Tensor:
    """`[V]`: random words of the vocabulary, or the tokens of a text, repeated."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    if method.init_text is None:
        return torch.randint(embedding.num_embeddings, (method.tokens,), device="cpu")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base_name(base))
        ids = tokenizer(method.init_text, add_special_tokens=False)["input_ids"]
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"method.init_text={method.init_text}",
            f"cannot be tokenised ({first_line(error)})",
            "write null, or a model with its tokenizer",
        ) from error
    if not ids:
        raise ModelError(
            f"method.init_text={method.init_text}", "has no token", "write another text, or null"
        )
    return torch.tensor([ids[i % len(ids)] for i in range(method.tokens)])


@torch.no_grad()
def _begin(base: nn.Module, encoder: nn.Module, ids_V: Tensor) -> None:
    """Copy the embeddings of `ids_V` as PEFT does: the module's output, which some models scale."""
    embedding: Any = base.get_input_embeddings()  # type: ignore[operator]
    weight = encoder.get_submodule("embedding").get_parameter("weight")
    if weight.is_meta:
        return
    with gather_params_ctx(embedding.parameters()):
        weight.copy_(embedding(ids_V.to(embedding.weight.device)))


def _restore(base: nn.Module, written: Mapping[str, Any]) -> None:
    """Of an MLP only its output was saved, so that both methods are the same from there on."""
    apply_prompt(base, PromptMethod(name="prompt", tokens=written["num_virtual_tokens"]))


PROMPT = Implementation(apply_prompt, restore=_restore)
P_TUNING = Implementation(apply_p_tuning, restore=_restore)
