"""Answers prompts with the model in training, and has the answers scored.

Shapes: P prompts, G completions of each, N label tokens, which are those of completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raytune_ft.background import repeated
from raytune_ft.config.methods import METHODS
from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.config.schema import Config
from raytune_ft.data.batch import MicroBatch
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.errors import RunFailed
from raytune_ft.files import read_json, write_json_atomic
from raytune_ft.model.objectives.base import WEIGHT
from raytune_ft.model.objectives.ppo import logps_and_values
from raytune_ft.model.objectives.preference import label_logps
from raytune_ft.model.sampling import (
    Request,
    Requests,
    Said,
    by_prompt,
    requests_of,
    sample_groups,
)
from raytune_ft.rewards.groups import group_of
from raytune_ft.rewards.pool import Rewards
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.side_channel import SideChannel, on_all_ranks
from raytune_ft.train.copies import Asked, Copies
from raytune_ft.train.evaluation import label_values
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.watchdog import Heartbeat

Numbers = npt.NDArray[np.float64]

EVALUATION = 2**62
"""Places of evaluations are behind all places of training, and the same for every checkpoint and
trial, which so have common random numbers."""


CHECKED = 64
"""Completions of a rollout or an evaluation whose log-probabilities are computed again."""
LARGEST_GAP = 0.05
"""Nats, of `Speaker.gap_of`: more than other kernels and their rounding in bfloat16 should make."""


@dataclass(frozen=True)
class Voice:
    """What is the same whenever models of one process answer: the tokens that end an answer, what
    logits are divided by, the rewards that score, and a line between ranks that nothing else uses.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: Sequence[int]
    temperature: float
    rewards: Rewards
    channel: SideChannel


@dataclass(frozen=True)
class Turn:
    """What a model is asked at a time: `count` completions of each of (place, prompt)."""

    speaker: Speaker
    prompts: Sequence[tuple[int, Prompt]]
    count: int
    evaluating: bool = False


@dataclass(frozen=True)
class Answered:
    """What was said to some prompts. `scores` are by name, None where a reward gave none.

    `gap`: see `Speaker.gap_of`.
    """

    said: Sequence[Sequence[Said]]
    texts: Sequence[Sequence[str]]
    scores: Sequence[Sequence[Mapping[str, float | None]]]
    totals_PG: Numbers
    gap: float | None = None

    @property
    def flat(self) -> list[Said]:
        """All completions, those of a prompt one after another."""
        return [one for group in self.said for one in group]

    def figures(self, names: Sequence[str]) -> dict[str, float]:
        """Means over all completions; those of rewards over the ones that have a score, NaN where
        none has.
        """
        flat = [scores for group in self.scores for scores in group]
        said = self.flat
        found = {}
        for name in names:
            values = [np.nan if one[name] is None else one[name] for one in flat]
            found[f"reward:{name}"] = mean_of(np.array(values, np.float64))
        return found | {
            "reward": mean_of(self.totals_PG),
            "completion_tokens": float(np.mean([len(one.ids) for one in said])),
            "truncated": float(np.mean([not one.ended for one in said])),
        }

    def errors(self, names: Sequence[str]) -> dict[str, float]:
        """The standard error of each mean reward over prompts; of none with under two that have a
        score.
        """
        found = {}
        for name in names:
            scores_PG = [[one[name] for one in group] for group in self.scores]
            known = [[value for value in group if value is not None] for group in scores_PG]
            means = [float(np.mean(group)) for group in known if group]
            if len(means) > 1:
                found[f"reward_error:{name}"] = float(np.std(means, ddof=1) / len(means) ** 0.5)
        return found


