"""The `rewards` section: what scores a completion. Reads no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from raytune_ft.config import environment, paths
from raytune_ft.config.section import Positive, Section, SectionOf
from raytune_ft.errors import ConfigError

_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
_ENV_NAME = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")


class RewardConfig(Section):
    """What every reward has."""

    name: str
    label: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="its name in results; null is that of the reward",
    )
    weight: float = Field(1.0, description="its factor in the sum of all rewards")
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        10.0,
        description="a call that takes longer is ended and gives no score: of one completion, or, "
        "for a function that takes lists, of all completions of a prompt",
    )

    @property
    def called(self) -> str:
        """Its name in results."""
        return self.label or self.name.rpartition(":")[2]

    @property
    def compares(self) -> bool:
        """Whether it says which of two completions is better, and nothing of one alone."""
        return False

    def check(self) -> None:
        """Raises ConfigError where keys contradict each other."""


class FunctionReward(RewardConfig):
    """A function of the user's own."""


class ExactMatch(RewardConfig):
    name: Literal["exact_match"]
    column: str | None = Field(
        None, description="column of the right answer; null is the completion of the row"
    )


class Regex(RewardConfig):
    name: Literal["regex"]
    pattern: str = Field(description="1 where this regular expression is found, else 0")

    def check(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"rewards.{self.called}.pattern={self.pattern}",
                f"is not a regular expression ({error})",
                "correct it",
            ) from None


class Format(RewardConfig):
    name: Literal["format"]
    tags: Annotated[list[str], Field(min_length=1)] = Field(
        ["think", "answer"],
        description="1 where a completion is one element <TAG>...</TAG> of each, in this order, "
        "and nothing else but blanks",
    )


class Length(RewardConfig):
    name: Literal["length"]
    target: Positive | None = Field(
        None, description="tokens of the best length; 1 there, 0 at none and at twice as many"
    )
    limit: Positive | None = Field(
        None, description="instead of target: -1 above this many tokens (arXiv 2503.14476)"
    )
    buffer: Positive = Field(
        64, description="with limit: over these last tokens the score falls from 0 to -1"
    )

    def check(self) -> None:
        if (self.target is None) == (self.limit is None):
            raise ConfigError(
                f"rewards.{self.called}",
                "needs one of target and limit",
                "write for example target: 80, or limit: 256",
            )
        if self.limit is not None and self.buffer > self.limit:
            raise ConfigError(
                f"rewards.{self.called}.buffer={self.buffer}",
                f"is more than limit={self.limit}",
                "write fewer tokens",
            )


class Repetition(RewardConfig):
    name: Literal["repetition"]
    ngram: Positive = Field(
        3, description="words of a phrase; the score is minus the share of phrases said before"
    )


class Gsm8k(RewardConfig):
    name: Literal["gsm8k"]
    column: str | None = Field(
        None, description="column of the solution, which ends with `#### NUMBER`; as exact_match"
    )


class Math(RewardConfig):
    name: Literal["math"]
    column: str | None = Field(None, description="column of the solution; as exact_match")


class Code(RewardConfig):
    name: Literal["code"]
    tests: str = Field(
        "tests",
        description="column of the tests, a Python text or a list of them; the score is the share "
        "that ends without an error after the code of the completion. No sandbox: the code may do "
        "what this user may",
    )
    memory_mb: Positive = Field(512, description="address space of a test, in 10^6 bytes")


class RewardModel(RewardConfig):
    name: Literal["model"]
    path: str = Field(
        min_length=1,
        description="directory or hub id of a sequence classifier with one output, such as "
        "train.objective: reward makes",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="how its weights are held; auto is as they are on disk"
    )
    separator: str = Field(
        "\n", description="between prompt and answer, as data.separator in its training"
    )
    max_length: Positive | None = Field(
        None,
        description="an answer with its prompt of more tokens has no score; null is what the model "
        "can read",
    )
    batch_tokens: Positive = Field(8192, description="of one batch, padding included")
    timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="of one batch")


