"""A reward model: one number for a prompt with an answer, from a head on a language model.

Tokens are those of its training: its own tokenizer, prompt and answer encoded as `format:
preference` does, or by its own chat template, with the end token. The number is what
AutoModelForSequenceClassification of transformers gives, which reads the last token that is no
padding. Differences of numbers for one prompt are log-odds (Bradley and Terry, 1952); numbers for
different prompts do not compare.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.paths import is_hub_model
from raytune_ft.config.rewards import RewardModel
from raytune_ft.config.schema import ModelConfig
from raytune_ft.data.formats.example import Encoder
from raytune_ft.data.formats.prompt_completion import PROMPT_COMPLETION
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.errors import ConfigError, DataError, InputError
from raytune_ft.model.heads import Head, label_weights
from raytune_ft.model.hub import commit_of, fetch, pin, reward_model
from raytune_ft.model.lengths import usable_positions
from raytune_ft.model.load import (
    check_files,
    disk_dtype,
    load_base,
    load_model_config,
    load_tokenizer,
    own_dtypes,
    written_head,
)
from raytune_ft.rewards.base import WORKING, Broken, Group, Score, Scorer, Yielded, at_once

_TRAIN_ONE = "train one with train.objective: reward"
_SOURCE = SourceConfig(path="-", turns="last")


def check_model(config: RewardModel) -> None:
    """Check what lies on this machine of a reward model; one of the hub is downloaded. No weight is
    read.

    Raises:
        ConfigError: it is not there, no sequence classifier, or gives several numbers.
    """
    model = reward_model(config)
    if is_hub_model(model.path):
        try:
            fetch(model, commit_of(model))
        except InputError as error:
            raise _refused(config, error) from error
    _head_of(config, model)


def of_model(config: RewardModel) -> Scorer:
    """Scores by a model on a GPU where there is one, in batches of similar length.

    Raises:
        ConfigError: see `check_model`, or its files lack weights.
    """
    model = reward_model(config)
    if is_hub_model(model.path):
        pin(model, commit_of(model))
    head = _head_of(config, model)
    try:
        dtype = getattr(torch, config.dtype, None) or disk_dtype(model, head)
        loaded: Any = load_base(model, dtype, head)
        tokenizer = load_tokenizer(model)
    except InputError as error:
        raise _refused(config, error) from error
    missing = label_weights(loaded).keys() - own_dtypes(model).keys()
    if missing:
        rule = f"has no {min(missing)} in its files, and so no trained head"
        raise ConfigError(_key(config), rule, _TRAIN_ONE)
    loaded.eval().requires_grad_(False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = [one for one in (config.max_length, usable_positions(loaded)) if one is not None]
    reader = _Reader(
        loaded.to(device),
        Encoder.of(tokenizer),
        config.separator,
        min(limits, default=None),
        config.batch_tokens,
        loaded.config.get_text_config().pad_token_id or 0,
        device,
    )
    return at_once(reader.scores)


def _key(config: RewardModel) -> str:
    return f"rewards.{config.called}.path={config.path}"


def _refused(config: RewardModel, error: InputError) -> ConfigError:
    """The same of this key."""
    own = error.value == f"model.path={config.path}"
    rule = error.rule if own else f"cannot be used: {error.value} {error.rule}"
    return ConfigError(_key(config), rule, error.remedy)


def _head_of(config: RewardModel, model: ModelConfig) -> Head:
    try:
        check_files(model)
        load_model_config(model, Head("regression", ("reward",)))
        head = written_head(model)
    except InputError as error:
        raise _refused(config, error) from error
    if head is None:
        raise ConfigError(
            _key(config), "has no head for whole answers, and so gives no reward", _TRAIN_ONE
        )
    if len(head.labels) != 1:
        rule = f"has {len(head.labels)} labels, and a reward is one number"
        raise ConfigError(_key(config), rule, _TRAIN_ONE)
    return head


@dataclass(frozen=True)
class _Reader:
    """A loaded model; `longest` is None where any length can be read."""

    model: Any
    encoder: Encoder
    separator: str
    longest: int | None
    batch_tokens: int
    pad: int
    device: torch.device

    def scores(self, groups: Sequence[Group]) -> Iterator[Yielded]:
        """See `rewards.base.Scorer`, with a sign of life before each batch."""
        encoded = self._encode(groups)
        found: dict[int, float] = {}
        able = [i for i, ids in enumerate(encoded) if not isinstance(ids, Score)]
        able.sort(key=lambda i: -len(encoded[i]))  # type: ignore[arg-type]
        while able:
            longest = len(encoded[able[0]])  # type: ignore[arg-type]
            batch = able[: max(1, self.batch_tokens // longest)]
            del able[: len(batch)]
            yield WORKING
            rows: list[list[int]] = [encoded[i] for i in batch]  # type: ignore[misc]
            found |= zip(batch, self._numbers(rows), strict=True)
        for i, ids in enumerate(encoded):
            yield ids if isinstance(ids, Score) else found[i]

    def _encode(self, groups: Sequence[Group]) -> list[list[int] | Score]:
        """The tokens of each prompt with its completion; where there are none, why."""
        rows = [
            Row(group.origin, _columns(group, completion))
            for group in groups
            for completion in group.completions
        ]
        try:
            made = PROMPT_COMPLETION.encode(self.encoder, _SOURCE, self.separator, rows)
        except DataError as error:
            raise Broken(f"cannot read the prompts: {error.rule}") from error
        return [self._usable(one) for one in made]

    def _usable(self, made: Any) -> list[int] | Score:
        if isinstance(made, BadRow):
            return Score(None, f"{made.cause}: {made.detail}")
        if self.longest is not None and len(made.ids) > self.longest:
            return Score(None, f"too long: {len(made.ids)} tokens, and at most {self.longest}")
        ids: list[int] = made.ids.tolist()
        return ids

    @torch.no_grad()
    def _numbers(self, rows: Sequence[list[int]]) -> list[float]:
        """`[B]`, of rows that are padded on the right."""
        longest = max(map(len, rows))
        ids_BS = torch.full((len(rows), longest), self.pad)
        mask_BS = torch.zeros_like(ids_BS)
        for row, ids in enumerate(rows):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
            mask_BS[row, : len(ids)] = 1
        inputs = {"input_ids": ids_BS.to(self.device), "attention_mask": mask_BS.to(self.device)}
        logits_B1 = self.model(**inputs).logits
        numbers: list[float] = logits_B1[:, 0].double().tolist()
        return numbers


def _columns(group: Group, completion: str) -> dict[str, Any]:
    """The row that `format: prompt_completion` reads."""
    if group.turns is None:
        prompt = group.prompt if group.text is None else group.text
        return {"prompt": prompt, "completion": completion}
    answer = [{"role": "assistant", "content": completion}]
    tools = group.columns.get("tools")
    return {"prompt": list(group.turns), "completion": answer, "tools": tools}
