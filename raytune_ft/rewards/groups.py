"""What a model said to a prompt, as rewards read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.model.sampling import Said
from raytune_ft.rewards.base import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def group_of(prompt: Prompt, said: Sequence[Said], tokenizer: PreTrainedTokenizerBase) -> Group:
    """The completions of one prompt, decoded by the tokenizer of the model that said them."""

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return Group(
        prompt.origin,
        text(prompt.ids).strip(),
        text(prompt.reference).strip(),
        [text(one.answer) for one in said],
        [one.ids for one in said],
        prompt.columns,
        prompt.turns,
        prompt.text if prompt.turns is None else None,
    )
