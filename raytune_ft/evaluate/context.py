"""A model that is measured, with what several metrics need of it, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.objectives import TOKEN_FIGURES, Figure
from raytune_ft.config.schema import ModelConfig, PromoteConfig
from raytune_ft.data.split import TokenizedSplit, first_answer
from raytune_ft.evaluate.answers import Answers, Asking, answers_of
from raytune_ft.evaluate.generate import BACKENDS, choose_backend
from raytune_ft.evaluate.workers import whole
from raytune_ft.model.heads import Head, reading
from raytune_ft.model.lengths import apart_of
from raytune_ft.model.load import Precision, disk_dtype, pad_token
from raytune_ft.model.meta import build_measured
from raytune_ft.model.methods.saved import attach_saved, unfoldable
from raytune_ft.model.objectives import Objective, TokenObjective
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.products import widen_where_slow
from raytune_ft.train.model_runner import ModelRunner, choose_micro_tokens

SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """Token ids up to the first one that carries loss, and the labels from there on."""

    ids: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """Texts without special tokens and without blanks around them."""

    prompt: str
    reference: str
    generated: str


@dataclass(frozen=True, eq=False)
class Subject:
    """One model on one split.

    Attributes:
        model: may be an adapter that cannot be folded; it then works in `base`.
        train: the split that labels are read from.
        is_chat: rows are conversations, which the tokenizer's chat template writes.
        ends: the tokens that end an answer; None is the tokenizer's EOS.
        objective, figures: what the model was trained for, and the figures of its evaluation.
        strategy: how the model lies over the processes that measure it; all of them do the same.
        asking: what rewards are to score; None where no metric asks for it.
    """

    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    split: TokenizedSplit
    train: TokenizedSplit
    settings: PromoteConfig
    is_chat: bool = False
    base: ModelConfig | None = None
    ends: Sequence[int] | None = None
    objective: Objective = field(default_factory=TokenObjective)
    figures: tuple[Figure, ...] = TOKEN_FIGURES
    strategy: Strategy = field(default_factory=whole)
    asking: Asking | None = None

    @cached_property
    def runner(self) -> ModelRunner:
        """The model in the dtype that it has on disk. Raises ModelError."""
        return runner_of(self.model, self.tokenizer, self.base, strategy=self.strategy)

    @cached_property
    def continuations(self) -> list[Continuation]:
        """The greedy continuation of every prompt of the split."""
        return self._continued(range(len(self.split)), self.settings.max_new_tokens)

    @cached_property
    def answers(self) -> Answers:
        """What the model says to the prompts of `asking`, with scores."""
        assert self.asking is not None
        return answers_of(self.runner, self.tokenizer, self._ends, self.asking)

    def first(self, count: int) -> list[Continuation]:
        """Greedy continuations of at most `SAMPLE_TOKENS`, of the first `count` examples whose
        prompt is not empty.
        """
        able = (i for i in range(len(self.split)) if len(self.prompt(i).ids) > 1)
        return self._continued(list(islice(able, count)), SAMPLE_TOKENS)

    def _continued(self, examples: Sequence[int], limit: int) -> list[Continuation]:
        """Prompts are the token ids of training: nothing is rendered or tokenised again."""
        prompts = [self.prompt(i) for i in examples]
        wanted = self.settings.generation
        # Other backends cannot run methods that work on activations, nor a model in parts. All
        # ranks that hold one continue the same prompts, and so call it equally often.
        own = unfoldable(Path(self.model.path)) is not None or self.strategy.world_size > 1
        off = wanted == "auto" and self.strategy.device.type == "cpu"
        generate = BACKENDS["transformers" if own or off else choose_backend(wanted)]
        ids = [prompt.ids for prompt in prompts]
        made = generate(self.runner, self.model, ids, limit, self._ends) if prompts else []
        return [
            Continuation(*(decode(self.tokenizer, part) for part in (one.ids, one.reference, new)))
            for one, new in zip(prompts, made, strict=True)
        ]

    @property
    def _ends(self) -> Sequence[int]:
        eos = self.tokenizer.eos_token_id
        return self.ends if self.ends is not None else [eos] if isinstance(eos, int) else []

    def prompt(self, i: int) -> Prompt:
        """The prompt of example `i` and its reference."""
        return prompt_of(self.split, i)


def prompt_of(split: TokenizedSplit, i: int) -> Prompt:
    """Example `i` cut where its first run of labels begins, and where that ends."""
    ids, mask = split.example(i)
    answer = first_answer(mask)
    return Prompt(tuple(ids[: answer.start].tolist()), tuple(ids[answer].tolist()))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """The text of token ids, without special tokens and without blanks around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def runner_of(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    base: ModelConfig | None = None,
    head: Head | None = None,
    strategy: Strategy | None = None,
    computes: tuple[torch.dtype, Precision] | None = None,
) -> ModelRunner:
    """A model as it is measured: no autocast, no packing, the dtype that it has on disk.

    An adapter that cannot be folded works in `base`. `head` is the task head that the model has.
    `strategy` lays it over several processes; None is this one alone. `computes` replaces the dtype
    of its weights and the precision of its passes.

    Raises:
        ModelError: it cannot be loaded.
        CheckpointError: an adapter that cannot be folded belongs to another base.
    """
    strategy = strategy or whole()
    adapter = Path(model.path) if base is not None and unfoldable(Path(model.path)) else None
    under = base if adapter is not None and base is not None else model
    in_parts = strategy.takes_parts and adapter is None
    dtype, precision = computes or (disk_dtype(under, head), strategy.precision)
    widen_where_slow(strategy.device, dtype, getattr(torch, precision))
    made = build_measured(under, dtype, in_parts, head)
    built: Any = made.model
    if adapter is not None:
        attach_saved(built, adapter)
    built.eval()
    output = built.get_output_embeddings()
    wrapped = strategy.lay_out(built)
    if made.weights is not None:
        made.weights.fill({n: strategy.part(n, p.detach()) for n, p in built.named_parameters()})
    own_pad = built.config.get_text_config().pad_token_id  # by which a head finds its token
    return ModelRunner(
        model=built,
        wrapped=wrapped,
        head=output,
        names=[],
        strategy=strategy,
        precision=precision,
        pad_token=pad_token(tokenizer) if head is None else own_pad,
        micro_tokens=choose_micro_tokens("auto", strategy.device),
        packing=False,
        apart=apart_of(built.config),
        reading=None if head is None else reading(built, "row"),
    )
