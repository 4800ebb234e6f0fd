"""What the model says becomes what it is trained on: sampled, scored, and made a split in memory.

A rollout is a function of the seed, the places of its prompts in the stream and the weights at its
beginning: every draw is keyed (see `model.sampling`), so ranks share the work in any way. Its steps
are then those of any other split.

Shapes: P prompts, G completions of each, E of them all, N tokens of all completions.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.load import asked_rewards, expand_env
from raytune_ft.config.methods import METHODS
from raytune_ft.config.objectives import LOSS, OBJECTIVES, REWARD
from raytune_ft.config.rewards import RewardConfig, function_of, with_answers
from raytune_ft.config.sampling import SamplingConfig
from raytune_ft.config.schema import Config
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.order import Indices
from raytune_ft.data.prepare import REFERENCE, PreparedData
from raytune_ft.data.prompts import Prompts
from raytune_ft.data.split import PARTS, TokenizedSplit, parts_of
from raytune_ft.errors import CheckpointError, RunFailed
from raytune_ft.files import sha256_of, write_text_atomic
from raytune_ft.layout import ROLLOUT, ROLLOUTS, STATE, judges_beside, prompts_file
from raytune_ft.model.methods import without_method
from raytune_ft.model.objectives.base import WEIGHT
from raytune_ft.model.objectives.policy import ADVANTAGE, COUNTED, SAMPLED
from raytune_ft.model.objectives.preference import label_logps
from raytune_ft.model.sampling import Request, Said, sample
from raytune_ft.rewards.groups import group_of
from raytune_ft.rewards.pool import Rewards, check_columns, started
from raytune_ft.strategy import Strategy
from raytune_ft.strategy.side_channel import on_all_ranks
from raytune_ft.train.evaluation import BLOCK_EXAMPLES, Scores
from raytune_ft.train.material import Given, Material, Stream, Work
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.watchdog import Beat, Heartbeat

Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

EVALUATION = 2**62
"""Places of evaluations are behind all places of training, and the same for every checkpoint and
trial, which so have common random numbers."""
SILENT = 5
"""After so many rollouts in a row from which nothing can be learnt, a run fails."""
NO_SPREAD = 1e-4
"""Added to standard deviations of rewards, as in TRL."""


@dataclass(frozen=True)
class Answered:
    """What was said to some prompts. `scores` are by name, None where a reward gave none."""

    said: Sequence[Sequence[Said]]
    texts: Sequence[Sequence[str]]
    scores: Sequence[Sequence[Mapping[str, float | None]]]
    totals_PG: Numbers

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
            found[f"reward:{name}"] = _mean(np.array(values, np.float64))
        return found | {
            "reward": _mean(self.totals_PG),
            "completion_tokens": float(np.mean([len(one.ids) for one in said])),
            "truncated": float(np.mean([not one.ended for one in said])),
        }


def _mean(values: Numbers) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


class Speaker:
    """Answers prompts with the model as it is, and scores the answers; all ranks share the work."""

    def __init__(
        self,
        runner: ModelRunner,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        rewards: Rewards,
        heart: Heartbeat,
    ) -> None:
        self.runner, self.rewards = runner, rewards
        self._tokenizer, self._ends, self._heart = tokenizer, ends, heart
        self._settings, self._seed = config.train.rollout, config.seed
        self._channel = runner.strategy.side_channel()

    def answer(self, prompts: Sequence[tuple[int, Prompt]], count: int) -> Answered:
        """`count` completions of each of (place, prompt).

        Raises:
            RunFailed: a reward cannot score; on every rank.
        """
        ranks, rank = self._channel.world_size, self._channel.rank
        own = prompts[rank::ranks]
        said = self._say([Request(one.ids, place, g) for place, one in own for g in range(count)])
        groups = [said[start : start + count] for start in range(0, len(said), count)]

        def score() -> Any:
            asked = [
                group_of(prompt, group, self._tokenizer)
                for (_, prompt), group in zip(own, groups, strict=True)
            ]
            scores = self.rewards.score(asked)
            return groups, [list(group.completions) for group in asked], scores

        with _alive(self._heart):
            shares = on_all_ranks(self._channel, score, RunFailed)
        parts = [shares[number % ranks] for number in range(len(prompts))]
        said_P, texts_P, scores_P = (
            [part[which][number // ranks] for number, part in enumerate(parts)]
            for which in range(3)
        )
        totals = [[self.rewards.total(scores) for scores in group] for group in scores_P]
        return Answered(said_P, texts_P, scores_P, np.array(totals, dtype=np.float64))

    def evaluated(self, prompts: Prompts) -> tuple[Answered, dict[str, float]]:
        """`rollout.eval_completions` of each prompt, and the figures of an evaluation.

        Raises:
            RunFailed: a reward scored none of them.
        """
        placed = [(EVALUATION + i, prompts[i]) for i in range(len(prompts))]
        answered = self.answer(placed, self._settings.eval_completions)
        found = answered.figures(self.rewards.names)
        for name in self.rewards.names:
            if np.isnan(found[f"reward:{name}"]):
                raise RunFailed(f"{name} scored no completion of an evaluation: {self.missing()}")
        return answered, {f"eval_{name}": value for name, value in found.items()}

    def missing(self) -> str:
        """Why the first score is missing, as this rank's rewards know it."""
        found = [one.tally.first_missing for one in self.rewards.processes]
        return next(filter(None, found), "see the logs of other workers")

    def _say(self, requests: Sequence[Request]) -> list[Said]:
        runner, lockstep = self.runner, None
        if runner.strategy.gathers:
            lockstep = _Lockstep(runner.wrapped, runner.strategy, runner.pad_token)
        with runner.autocast():
            said = sample(
                runner.model,
                requests,
                self._settings.max_completion_length,
                settings=SamplingConfig(temperature=self._settings.temperature),
                ends=self._ends,
                pad=runner.pad_token,
                seed=self._seed,
                apart=runner.apart,
                forward=lockstep,
                beat=self._heart.alive,
            )
            if lockstep is not None:
                lockstep.drain()
        return said

    @torch.no_grad()
    def logps(
        self, split: TokenizedSplit, temperature: float, runner: ModelRunner | None = None
    ) -> Numbers:
        """`[N]`, the log-probability of each label token; the same on all ranks."""
        runner = runner or self.runner
        numbers: Any = np.arange(int(split.label_mask.sum()))
        numbered = replace(split, label_columns={"number": numbers})
        device = runner.strategy.device
        found_N = torch.zeros(int(split.label_mask.sum()), dtype=torch.float64, device=device)
        for start in range(0, len(split), BLOCK_EXAMPLES):
            indices = np.arange(start, min(start + BLOCK_EXAMPLES, len(split)))
            for on_host in runner.micro_batches(numbered, indices):
                batch = on_host.to(device)
                logps_N = label_logps(runner, batch, temperature)
                found_N[batch.label_columns["number"]] = logps_N.double()
                self._heart.alive()
        # Exact, since all but one of the addends are 0.
        return np.asarray(runner.strategy.sum(found_N).cpu().numpy())


