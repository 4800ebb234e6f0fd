"""Functions of the user's own: FILE.py:FUNCTION, in `promote.metrics` and in `rewards`."""

from __future__ import annotations

import ast
import asyncio
import inspect
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytune_ft.config.rewards import RewardConfig, function_of
from raytune_ft.errors import ConfigError
from raytune_ft.rewards.base import Broken, Group, Refused, Score, Scorer, Yielded, each

LISTS = ("prompts", "completions", "completion_ids")
"""Parameters by which a function of TRL's form is known."""
TRAINER = {
    "trainer_state": None,
    "log_extra": lambda *arguments: None,
    "log_metric": lambda *arguments: None,
}
"""What TRL's trainer passes beside columns; there is no trainer here."""


def check_function(name: str, key: str) -> None:
    """Check that the file of a FILE.py:FUNCTION defines it, without running the file.

    Raises:
        ConfigError: the file cannot be read, is not Python, or has no such function.
    """
    found = function_of(name)
    assert found is not None
    path, function, value = Path(found[0]), found[1], f"{key}={name}"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not Python"
        raise ConfigError(
            value, f"names a file that cannot be read ({reason})", "write FILE.py:FUNCTION"
        ) from None
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    if function not in names:
        raise ConfigError(
            value,
            f"names no function of {path.name}, which has {', '.join(names) or 'none'}",
            "write one of them, or def it there",
        )


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Run the file and return the function.

    Raises:
        ConfigError: the file has no such function.
    """
    check_function(name, key)
    found = function_of(name)
    assert found is not None
    function: Callable[..., Any] = runpy.run_path(found[0])[found[1]]
    return function


def own_function(config: RewardConfig) -> Scorer:
    """A function of (prompt, reference, generated), as in `promote.metrics`, for one completion; or
    of (prompts, completions, completion_ids, **columns), as in TRL, for lists of one length.
    """
    function = load_function(config.name, "rewards")
    parameters = inspect.signature(function).parameters
    if not any(name in parameters for name in LISTS):
        positional = [
            one
            for one in parameters.values()
            if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        needed = sum(one.default is one.empty for one in positional)
        if not needed <= 3 <= len(positional):
            raise Refused(
                f"takes ({', '.join(parameters)}), and a reward takes (prompt, reference, "
                "generated) or (prompts, completions, **columns)",
                "change its parameters",
            )
        return each(
            lambda group, i: function(group.prompt, group.reference, group.completions[i].strip())
        )
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    wanted = tuple(
        name
        for name, one in parameters.items()
        if name not in (*LISTS, *TRAINER)
        and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.default is one.empty
    )

    def call(group: Group) -> list[Any]:
        count = len(group.completions)
        given: dict[str, Any] = {name: [value] * count for name, value in group.columns.items()}
        given |= TRAINER
        given |= {
            "prompts": [group.turns or group.prompt] * count,
            "completions": _as_trl(group),
            "completion_ids": [list(ids) for ids in group.completion_ids],
        }
        chosen = given if takes_all else {key: given[key] for key in parameters if key in given}
        result = function(**chosen)
        return list(asyncio.run(result) if inspect.iscoroutine(result) else result)

    def rate(group: Group) -> Iterator[Yielded]:
        try:
            values = call(group)
        except Exception as error:  # noqa: BLE001 - it is code of the user
            values = [Score(None, f"{type(error).__name__}: {error}")] * len(group.completions)
        if len(values) != len(group.completions):
            raise Broken(f"gave {len(values)} scores for {len(group.completions)} completions")
        yield from values

    return Scorer(rate, wanted, together=True)


def _as_trl(group: Group) -> list[Any]:
    """Texts; for conversations, lists of one turn."""
    if group.turns is None:
        return list(group.completions)
    return [[{"role": "assistant", "content": text}] for text in group.completions]