def mean_of(values: Numbers) -> float:
    """Of the numbers that are there; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def split_of_said(
    prompts: Sequence[Prompt], said: Sequence[Sequence[Said]], weights_P: Numbers | None = None
) -> TokenizedSplit:
    """An example for each completion, whose tokens are its labels."""
    examples, weights = [], []
    for number, (prompt, group) in enumerate(zip(prompts, said, strict=True)):
        for one in group:
            ids = np.array([*prompt.ids, *one.ids], np.int32)
            examples.append((ids, np.arange(len(ids)) >= len(prompt.ids)))
            weights.append(1.0 if weights_P is None else float(weights_P[number]))
    columns = {} if weights_P is None else {WEIGHT: np.array(weights, np.float32)[:, None]}
    return TokenizedSplit.from_examples(examples, columns)


def logps_of_copies(said: Sequence[Said], split: TokenizedSplit) -> Numbers:
    """`[N]`, the log-probability of each label token of `split_of_said` under what said it."""
    counts = split.label_counts.tolist()
    found = [one.logps[len(one.ids) - n :] for one, n in zip(said, counts, strict=True)]
    return np.concatenate([np.array(one, np.float64) for one in found])


class Speaker:
    """Answers prompts with the model as it is, and scores the answers; all ranks share the work."""

    def __init__(
        self,
        runner: ModelRunner,
        config: Config,
        voice: Voice,
        heart: Heartbeat,
        reference: ModelRunner | None,
        copies: Copies | None,
        first: Path,
    ) -> None:
        """`reference` stands for the model before training where that is not the model without its
        method. `copies` sample in place of the model. `first` keeps the answers of the first
        evaluation, with which those of later ones are compared, where a reward compares.
        """
        self.runner, self.rewards, self._reference = runner, voice.rewards, reference
        adapted = not METHODS[config.method.name].whole_model
        self.has_base = adapted or reference is not None
        self._voice, self._heart = voice, heart
        self._settings, self._seed = config.train.rollout, config.seed
        self._channel, self._copies = voice.channel, copies
        self._file = first
        found = read_json(first) if runner.strategy.rank == 0 and first.is_file() else None
        self._first: Sequence[Sequence[str]] | None = runner.strategy.from_rank0(found)

    def answer(self, turn: Turn) -> Answered:
        """Completions by the model as it is, and their scores.

        Raises:
            RunFailed: a reward cannot score, or copies of the model cannot sample or have other
                weights; on every rank.
        """
        if self._copies is None:
            asked = [self.requests(turn)]
            return self.scored(
                turn, said_together(self.runner, asked, self._voice, self._heart.alive)[0]
            )
        ranks, rank = self._channel.world_size, self._channel.rank
        of_all = self._ask(requests_of(turn.prompts, turn.count))
        groups = by_prompt(of_all, turn.count)
        gap = self.gap_of([one for _, one in turn.prompts], groups)
        own = [one for group in groups[rank::ranks] for one in group]
        return replace(self.scored(turn, own), gap=gap)

    def requests(self, turn: Turn) -> Requests:
        """This rank's share of a turn."""
        own = turn.prompts[self._channel.rank :: self._channel.world_size]
        limit = self._settings.max_completion_length
        return Requests(requests_of(own, turn.count), limit, self._seed)

    def scored(self, turn: Turn, said: Sequence[Said]) -> Answered:
        """A turn with what was said to each rank's `requests`, and with the scores.

        A reward that compares does so with the other completions of the prompt, and in an
        evaluation with those of the first evaluation.

        Raises:
            RunFailed: a reward cannot score; on every rank.
        """
        ranks, rank = self._channel.world_size, self._channel.rank
        own, groups = turn.prompts[rank::ranks], by_prompt(said, turn.count)

        def score() -> Any:
            asked = [
                group_of(prompt, group, self._voice.tokenizer)
                for (_, prompt), group in zip(own, groups, strict=True)
            ]
            if turn.evaluating:
                others: Sequence[Sequence[str]] = [group.completions for group in asked]
                if self._first is not None:
                    others = self._first[rank::ranks]
                scores = self.rewards.score_against(asked, others)
            else:
                scores = self.rewards.score(asked)
            return groups, [list(group.completions) for group in asked], scores

        with _alive(self._heart):
            shares = on_all_ranks(self._channel, score, RunFailed)
        parts = [shares[number % ranks] for number in range(len(turn.prompts))]
        said_P, texts_P, scores_P = (
            [part[which][number // ranks] for number, part in enumerate(parts)]
            for which in range(3)
        )
        totals = [[self.rewards.total(scores) for scores in group] for group in scores_P]
        return Answered(said_P, texts_P, scores_P, np.array(totals, dtype=np.float64))

    def evaluation(self, prompts: Sequence[Prompt]) -> Turn:
        """`rollout.eval_completions` of each prompt.

        Raises:
            RunFailed: what a reward compares them with is lost.
        """
        judges = self.rewards.judges
        if judges.processes and self._first is None and self.runner.strategy.steps:
            raise RunFailed(
                f"{self._file} is missing, and rewards.{judges.names[0]} compares with the answers "
                "in it; copy it back, or begin the run again"
            )
        placed = list(enumerate(prompts, start=EVALUATION))
        return Turn(self, placed, self._settings.eval_completions, evaluating=True)

    def figures(self, answered: Answered) -> dict[str, float]:
        """Those of an evaluation. The answers of the first one are kept for later ones.

        Raises:
            RunFailed: a reward scored none of them.
        """
        if self.rewards.judges.processes and self._first is None:
            self._first = answered.texts
            if self.runner.strategy.rank == 0:
                write_json_atomic(self._file, answered.texts)
        found = answered.figures(self.rewards.names)
        for name in self.rewards.names:
            if np.isnan(found[f"reward:{name}"]):
                raise RunFailed(f"{name} scored no completion of an evaluation: {self.missing()}")
        found |= answered.errors(self.rewards.names)
        return {f"eval_{name}": value for name, value in found.items()}

    def missing(self) -> str:
        """Why the first score is missing, as this rank's rewards know it."""
        found = [one.tally.first_missing for one in self.rewards.processes]
        return next(filter(None, found), "see the logs of other workers")

    def _ask(self, requests: Sequence[Request]) -> list[Said]:
        """Continuations by copies, on all ranks the same."""
        assert self._copies is not None
        limit, pad, voice = self._settings.max_completion_length, self.runner.pad_token, self._voice
        asked = Asked(requests, limit, voice.temperature, voice.ends, pad, self._seed)
        with _alive(self._heart):
            return self._copies.say(asked)

    def gap_of(self, prompts: Sequence[Prompt], said: Sequence[Sequence[Said]]) -> float:
        """The mean absolute difference between the log-probabilities of tokens under the copies
        that said them and under the model, of the first `CHECKED` completions.

        Raises:
            RunFailed: it is more than `LARGEST_GAP`.
        """
        some = max(1, CHECKED // len(said[0]))
        split = split_of_said(prompts[:some], said[:some])
        theirs_N = logps_of_copies([one for group in said[:some] for one in group], split)
        own_N = self.logps(split, self._voice.temperature)
        gap = float(np.abs(theirs_N - own_N).mean()) if len(own_N) else 0.0
        if not gap <= LARGEST_GAP:
            raise RunFailed(
                "the copies that sample do not have the weights of the model in training: the mean "
                f"log-probability of a sampled token is {theirs_N.mean():.4f} under the copies and "
                f"{own_N.mean():.4f} under the model; token by token the two differ by {gap:.4f}, "
                f"and {LARGEST_GAP} is allowed; write train.rollout.engine: embedded"
            )
        return gap

    def logps(self, split: TokenizedSplit, temperature: float) -> Numbers:
        """`[N]`, the log-probability of each label token; the same on all ranks."""
        return self._logps(split, temperature, self.runner)

    def base_logps(self, split: TokenizedSplit, temperature: float) -> Numbers:
        """The same under the model before training."""
        if self._reference is not None:
            return self._logps(split, temperature, self._reference)
        with self.runner.without_method():
            return self._logps(split, temperature, self.runner)

    def logps_and_values(
        self, split: TokenizedSplit, temperature: float
    ) -> tuple[Numbers, Numbers]:
        """`[N]` each: `logps`, and the critic's values of the states before each label token."""

        def both(batch: MicroBatch) -> Tensor:
            found = logps_and_values(self.runner, batch, temperature)
            return torch.stack([each.double() for each in found])

        logps_N, values_N = self._of_labels(split, self.runner, both)
        return logps_N, values_N

    def _logps(self, split: TokenizedSplit, temperature: float, runner: ModelRunner) -> Numbers:
        def of(batch: MicroBatch) -> Tensor:
            return label_logps(runner, batch, temperature)[None]

        return self._of_labels(split, runner, of)[0]

    def _of_labels(
        self, split: TokenizedSplit, runner: ModelRunner, of: Callable[[MicroBatch], Tensor]
    ) -> Numbers:
        return label_values(runner, split, np.arange(len(split)), of, self._heart.alive)


def said_together(
    runner: ModelRunner, asked: Sequence[Requests], voice: Voice, alive: Callable[[], object]
) -> list[list[Said]]:
    """Continuations by each of several models that share the passes of `runner`, or by its one.
    `alive` is called after every pass.
    """
    lockstep = None
    if runner.strategy.gathers:
        lockstep = _Lockstep(runner.wrapped, runner.strategy, runner.pad_token)
    with runner.autocast():
        said = sample_groups(
            runner.model,
            asked,
            settings=SamplingConfig(temperature=voice.temperature),
            ends=voice.ends,
            pad=runner.pad_token,
            apart=runner.apart,
            forward=lockstep,
            beat=alive,
        )
        if lockstep is not None:
            lockstep.drain()
    return said


@contextmanager
def _alive(heart: Heartbeat) -> Iterator[None]:
    """A context that is no hang, however long it takes: each reward has a time limit of its own."""
    try:
        with repeated(heart.alive, 1.0, "alive"):
            yield
    finally:
        heart.alive()


class _Lockstep:
    """A sharded model gathers its weights in every pass, in which all ranks must take part: before
    each they vote on whether any has work, and one that has none computes a token for nothing.
    """

    def __init__(self, wrapped: Callable[..., Any], strategy: Strategy, pad: int) -> None:
        self._wrapped, self._strategy, self._pad = wrapped, strategy, pad

    def __call__(self, **inputs: Any) -> Any:
        self._vote(working=True)
        return self._wrapped(**inputs)

    @torch.no_grad()
    def drain(self) -> None:
        """Go on until no rank has work."""
        token = torch.full((1, 1), self._pad, device=self._strategy.device)
        while self._vote(working=False):
            self._wrapped(input_ids=token, use_cache=False)

    def _vote(self, working: bool) -> bool:
        vote = torch.tensor(float(working), device=self._strategy.device)
        return self._strategy.sum(vote).item() > 0
