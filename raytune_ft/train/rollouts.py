"""What the model says becomes what it is trained on: a split in memory, which checkpoints keep.

A rollout is a function of the seed, the places of its prompts in the stream and the weights at its
beginning: every draw is keyed (see `model.sampling`), so ranks share the work in any way. Its steps
are then those of any other split.

Shapes: P prompts, G completions of each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raytune_ft.config.load import asked_rewards
from raytune_ft.config.objectives import LOSS, OBJECTIVES, REWARD
from raytune_ft.config.rewards import RewardConfig, expanded, function_of, with_answers
from raytune_ft.config.schema import Config
from raytune_ft.data.formats.prompt import Prompt
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.prompts import prompts_of
from raytune_ft.data.split import TokenizedSplit, parts_of
from raytune_ft.errors import CheckpointError, RunFailed
from raytune_ft.files import sha256_of, write_text_atomic
from raytune_ft.layout import ROLLOUT, ROLLOUTS, STATE, judges_beside
from raytune_ft.model.objectives.base import WEIGHT
from raytune_ft.rewards.pool import check_columns, started
from raytune_ft.train.credit import Credit
from raytune_ft.train.evaluation import Scores
from raytune_ft.train.material import Given, Material, Stream, Work
from raytune_ft.train.model_runner import ModelRunner
from raytune_ft.train.report import lines_up_to
from raytune_ft.train.speaker import Answered, Numbers, Speaker, Turn, mean_of, split_of_said
from raytune_ft.train.watchdog import Beat

SILENT = 5
"""A run fails after this many rollouts in a row that teach it nothing."""


@dataclass(frozen=True)
class Rollout:
    """A rollout that steps are trained on.

    Attributes:
        step: the first of its steps.
        first: the place of its first prompt in the stream.
        split: `each` examples for every prompt.
        figures: see `Answered.figures` and `train.credit.Learnt`.
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


class Watched(Given):
    """The splits of the data, with rewards of what the model says in evaluations."""

    def __init__(self, runner: ModelRunner, data: PreparedData, speaker: Speaker) -> None:
        super().__init__(runner, data)
        self._speaker = speaker
        self._prompts = list(prompts_of(data, "validation"))

    def evaluate(self, beat: Beat) -> Scores:
        """Raises RunFailed where a reward scores nothing."""
        return self.scores(super().evaluate(beat), self._speaker.answer(self.evaluation()))

    def evaluation(self) -> Turn:
        return self._speaker.evaluation(self._prompts)

    def scores(self, measured: Scores | None, answered: Answered | None) -> Scores:
        assert measured is not None
        assert answered is not None
        figures = self._speaker.figures(answered)
        del figures[REWARD.name]  # nothing is trained on, so that nothing has a weight
        return replace(measured, figures=measured.figures | figures)


