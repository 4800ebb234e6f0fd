"""What `promote.metrics` may name, and the figures that each entry gives. Reads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config import paths, rewards
from raytune_ft.config.data import FORMATS, source_configs
from raytune_ft.config.explain import shown_value
from raytune_ft.config.merging import merges_with_head
from raytune_ft.config.objectives import (
    ACCURACY,
    CALIBRATION_ERROR,
    MACRO_F1,
    OBJECTIVES,
    SCORED_FIGURES,
    SEARCHABLE,
    Figure,
    Mode,
    figures,
)
from raytune_ft.config.reference import closest, one_of
from raytune_ft.config.rewards import RewardConfig, function_of
from raytune_ft.config.schema import Config, PromoteConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import ConfigError


@dataclass(frozen=True)
class MetricFacts:
    """One entry of `promote.metrics`.

    Attributes:
        implementation: imports and returns the function of `evaluate.metrics` from a `Subject` to
            the scores of each figure.
        figures: those that it gives.
    """

    implementation: Callable[[], Callable[[Any], Any]]
    figures: tuple[Figure, ...]


def _own() -> Callable[[Any], Any]:
    from raytune_ft.evaluate.metrics import own

    return own


def _answer() -> Callable[[Any], Any]:
    from raytune_ft.evaluate.metrics import answer

    return answer


def _rouge() -> Callable[[Any], Any]:
    from raytune_ft.evaluate.metrics import rouge

    return rouge


def _classification() -> Callable[[Any], Any]:
    from raytune_ft.evaluate.metrics import classification

    return classification


def _reward() -> Callable[[Any], Any]:
    from raytune_ft.evaluate.metrics import reward_scores

    return reward_scores


REWARD, WIN_RATE, CONTROLLED = "reward", "win_rate", "win_rate_lc"
DISAGREED = "disagreed"
OF_A_REWARD = (REWARD, WIN_RATE, CONTROLLED)
"""Entries of `promote.metrics` before a colon and what a reward is called, and their figures."""
OWN = "loss"
"""The metric whose figures are those of the objective."""
METRICS: dict[str, MetricFacts] = {
    OWN: MetricFacts(_own, ()),
    "answer": MetricFacts(
        _answer, (Figure("answer_exact_match", "max", label="exact match of the answer"),)
    ),
    "rouge": MetricFacts(
        _rouge,
        (
            Figure("rouge1", "max", label="ROUGE-1"),
            Figure("rouge2", "max", label="ROUGE-2"),
            Figure("rougeL", "max", label="ROUGE-L"),
        ),
    ),
    "classification": MetricFacts(_classification, (ACCURACY, MACRO_F1, CALIBRATION_ERROR)),
    REWARD: MetricFacts(_reward, (*SCORED_FIGURES, Figure("unscored", "min"))),
}
"""Metrics by their names in `promote.metrics`."""
RETENTION: dict[str, Figure] = {
    each.name: each
    for each in (
        Figure("retention_loss", "min", label="loss on the general set"),
        Figure("retention_kl", "min", label="KL from the base on the general set"),
    )
}
"""The figures that `promote.retention` gives, over a set of its own."""
HARNESS = "lm_eval:"


def known_figures() -> dict[str, Figure]:
    """Every declared figure, by its name in promotion and by its name in training."""
    own = [figure for entry in OBJECTIVES.values() for figure in entry.figures]
    other = [figure for metric in METRICS.values() for figure in metric.figures]
    return RETENTION | {name: each for each in other + own for name in (each.promoted, each.name)}


def label(name: str) -> str:
    """A figure in words, for tables. Any other name, such as `arc_easy/acc`, stays as it is."""
    figure = known_figures().get(name)
    if figure is None:
        return name
    return figure.label or figure.promoted.replace("_", " ")


def direction(name: str) -> Mode | None:
    """Which way a figure is better; None where that is not declared, as for `arc_easy/acc`."""
    if of_reward(name) is not None:
        return "max"
    figure = known_figures().get(name)
    return None if figure is None or figure.neutral else figure.mode


def of_reward(name: str) -> tuple[str, str] | None:
    """Kind and reward of `reward:NAME`, `win_rate:NAME` and `win_rate_lc:NAME`; None for others."""
    kind, colon, called = name.partition(":")
    return (kind, called) if colon and kind in OF_A_REWARD else None


def compares(figure: str | None) -> bool:
    """Whether a figure is of two models, the one that is measured and the base."""
    kind, _ = of_reward(figure or "") or ("", "")
    return kind in (WIN_RATE, CONTROLLED)


def measured_rewards(config: Config) -> list[RewardConfig]:
    """The rewards that `promote.metrics` names; `reward` is all that score one completion, and so
    are the figures of an objective that learns from what the model says.
    """
    promote, written = config.promote, rewards.weighed(config.rewards, config.train.watch)
    named = [found for name in promote.metrics if (found := of_reward(name)) is not None]
    called = {one for _, one in named}
    every = REWARD in promote.metrics or OBJECTIVES[config.train.objective].rollouts > 0
    return [one for one in written if one.called in called or (every and not one.compares)]


def check(config: Config) -> None:
    """Raises ConfigError for an unknown metric, a figure that none of them gives, a bad pattern,
    and under an objective with a task head for what such a head does not have.
    """
    promote, objective, problem = config.promote, config.train.objective, config.data.problem
    for name in promote.metrics:
        known = name in METRICS or function_of(name) or of_reward(name)
        if known or name.removeprefix(HARNESS) not in ("", name):
            continue
        near = closest(name, METRICS)
        kinds = ":NAME, ".join(OF_A_REWARD)
        raise ConfigError(
            f"promote.metrics={shown_value(name)}",
            f"is none of {', '.join(METRICS)}, {kinds}:NAME, {HARNESS}TASK or FILE.py:FUNCTION",
            f"did you mean {near}?" if near else "write one of those",
        )
    if len(set(promote.metrics)) < len(promote.metrics):
        raise ConfigError(
            f"promote.metrics={shown_value(promote.metrics)}", "names one twice", "write it once"
        )
    _check_pattern(promote.answer)
    if OBJECTIVES[objective].head:
        _check_head(promote, objective, problem)
    else:
        _check_rewards(config)
        _check_figure(config)


def _check_rewards(config: Config) -> None:
    """Of metrics that let the model answer prompts and rewards score what it says."""
    promote, rewards = config.promote, {one.called: one for one in config.rewards}
    asking = [name for name in promote.metrics if name == REWARD or of_reward(name)]
    for name in asking:
        key = f"promote.metrics={shown_value(name)}"
        if not rewards:
            raise ConfigError(key, "needs a reward", "write for example rewards: [exact_match]")
        kind, called = of_reward(name) or (REWARD, None)
        if called is not None and called not in rewards:
            near = closest(called, rewards)
            raise ConfigError(
                key,
                "names no reward",
                f"did you mean {near}?" if near else f"write one of {', '.join(rewards)}",
            )
        of = [rewards[called]] if called is not None else list(rewards.values())
        if kind == REWARD and all(one.compares for one in of):
            raise ConfigError(
                key,
                "is the reward of a judge that compares completions and grades none by itself",
                f"write {WIN_RATE}:{of[0].called}, or mode: grade",
            )
    if not asking:
        return
    for split, source in source_configs(config.data).items():
        if FORMATS[source.format].documents:
            raise ConfigError(
                f"promote.metrics={shown_value(asking[0])}",
                f"lets the model answer prompts, and data.{split}.format={source.format} has none",
                "leave it out",
            )
    if promote.completions > 1 and config.sampling.temperature == 0:
        raise ConfigError(
            f"promote.completions={promote.completions}",
            "are the same completion under sampling.temperature=0",
            "write 1, or a temperature above 0",
        )
    if compares(promote.metric) and promote.merge == "greedy_soup":
        raise ConfigError(
            f"promote.metric={shown_value(promote.metric)}",
            "compares two models, and promote.merge=greedy_soup chooses members by a figure of one",
            f"write {REWARD}, or another promote.merge",
        )


def deciding(promote: PromoteConfig, search: SearchConfig | None) -> str:
    """The figure that decides what is promoted."""
    if promote.metric is not None:
        return promote.metric
    return SEARCHABLE[search.metrics[0] if search else "eval_loss"].promoted


def located(name: str, cwd: Path) -> str:
    """A metric's name, with the path of a file in it made absolute."""
    if function_of(name):
        return rewards.located(name, cwd, "promote.metrics")
    task = name.removeprefix(HARNESS)
    if task != name and task.endswith((".yaml", ".yml")):
        return HARNESS + paths.absolute(os.path.expanduser(task), cwd, "promote.metrics")
    return name


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(
            f"promote.answer={shown_value(pattern)}",
            f"is not a regular expression ({error})",
            r"write one such as '####\s*(\S+)'",
        ) from None
    if groups != 1:
        raise ConfigError(
            f"promote.answer={shown_value(pattern)}",
            f"has {groups} groups, and the answer is what one group matches",
            r"write one such as '####\s*(\S+)'",
        )


