"""The rewards that `promote.metrics` names, started once for all models that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from raytune_ft.config.metrics import measured_rewards
from raytune_ft.config.rewards import with_answers
from raytune_ft.config.schema import Config
from raytune_ft.data.prepared import PreparedData
from raytune_ft.data.prompts import of_split
from raytune_ft.evaluate.answers import Answers, Asking, start_rewards
from raytune_ft.evaluate.duel import Duels
from raytune_ft.evaluate.scores import Scores
from raytune_ft.evaluate.workers import Workers
from raytune_ft.layout import judges_beside
from raytune_ft.records import Tell
from raytune_ft.rewards.pool import SharedRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scoring:
    """A context, in which rewards serve.

    Attributes:
        config: what is read of it is `rewards`, `sampling`, `promote` and `data`.
        rewards: score one completion, in the processes that measure models.
        duels: win rates against the base, computed in this process, which asks judges that compare.
    """

    config: Config
    rewards: SharedRewards
    duels: Duels

    @classmethod
    def of(cls, config: Config, tokens: Path) -> Scoring:
        """Judges keep their answers beside the token cache."""
        wanted = measured_rewards(config)
        found = with_answers(wanted, judges_beside(tokens))
        judges = SharedRewards([each for each in found if each.compares])
        rewards = SharedRewards([each for each in found if not each.compares])
        return cls(config, rewards, Duels(config.promote.metrics, judges))

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.rewards.close()
        self.duels.judges.close()

    def asking(
        self, data: PreparedData, split: str, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> Asking | None:
        """What models are asked on a split, `validation` or `test`, of what `prepare_data` made;
        None where no metric asks.

        Raises:
            DataError: the rows cannot be read.
        """
        if not self.rewards.configs and not self.duels.judges.configs:
            return None
        settings = self.config.sampling.model_copy(update={"n": self.config.promote.completions})
        prompts = of_split(self.config.data, data, split, tokenizer)
        return Asking(tuple(prompts), f"data.{split}", settings, seed, self.rewards)

    def start(self, asking: Asking | None, workers: Workers, tell: Tell) -> None:
        """Start the rewards where models will be measured, before anything is spent.

        Raises:
            InputError: one of them cannot be used, or needs a column that the rows lack.
        """
        if asking is not None:
            self.duels.judges.start()
            workers.alone(start_rewards, asking, tell=tell)

    def win_rates(
        self, base: Answers | None, model: Answers | None, tell: Tell
    ) -> dict[str, Scores]:
        """See `Duels.scores`; nothing where no metric asks."""
        return {} if base is None or model is None else self.duels.scores(base, model, tell)