@contextmanager
def _alive(heart: Heartbeat) -> Iterator[None]:
    """A context that is no hang, however long it takes: each reward has a time limit of its own."""
    over = threading.Event()

    def tick() -> None:
        while not over.wait(1.0):
            heart.alive()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
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


@dataclass(frozen=True)
class Rollout:
    """A rollout that steps are trained on.

    Attributes:
        step: the first of its steps.
        first: the place of its first prompt in the stream.
        split: `each` examples for every prompt.
        figures: see `Answered.figures`.
    """

    step: int
    first: int
    each: int
    split: TokenizedSplit
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint."""
        split, numbers = self.split, [self.step, self.first, self.each]
        named = json.dumps(dict(self.figures)).encode()
        arrays = {
            "numbers": np.array(numbers, np.int64),
            "figures": np.frombuffer(named, np.uint8).copy(),
            "input_ids": split.input_ids,
            "label_mask": split.label_mask,
            "offsets": split.offsets,
            **{f"column.{name}": values for name, values in split.columns.items()},
            **{f"label.{name}": values for name, values in split.label_columns.items()},
        }
        return {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in arrays.items()}

    @classmethod
    def load(cls, path: Path) -> Rollout:
        """From the file of a checkpoint. Raises CheckpointError where it cannot be read."""
        try:
            with safe_open(path, "numpy") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step, first, each = found.pop("numbers").tolist()
            figures = json.loads(found.pop("figures").tobytes())
            own = {name: found.pop(name) for name in ("input_ids", "label_mask", "offsets")}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as a rollout: {error}") from error
        split = TokenizedSplit(
            **own, columns=_under(found, "column."), label_columns=_under(found, "label.")
        )
        return cls(step, first, each, split, figures)


def _under(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}


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


def kept_labels(split: TokenizedSplit, kept_E: Flags) -> tuple[Flags, Flags]:
    """The label mask with that of some examples alone, and which label tokens are left."""
    owners = np.repeat(np.arange(len(split)), split.lengths)
    mask = split.label_mask & kept_E[owners]
    return mask, mask[split.label_mask]


def advantages_of(
    totals_PG: Numbers, scale: str, excluded_P: Flags | None = None
) -> tuple[Numbers, Flags]:
    """`[P, G]` advantages, and which completions take part.

    A completion without a reward, NaN, has no part in its group's mean and the advantage 0. A group
    with under two rewards, or one that is `excluded`, takes no part at all. `scale` divides by the
    standard deviation over a group or over all ("batch"), plus `NO_SPREAD`; or by nothing.
    """
    known_PG = ~np.isnan(totals_PG)
    counts_P1 = known_PG.sum(1, keepdims=True)
    filled_PG = np.where(known_PG, totals_PG, 0.0)
    means_P1 = filled_PG.sum(1, keepdims=True) / np.maximum(counts_P1, 1)
    apart_PG = np.where(known_PG, totals_PG - means_P1, 0.0)
    if scale == "group":
        spread = np.sqrt((apart_PG**2).sum(1, keepdims=True) / np.maximum(counts_P1 - 1, 1))
        apart_PG = apart_PG / (spread + NO_SPREAD)
    elif scale == "batch":
        known = totals_PG[known_PG]
        spread_of_all = known.std(ddof=1) if len(known) > 1 else 0.0
        apart_PG = apart_PG / (spread_of_all + NO_SPREAD)
    taking_P1 = counts_P1 > 1
    if excluded_P is not None:
        taking_P1 = taking_P1 & ~excluded_P[:, None]
    return np.where(taking_P1, apart_PG, 0.0), np.broadcast_to(taking_P1, totals_PG.shape)


def same_of(totals_PG: Numbers) -> Flags:
    """`[P]`, whether the known rewards of a group are all equal."""
    highest = np.where(np.isnan(totals_PG), -np.inf, totals_PG).max(1)
    lowest = np.where(np.isnan(totals_PG), np.inf, totals_PG).min(1)
    return np.asarray(highest <= lowest)


class Watched(Given):
    """The splits of the data, with rewards of what the model says in evaluations."""

    def __init__(self, runner: ModelRunner, data: PreparedData, speaker: Speaker) -> None:
        super().__init__(runner, data)
        self._speaker = speaker
        self._prompts = Prompts(data.path / prompts_file("validation"))

    def evaluate(self, beat: Beat) -> Scores:
        """Raises RunFailed where a reward scores nothing."""
        scores = super().evaluate(beat)
        _, figures = self._speaker.evaluated(self._prompts)
        del figures[REWARD.name]  # nothing is trained on, so that nothing has a weight
        return replace(scores, figures=scores.figures | figures)


class Rolled(Material):
    """Completions of the model to the prompts of the training split."""

    def __init__(
        self,
        speaker: Speaker,
        data: PreparedData,
        config: Config,
        run_dir: Path,
        reference: ModelRunner | None = None,
    ) -> None:
        """`reference` stands for the model before training where that is not the model without its
        method.
        """
        self._speaker, self._data, self._config = speaker, data, config
        self._train = Prompts(data.path / prompts_file("train"))
        self._validation = Prompts(data.path / prompts_file("validation"))
        self._settings, self._reference = config.train.rollout, reference
        self._pairs = OBJECTIVES[config.train.objective].rollouts > 1
        adapted = not METHODS[config.method.name].whole_model
        self._has_base = adapted or reference is not None
        self._rollout: Rollout | None = None
        self._silent, self._unscored, self._step = 0, 0, 0
        self._file = run_dir / ROLLOUTS
        self._writes = speaker.runner.strategy.rank == 0 and self._settings.keep > 0

    def steps(self, stream: Stream) -> Generator[Work]:
        """A rollout begins with the first of its steps, since it needs the weights before it."""
        own, batch = self._settings, self._config.train.batch_size
        for step in stream.remaining:
            began = time.perf_counter()
            start, count = stream.place(step)
            if (step - 1) % own.steps == 0:
                examples = stream.examples(start, own.steps_per_generation * batch)
                self._rollout = self._roll(step, start, examples)
            assert self._rollout is not None
            self._step, rollout = step, self._rollout
            chosen = np.arange(start - rollout.first, start - rollout.first + count)
            indices = parts_of(chosen, rollout.each)
            batches = self._speaker.runner.micro_batches(rollout.split, indices)
            examples = stream.examples(start, count)
            yield Work(examples, rollout.split, indices, batches, began, rollout.figures)

    def state(self) -> Mapping[str, Tensor]:
        """The rollout, where more steps are to be taken on it."""
        if self._rollout is None or self._step % self._settings.steps == 0:
            return {}
        return self._rollout.tensors

    def restore(self, checkpoint: Path, step: int) -> None:
        if self._writes:
            _cut(self._file, step)
        if step % self._settings.steps:
            self._rollout = Rollout.load(checkpoint / STATE / ROLLOUT)

    def evaluate(self, beat: Beat) -> Scores:
        """Completions of each validation prompt. `eval_loss` is minus the mean reward.

        Raises:
            RunFailed: a reward scored none of them.
        """
        answered, figures = self._speaker.evaluated(self._validation)
        figures = {LOSS.name: -figures[REWARD.name], **figures}
        if self._has_base:
            prompts = [self._validation[i] for i in range(len(self._validation))]
            split = split_of_said(prompts, answered.said)
            own_N = self._speaker.logps(split, self._settings.temperature)
            drift_N = own_N - self._base_logps(split, self._settings.temperature)
            figures["eval_kl"] = float(drift_N.sum() / len(split))
        return Scores(figures)

    def _roll(self, step: int, first: int, examples: Indices) -> Rollout:
        own, speaker = self._settings, self._speaker
        prompts = [self._train[int(i)] for i in examples]
        placed = [(first + number, prompt) for number, prompt in enumerate(prompts)]
        answered = speaker.answer(placed, own.num_generations)
        weights = self._data.train.columns.get(WEIGHT)
        weights_P = None if weights is None else weights[examples, 0].astype(np.float64)
        learn = self._paired if self._pairs else self._weighed
        split, advantages_PG = learn(prompts, answered, weights_P)
        self._check_signal(step, answered)
        figures = answered.figures(speaker.rewards.names)
        figures["same_rewards"] = float(same_of(answered.totals_PG).mean())
        ties = sum(one.near_ties for one in answered.flat)
        figures |= {"near_ties": float(ties)} if ties else {}
        missing = int(np.isnan(answered.totals_PG).sum())
        figures |= {"unscored": float(missing)} if missing else {}
        if self._writes:
            self._keep(step, prompts, answered, advantages_PG)
        return Rollout(step, first, len(split) // len(prompts), split, figures)

    def _paired(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> tuple[TokenizedSplit, Numbers]:
        """The best completion of each prompt against the worst, the first of equals, for the losses
        of DPO. A tie, and a prompt with under two scores, has the weight 0. Also `[P, G]`: 1 for
        chosen, -1 for rejected.
        """
        totals_PG = answered.totals_PG
        known_PG = ~np.isnan(totals_PG)
        best_P = np.where(known_PG, totals_PG, -np.inf).argmax(1)
        worst_P = np.where(known_PG, totals_PG, np.inf).argmin(1)
        tied_P = same_of(totals_PG)
        best_P, worst_P = np.where(tied_P, 0, best_P), np.where(tied_P, 1, worst_P)
        chosen = list(zip(answered.said, best_P.tolist(), worst_P.tolist(), strict=True))
        flat = split_of_said(prompts, [(group[one], group[other]) for group, one, other in chosen])
        own_P = np.ones(len(prompts)) if weights_P is None else weights_P
        split = replace(
            flat,
            offsets=flat.offsets[::2],
            columns={
                PARTS: flat.lengths.reshape(-1, 2).astype(np.float32),
                WEIGHT: np.where(tied_P, 0.0, own_P)[:, None].astype(np.float32),
            },
        )
        logps_N: Any = self._base_logps(split, 1.0)
        signs_PG = np.zeros(totals_PG.shape)
        rows = np.arange(len(prompts))[~tied_P]
        signs_PG[rows, best_P[~tied_P]], signs_PG[rows, worst_P[~tied_P]] = 1, -1
        return replace(split, label_columns={REFERENCE: logps_N}), signs_PG

    def _weighed(
        self, prompts: Sequence[Prompt], answered: Answered, weights_P: Numbers | None
    ) -> tuple[TokenizedSplit, Numbers]:
        """Every completion with what the losses of GRPO read, and the advantages `[P, G]`."""
        grpo, totals_PG = self._config.train.grpo, answered.totals_PG
        split = split_of_said(prompts, answered.said, weights_P)
        temperature = self._settings.temperature
        labels: dict[str, Numbers] = {}
        if self._settings.steps > 1 or (grpo.beta and grpo.kl == "reward"):
            labels[SAMPLED] = self._speaker.logps(split, temperature)
        if grpo.beta:
            labels[REFERENCE] = self._base_logps(split, temperature)
        if grpo.beta and grpo.kl == "reward":
            drift_N = labels[SAMPLED] - labels.pop(REFERENCE)
            bounds = np.cumsum(split.label_counts)[:-1]
            drift_E = np.array([part.sum() for part in np.split(drift_N, bounds)])
            totals_PG = totals_PG - grpo.beta * drift_E.reshape(totals_PG.shape)
        excluded_P = np.zeros(len(totals_PG), np.bool_)
        if grpo.drop_zero_std:
            excluded_P |= same_of(totals_PG)
        if grpo.gate is not None:
            gate = [[scores[grpo.gate] for scores in group] for group in answered.scores]
            excluded_P |= same_of(np.array(gate, dtype=np.float64))
        advantages_PG, taking_PG = advantages_of(totals_PG, grpo.scale_rewards, excluded_P)
        taking_E = taking_PG.reshape(-1)
        kept_E = taking_E
        if grpo.mask_truncated_completions:
            kept_E = taking_E & np.array([one.ended for one in answered.flat])
        mask, left = kept_labels(split, kept_E)
        columns = {
            **split.columns,
            ADVANTAGE: advantages_PG.reshape(-1, 1),
            COUNTED: taking_E.reshape(-1, 1).astype(np.float64),
        }
        made = TokenizedSplit(
            split.input_ids,
            mask,
            split.offsets,
            columns=columns,  # type: ignore[arg-type]
            label_columns={name: values[left] for name, values in labels.items()},  # type: ignore[misc]
        )
        return made, advantages_PG

    def _base_logps(self, split: TokenizedSplit, temperature: float) -> Numbers:
        """Under the model before training."""
        if self._reference is not None:
            return self._speaker.logps(split, temperature, self._reference)
        with without_method(self._speaker.runner.model):
            return self._speaker.logps(split, temperature)

    def _check_signal(self, step: int, answered: Answered) -> None:
        """Raises RunFailed after `SILENT` rollouts in a row without a score, or at the beginning of
        a run without two different rewards; later on these may mean that all is learnt.
        """
        totals_PG, beta = answered.totals_PG, self._config.train.grpo.beta
        learnt = not same_of(totals_PG).all() or beta > 0
        self._silent = 0 if learnt else self._silent + 1
        self._unscored = self._unscored + 1 if np.isnan(totals_PG).all() else 0
        if self._unscored >= SILENT:
            raise RunFailed(f"step {step}: no completion has a score: {self._speaker.missing()}")
        if self._silent < SILENT or step > SILENT * self._settings.steps:
            return
        raise RunFailed(
            f"step {step}: no group of {SILENT} rollouts in a row has two different rewards (the "
            f"last mean is {_mean(answered.totals_PG):g}); raise train.rollout.temperature or "
            "num_generations, or train on easier prompts first"
        )

    def _keep(
        self, step: int, prompts: Sequence[Prompt], answered: Answered, advantages_PG: Numbers
    ) -> None:
        rows = [
            {
                "step": step,
                "prompt": prompt.written,
                "completion": answered.texts[p][g],
                "reward": answered.totals_PG[p, g] if scored else None,
                "rewards": answered.scores[p][g],
                "advantage": advantages_PG[p, g],
                "tokens": len(answered.said[p][g].ids),
                "ended": answered.said[p][g].ended,
                "origin": prompt.origin,
            }
            for p, prompt in enumerate(prompts)
            for g in range(self._settings.num_generations)
            for scored in [not np.isnan(answered.totals_PG[p, g])]
        ]
        with self._file.open("a", encoding="utf-8", errors="surrogatepass") as file:
            for row in rows[: self._settings.keep]:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def rewards_of(config: Config, data_dir: Path) -> list[RewardConfig]:
    """The rewards that a run asks, with their secrets. Judges keep their answers beside the token
    cache.
    """
    found = asked_rewards(expand_env(config, rewards=True))
    return with_answers(found, judges_beside(data_dir.parent))


def with_rewards(config: Config, data: PreparedData) -> PreparedData:
    """Start every reward once, before anything is spent. The data whose report has the hashes of
    the files of those that are trained on.

    Raises:
        ConfigError: one of them cannot be used, or needs a column that the rows lack.
    """
    if not data.report.prompt_files:
        return data
    with started(rewards_of(config, data.path)) as rewards:
        for name in data.report.prompt_files:
            prompts = Prompts(data.path / prompts_file(name))
            check_columns(rewards, list(prompts[0].columns), f"data.{name}")
    files = {
        each.called: sha256_of(Path(found[0]))
        for each in asked_rewards(config)
        if each.weight and (found := function_of(each.name)) is not None
    }
    return replace(data, report=replace(data.report, reward_files=files))


def _cut(file: Path, step: int) -> None:
    """Leave the rollouts of steps up to `step`."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="surrogatepass").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # the half line of a killed writer
            continue
        if row["step"] <= step:
            kept.append(line)
    write_text_atomic(file, "".join(kept))