def _check_head(promote: PromoteConfig, objective: str, problem: str) -> None:
    """A head labels whole examples and predicts no tokens."""
    head = f"train.objective={objective}"
    able = (OWN,) if OBJECTIVES[objective].pairs else (OWN, "classification")
    foreign = next((n for n in promote.metrics if n not in able), None)
    if foreign is not None:
        raise ConfigError(
            f"promote.metrics={shown_value(foreign)}",
            f"scores continuations, and {head} makes none",
            "leave it out: a head has figures of its own",
        )
    if promote.retention is not None:
        raise ConfigError(
            "promote.retention",
            f"measures token predictions, and {head} makes none",
            "leave it out",
        )
    if promote.merge not in merges_with_head():
        raise ConfigError(
            f"promote.merge={promote.merge}",
            f"starts from the base, which has no head under {head}",
            f"write {one_of(merges_with_head())}",
        )
    if promote.merging.adapter_rank is not None:
        raise ConfigError(
            f"promote.merging.adapter_rank={promote.merging.adapter_rank}",
            f"factors layers of the base, and {head} trains a whole head beside them",
            "leave it out",
        )
    names = [figure.promoted for figure in figures(objective, problem)]
    where = head if OBJECTIVES[objective].pairs else f"data.problem={problem}"
    if promote.metric not in (None, *names):
        raise ConfigError(
            f"promote.metric={shown_value(promote.metric)}",
            f"is not a figure of {where}",
            f"write one of {', '.join(names)}",
        )