class Rolled(Material):
    """Completions of the model to the prompts of the training split."""

    def __init__(
        self,
        speaker: Speaker,
        data: PreparedData,
        config: Config,
        run_dir: Path,
    ) -> None:
        self._speaker, self._data, self._config = speaker, data, config
        self._train = prompts_of(data, "train")
        self._validation = list(prompts_of(data, "validation"))
        self._settings = config.train.rollout
        ways = OBJECTIVES[config.train.objective].credit
        assert ways is not None
        self._credit: Credit = ways()(config.train, speaker)
        self._rollout: Rollout | None = None
        self._silent, self._unscored = 0, 0
        self._file = run_dir / ROLLOUTS
        self._writes = speaker.runner.strategy.rank == 0 and self._settings.keep > 0

    def steps(self, stream: Stream) -> Generator[Work]:
        """A rollout begins with the first of its steps, since it needs the weights before it."""
        for step in stream.remaining:
            began = time.perf_counter()
            if (turn := self.turn(stream, step)) is not None:
                self.hear(stream, step, turn, self._speaker.answer(turn))
            work = self.work(stream, step)
            batches = self._speaker.runner.micro_batches(work.split, work.indices)
            yield replace(work, batches=batches, began=began)

    def turn(self, stream: Stream, step: int) -> Turn | None:
        if (step - 1) % self._settings.steps:
            return None
        first, _ = stream.place(step)
        count = self._settings.steps_per_generation * self._config.train.batch_size
        examples = stream.examples(first, count)
        prompts = [(first + number, self._train[int(i)]) for number, i in enumerate(examples)]
        return Turn(self._speaker, prompts, self._settings.num_generations)

    def hear(self, stream: Stream, step: int, turn: Turn, answered: Answered) -> None:
        """Make the rollout that begins with this step.

        Raises:
            RunFailed: see `_check_signal`.
        """
        speaker, prompts = self._speaker, [prompt for _, prompt in turn.prompts]
        first, _ = turn.prompts[0]
        weights, weights_P = self._data.train.columns.get(WEIGHT), None
        if weights is not None:
            examples = stream.examples(first, len(prompts))
            weights_P = weights[examples, 0].astype(np.float64)
        learnt = self._credit.assign(prompts, answered, weights_P)
        self._check_signal(step, answered)
        figures = answered.figures(speaker.rewards.names) | dict(learnt.figures)
        ties = sum(one.near_ties for one in answered.flat)
        figures |= {"near_ties": float(ties)} if ties else {}
        figures |= {} if answered.gap is None else {"logp_gap": answered.gap}
        missing = int(np.isnan(answered.totals_PG).sum())
        figures |= {"unscored": float(missing)} if missing else {}
        if self._writes:
            self._keep(step, prompts, answered, learnt.advantages_PG)
        each = len(learnt.split) // len(prompts)
        self._rollout = Rollout(step, first, each, learnt.split, figures)

    def work(self, stream: Stream, step: int) -> Work:
        rollout = self._rollout
        assert rollout is not None
        start, count = stream.place(step)
        chosen = np.arange(start - rollout.first, start - rollout.first + count)
        indices, examples = parts_of(chosen, rollout.each), stream.examples(start, count)
        return Work(examples, rollout.split, indices, (), time.perf_counter(), rollout.figures)

    def state(self, step: int) -> Mapping[str, Tensor]:
        """The rollout, where more steps are to be taken on it."""
        if self._rollout is None or step % self._settings.steps == 0:
            return {}
        return self._rollout.tensors

    def restore(self, checkpoint: Path, step: int) -> None:
        if self._writes:
            write_text_atomic(self._file, "".join(lines_up_to(self._file, step)))
        if step % self._settings.steps:
            self._rollout = Rollout.load(checkpoint / STATE / ROLLOUT)

    def evaluate(self, beat: Beat) -> Scores:
        """Completions of each validation prompt. `eval_loss` is minus the mean reward.

        Raises:
            RunFailed: a reward scored none of them.
        """
        return self.scores(None, self._speaker.answer(self.evaluation()))

    def evaluation(self) -> Turn:
        return self._speaker.evaluation(self._validation)

    def scores(self, measured: Scores | None, answered: Answered | None) -> Scores:
        assert answered is not None
        figures = self._speaker.figures(answered)
        figures = {LOSS.name: -figures[REWARD.name], **figures}
        if self._speaker.has_base:
            split = split_of_said(self._validation, answered.said)
            own_N = self._speaker.logps(split, self._settings.temperature)
            drift_N = own_N - self._speaker.base_logps(split, self._settings.temperature)
            figures["eval_kl"] = float(drift_N.sum() / len(split))
        return Scores(figures)

    def _check_signal(self, step: int, answered: Answered) -> None:
        """Raises RunFailed after `SILENT` rollouts in a row without a score, or at the beginning of
        a run without two different rewards; later on these may mean that all is learnt.
        """
        totals_PG = answered.totals_PG
        self._silent = 0 if self._credit.teaches(totals_PG) else self._silent + 1
        self._unscored = self._unscored + 1 if np.isnan(totals_PG).all() else 0
        if self._unscored >= SILENT:
            raise RunFailed(f"step {step}: no completion has a score: {self._speaker.missing()}")
        if self._silent < SILENT or step > SILENT * self._settings.steps:
            return
        raise RunFailed(
            f"step {step}: {self._credit.lacking} of {SILENT} rollouts in a row has two different "
            f"rewards (the last mean is {mean_of(totals_PG):g}); raise train.rollout.temperature "
            "or num_generations, or train on easier prompts first"
        )

    def _keep(
        self, step: int, prompts: Sequence[Prompt], answered: Answered, advantages_PG: Numbers
    ) -> None:
        """Write the first completions. Half a character becomes an escape that JSON reads."""
        places = np.ndindex(answered.totals_PG.shape)
        with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for p, g in islice(places, self._settings.keep):
                said, total = answered.said[p][g], answered.totals_PG[p, g]
                row = {
                    "step": step,
                    "prompt": prompts[p].written,
                    "completion": answered.texts[p][g],
                    "reward": None if np.isnan(total) else total,
                    "rewards": answered.scores[p][g],
                    "advantage": advantages_PG[p, g],
                    "tokens": len(said.ids),
                    "ended": said.ended,
                    "origin": prompts[p].origin,
                }
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def rewards_of(config: Config, data_dir: Path) -> list[RewardConfig]:
    """The rewards that a run asks, with their secrets. Judges keep their answers beside the token
    cache.
    """
    return with_answers(expanded(asked_rewards(config)), judges_beside(data_dir.parent))


def with_rewards(config: Config, data: PreparedData) -> PreparedData:
    """Start every reward once, before anything is spent. The data whose report has the hashes of
    the files of those that are trained on.

    Raises:
        ConfigError: one of them cannot be used, or needs a column that the rows lack.
    """
    if not data.report.prompt_files:
        return data
    with started(rewards_of(config, data.path)) as rewards:
        for name, columns in data.report.prompt_columns.items():
            check_columns(rewards, columns, f"data.{name}")
    files = {
        each.called: sha256_of(Path(found[0]))
        for each in asked_rewards(config)
        if each.weight and (found := function_of(each.name)) is not None
    }
    return replace(data, report=replace(data.report, reward_files=files))
