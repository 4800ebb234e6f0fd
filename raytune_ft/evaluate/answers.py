"""What a model answers to the prompts of a split, and what rewards say of that.

Every draw is a function of the seed, the place of the prompt and the number of the completion, so
that models that are compared share their random numbers, and their differences vary less.

Shapes: P prompts, C completions of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from raytune_ft.config.metrics import REWARD
from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.evaluate.scores import Column, Scores
from raytune_ft.model.sampling import by_prompt, requests_of, sample
from raytune_ft.records import Tell
from raytune_ft.rewards.base import Group
from raytune_ft.rewards.groups import group_of
from raytune_ft.rewards.pool import SharedRewards, check_columns
from raytune_ft.train.model_runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asking:
    """Plain facts: the prompts that models are to answer, and what scores their answers.

    Attributes:
        prompts: [P], the place of each being its number.
        name: what they are, for messages.
        sampling: how completions are drawn; `n` is C.
        rewards: score each completion by itself. All models that are measured share them.
    """

    prompts: tuple[Prompt, ...]
    name: str
    sampling: SamplingConfig
    seed: int
    rewards: SharedRewards


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model said.

    Attributes:
        groups: [P], each with C completions.
        tokens_PC, ended_PC: how long each is, its end token included, and whether it has one.
        scores_PC: of each reward by its name; NaN where it gave none.
        total_PC: the weighted sum of the rewards; NaN where one gave none.
        notes: sentences on scores that are missing, and on judges.
    """

    groups: tuple[Group, ...]
    tokens_PC: Column
    ended_PC: Column
    scores_PC: Mapping[str, Column] = field(default_factory=dict)
    total_PC: Column = field(default_factory=lambda: np.empty((0, 0)))
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """P."""
        return len(self.groups)

    def figures(self) -> dict[str, Scores]:
        """`reward`, `reward:NAME` of each, `unscored`, `completion_tokens` and `truncated`: one
        value for each prompt, the mean over its completions that have one. The first three are not
        there where no reward scores one completion.
        """
        found = {}
        if self.scores_PC:
            found[REWARD] = Scores.known_mean(known_means(self.total_PC))
        for name, scores_PC in self.scores_PC.items():
            found[f"{REWARD}:{name}"] = Scores.known_mean(known_means(scores_PC))
        found["completion_tokens"] = Scores.mean(self.tokens_PC.mean(1), "min")
        found["truncated"] = Scores.mean(1 - self.ended_PC.mean(1), "min")
        if self.scores_PC:
            found["unscored"] = Scores.mean(np.isnan(self.total_PC).mean(1), "min")
        return found


def known_means(values_PC: Column) -> Column:
    """`[P]`: the mean of the values that are not NaN; NaN where there is none."""
    counts = (~np.isnan(values_PC)).sum(1)
    sums = np.nansum(values_PC, axis=1)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def start_rewards(asking: Asking, tell: Tell) -> None:
    """Start the rewards where models will be measured, before anything is spent.

    Raises:
        InputError: one of them cannot be used, or needs a column that the rows lack.
    """
    rewards = asking.rewards.start()
    columns = dict.fromkeys(column for one in asking.prompts for column in one.columns)
    check_columns(rewards, list(columns), asking.name)


def answers_of(
    runner: ModelRunner, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], asking: Asking
) -> Answers:
    """What a model says to the prompts, with scores; the same on all ranks that hold it.

    Raises:
        RunFailed: a reward died repeatedly.
    """
    count = asking.sampling.n
    said = sample(
        runner.model,
        requests_of(enumerate(asking.prompts), count),
        asking.sampling.max_new_tokens,
        settings=asking.sampling,
        ends=ends,
        pad=runner.pad_token,
        seed=asking.seed,
        apart=runner.apart,
    )
    found = None
    if runner.strategy.rank == 0:
        groups = [
            group_of(prompt, own, tokenizer)
            for prompt, own in zip(asking.prompts, by_prompt(said, count), strict=True)
        ]
        tokens_PC = np.array([len(one.ids) for one in said], np.float64).reshape(-1, count)
        ended_PC = np.array([one.ended for one in said], np.float64).reshape(-1, count)
        found = _scored(Answers(tuple(groups), tokens_PC, ended_PC), asking.rewards)
    return runner.strategy.from_rank0(found)  # type: ignore[return-value]


def _scored(said: Answers, shared: SharedRewards) -> Answers:
    with shared.serving() as rewards:
        scored = rewards.score(said.groups)
        total_PC = np.array(
            [[rewards.total(one) for one in each] for each in scored], np.float64
        ).reshape(said.tokens_PC.shape)
        scores_PC = {
            name: np.array([[one[name] for one in each] for each in scored], np.float64)
            for name in rewards.names
        }
        return Answers(
            said.groups, said.tokens_PC, said.ended_PC, scores_PC, total_PC, tuple(rewards.notes())
        )