def _check_figure(config: Config) -> None:
    promote = config.promote
    known = _names(config)
    harness = any(name.startswith(HARNESS) for name in promote.metrics)
    if promote.metric is None or promote.metric in known:
        return
    if harness and "/" in promote.metric:  # such as arc_easy/acc
        return
    own = {name: [each.promoted for each in metric.figures] for name, metric in METRICS.items()}
    owner = next((name for name, given in own.items() if promote.metric in given), None)
    owner = promote.metric if of_reward(promote.metric) else owner
    near = closest(promote.metric, known)
    raise ConfigError(
        f"promote.metric={shown_value(promote.metric)}",
        f"is not a figure of promote.metrics={shown_value(promote.metrics)}",
        f"add {owner} to promote.metrics"
        if owner
        else f"did you mean {near}?"
        if near
        else f"write one of {', '.join(known)}",
    )


def _names(config: Config) -> list[str]:
    """The figures of these metrics whose names are known before they are computed."""
    own = figures(config.train.objective, config.data.problem)
    known = [each.promoted for each in own if each.measured]
    for name in config.promote.metrics:
        if of_reward(name):
            known.append(name)
        elif found := function_of(name):
            known.append(found[1])
        elif name in METRICS:
            known += [each.promoted for each in METRICS[name].figures]
        if name == REWARD or OBJECTIVES[config.train.objective].rollouts:
            known += [f"{REWARD}:{one.called}" for one in config.rewards if not one.compares]
    return known