class Judge(RewardConfig):
    name: Literal["judge"]
    url: str = Field(
        min_length=1,
        description="an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1",
    )
    model: str = Field(min_length=1, description="the judge's model at that endpoint")
    api_key: str | None = Field(None, description="${ENV_NAME} of the key")
    mode: Literal["grade", "pairs"] = Field(
        "grade",
        description="grade: a number from 0 to 1 for each completion. pairs: each two completions "
        "of a prompt in both orders, a disagreement is a tie; the score is the share of the others "
        "that a completion beats",
    )
    criterion: str = Field(
        "helpful, correct and clear", min_length=1, description="what a good answer is"
    )
    max_tokens: Positive = Field(64, description="longest reply of the judge")
    retries: Annotated[int, Field(ge=0)] = Field(
        4, description="of a question that got no answer, after pauses that double"
    )
    at_once: Positive = Field(8, description="questions that are asked at the same time")
    answers: str | None = Field(
        None, description="folder that keeps every answer; null is .cache/judges in storage"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(60.0, description="of one question")

    @property
    def compares(self) -> bool:
        return self.mode == "pairs"

    def check(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") and not self.url.startswith("${"):
            raise ConfigError(
                f"rewards.{self.called}.url={self.url}", "is no address", "write http://HOST/v1"
            )
        if self.api_key is not None and not _ENV_NAME.fullmatch(self.api_key):
            raise ConfigError(
                f"rewards.{self.called}.api_key",
                "is a secret, and the config is saved in the clear",
                "write ${ENV_NAME} and export ENV_NAME",
            )


@dataclass(frozen=True)
class Reward:
    """One entry of `REWARDS`.

    Attributes:
        config: the class of its keys.
        implementation: loads `make`, a function of the config that gives a `rewards.base.Scorer`.
        check: loads a function of the config that raises InputError for files that cannot be used.
    """

    config: type[RewardConfig]
    implementation: Callable[[], Any]
    check: Callable[[], Any] | None = None


def _builtin(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from raytune_ft.rewards import builtin

        return getattr(builtin, name)

    return load


def _code() -> Any:
    from raytune_ft.rewards.code import run_tests

    return run_tests


def _model() -> Any:
    from raytune_ft.rewards.model import of_model

    return of_model


def _check_model() -> Any:
    from raytune_ft.rewards.model import check_model

    return check_model


def _judge() -> Any:
    from raytune_ft.rewards.judge import judged

    return judged


def _function() -> Any:
    from raytune_ft.rewards.functions import own_function

    return own_function


def _check_function() -> Any:
    from raytune_ft.rewards.functions import check_function

    return lambda reward: check_function(reward.name, "rewards")


REWARDS: dict[str, Reward] = {
    "exact_match": Reward(ExactMatch, _builtin("exact_match")),
    "regex": Reward(Regex, _builtin("regex")),
    "format": Reward(Format, _builtin("tagged")),
    "length": Reward(Length, _builtin("length")),
    "repetition": Reward(Repetition, _builtin("repetition")),
    "gsm8k": Reward(Gsm8k, _builtin("gsm8k")),
    "math": Reward(Math, _builtin("math")),
    "code": Reward(Code, _code),
    "model": Reward(RewardModel, _model, _check_model),
    "judge": Reward(Judge, _judge),
}
OWN = Reward(FunctionReward, _function, _check_function)
"""Stands for every FILE.py:FUNCTION."""


@dataclass(frozen=True, eq=False)
class RewardOf(SectionOf):
    """A section whose `name` is in `REWARDS` or FILE.py:FUNCTION, or that name alone."""

    @property
    def sections(self) -> list[type[Section]]:
        return [*super().sections, FunctionReward]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validated)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = [section.__pydantic_core_schema__ for section in self.sections]
        return handler(core_schema.union_schema([core_schema.str_schema(), *choices]))

    def _validated(self, value: Any) -> Section:
        if type(value) in self.sections:
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("section_type", "not a section")
        entry = reward_of(str(value.get("name")))
        section: Section = entry.config.model_validate(value)
        return section


def weighed(written: Sequence[RewardConfig], watched: Sequence[str]) -> list[RewardConfig]:
    """The rewards, of which those that are only watched weigh nothing."""
    return [
        each.model_copy(update={"weight": 0.0}) if each.called in watched else each
        for each in written
    ]


def function_of(name: str) -> tuple[str, str] | None:
    """File and function of FILE.py:FUNCTION; None for any other name."""
    found = _FUNCTION.fullmatch(name)
    return (found[1], found[2]) if found else None


def reward_of(name: str) -> Reward:
    """The entry behind a reward's name."""
    return REWARDS.get(name, OWN)


def check(rewards: Sequence[RewardConfig]) -> None:
    """Raises ConfigError for a name that stands for no reward, one written twice, or bad keys."""
    from raytune_ft.config.reference import closest

    seen: dict[str, str] = {}
    for reward in rewards:
        if reward.name not in REWARDS and function_of(reward.name) is None:
            near = closest(reward.name, REWARDS)
            raise ConfigError(
                f"rewards={reward.name}",
                f"is none of {', '.join(REWARDS)} or FILE.py:FUNCTION",
                f"did you mean {near}?" if near else "write one of those",
            )
        if reward.called in seen:
            raise ConfigError(
                f"rewards={reward.name}",
                f"is called {reward.called} in results, as {seen[reward.called]} is",
                f"write {{name: {reward.name}, label: ...}}",
            )
        seen[reward.called] = reward.name
        reward.check()


def located(name: str, cwd: Path, key: str = "rewards") -> str:
    """The name of a reward, with the path of a file in it made absolute."""
    found = function_of(name)
    return f"{paths.absolute(found[0], cwd, key)}:{found[1]}" if found else name


def expanded(rewards: Sequence[RewardConfig]) -> list[RewardConfig]:
    """The rewards with every `${ENV_NAME}` replaced; raises ConfigError where one is not set."""
    found = []
    for reward in rewards:
        keys = environment.expand(reward.model_dump(), f"rewards.{reward.called}")
        found.append(type(reward).model_validate(keys))
    return found


def with_answers(rewards: Sequence[RewardConfig], folder: Path) -> list[RewardConfig]:
    """The rewards, with a folder for the answers of judges that have none."""
    return [
        reward.model_copy(update={"answers": str(folder)})
        if isinstance(reward, Judge) and reward.answers is None
        else reward
        for reward in rewards
    ]
