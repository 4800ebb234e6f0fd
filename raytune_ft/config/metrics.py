"""What `promote.metrics` may name, and the figures that each of them gives. Loads no file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from raytune_ft.config import paths
from raytune_ft.config.explain import shown_value
from raytune_ft.config.merging import merges_with_head
from raytune_ft.config.reference import closest, one_of
from raytune_ft.config.schema import PromoteConfig
from raytune_ft.config.search import SearchConfig
from raytune_ft.errors import ConfigError

Mode = Literal["min", "max"]

FIGURES: dict[str, dict[str, Mode]] = {
    "loss": {
        "eval_loss": "min",
        "perplexity": "min",
        "token_accuracy": "max",
        "exact_match": "max",
    },
    "answer": {"answer_exact_match": "max"},
    "rouge": {"rouge1": "max", "rouge2": "max", "rougeL": "max"},
    "classification": {"accuracy": "max", "macro_f1": "max", "calibration_error": "min"},
}
OF_A_HEAD: dict[str, dict[str, Mode]] = {
    "single_label": {
        "eval_loss": "min",
        "accuracy": "max",
        "macro_f1": "max",
        "calibration_error": "min",
    },
    "multi_label": {"eval_loss": "min", "accuracy": "max", "macro_f1": "max"},
    "regression": {"eval_loss": "min", "mse": "min", "r2": "max", "pearson": "max"},
}
"""By `data.problem`: what a task head is measured by, whatever `promote.metrics` names."""
RETENTION: dict[str, Mode] = {"retention_loss": "min", "retention_kl": "min"}
HARNESS = "lm_eval:"
_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


def function_of(name: str) -> tuple[str, str] | None:
    """File and function of a metric of the user's own; None for any other."""
    found = _FUNCTION.fullmatch(name)
    return (found[1], found[2]) if found else None


def check(promote: PromoteConfig, problem: str | None = None) -> None:
    """Raises ConfigError for an unknown metric, a figure that none of them gives, a bad pattern;
    with the `problem` of a task head, for what such a head does not have.
    """
    for name in promote.metrics:
        if name in FIGURES or function_of(name) or name.removeprefix(HARNESS) not in ("", name):
            continue
        near = closest(name, list(FIGURES))
        raise ConfigError(
            f"promote.metrics={shown_value(name)}",
            f"is none of {', '.join(FIGURES)}, {HARNESS}TASK or FILE.py:FUNCTION",
            f"did you mean {near}?" if near else "write one of those",
        )
    if len(set(promote.metrics)) < len(promote.metrics):
        raise ConfigError(
            f"promote.metrics={shown_value(promote.metrics)}", "names one twice", "write it once"
        )
    _check_pattern(promote.answer)
    if problem is None:
        _check_figure(promote)
    else:
        _check_head(promote, problem)


def figures(metrics: Sequence[str]) -> dict[str, Mode]:
    """The figures of these metrics whose names are known beforehand, and which way is better."""
    known: dict[str, Mode] = dict(FIGURES["loss"])
    for name in metrics:
        found = function_of(name)
        known |= {found[1]: "max"} if found else FIGURES.get(name, {})
    return known


def deciding(promote: PromoteConfig, search: SearchConfig | None) -> str:
    """The figure that decides what is promoted."""
    if promote.metric is not None:
        return promote.metric
    searched = search.metrics[0] if search else "eval_loss"
    return searched if searched == "eval_loss" else searched.removeprefix("eval_")


def located(name: str, cwd: Path) -> str:
    """With the path of a file in it made absolute."""
    found = function_of(name)
    if found:
        return f"{paths.absolute(found[0], cwd, 'promote.metrics')}:{found[1]}"
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
            f"is no regular expression ({error})",
            r"write one such as '####\s*(\S+)'",
        ) from None
    if groups != 1:
        raise ConfigError(
            f"promote.answer={shown_value(pattern)}",
            f"has {groups} groups, and the answer is what one group finds",
            r"write one such as '####\s*(\S+)'",
        )


def _check_head(promote: PromoteConfig, problem: str) -> None:
    """What is asked of words that follow each other has no answer from a head."""
    head = "train.objective=classification"
    foreign = next((n for n in promote.metrics if n not in ("loss", "classification")), None)
    if foreign is not None:
        raise ConfigError(
            f"promote.metrics={shown_value(foreign)}",
            f"scores continuations, and {head} makes none",
            "leave it out: a head has figures of its own",
        )
    if promote.retention is not None:
        raise ConfigError(
            "promote.retention", f"asks for the next token, and {head} has none", "leave it out"
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
            f"makes factors of layers, and {head} trains a whole head beside them",
            "leave it out",
        )
    if promote.metric not in (None, *OF_A_HEAD[problem]):
        raise ConfigError(
            f"promote.metric={shown_value(promote.metric)}",
            f"is no figure of data.problem={problem}",
            f"write one of {', '.join(OF_A_HEAD[problem])}",
        )


def _check_figure(promote: PromoteConfig) -> None:
    known = figures(promote.metrics)
    harness = any(name.startswith(HARNESS) for name in promote.metrics)
    if promote.metric is None or promote.metric in known:
        return
    if harness and "/" in promote.metric:  # such as arc_easy/acc
        return
    owner = next((name for name, given in FIGURES.items() if promote.metric in given), None)
    near = closest(promote.metric, list(known))
    raise ConfigError(
        f"promote.metric={shown_value(promote.metric)}",
        f"is no figure of promote.metrics={shown_value(promote.metrics)}",
        f"add {owner} to promote.metrics"
        if owner
        else f"did you mean {near}?"
        if near
        else f"write one of {', '.join(known)}",
    )
