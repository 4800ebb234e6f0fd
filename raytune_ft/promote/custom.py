"""Metrics of the user's own: one function of a file that the user's config names."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

from raytune_ft.config.metrics import function_of
from raytune_ft.errors import ConfigError

Score = Callable[[str, str, str], float]
"""prompt, reference, generated -> a number, more is better."""


def check_functions(metrics: Sequence[str]) -> None:
    """Whether each file has its function, without running any of it.

    Raises:
        ConfigError: the file cannot be read, is no Python, or has no such function.
    """
    for name in metrics:
        found = function_of(name)
        if found is None:
            continue
        path, function = Path(found[0]), found[1]
        value = f"promote.metrics={name}"
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no Python"
            raise ConfigError(
                value, f"names a file that cannot be read ({reason})", "write FILE.py:FUNCTION"
            ) from None
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if function not in names:
            raise ConfigError(
                value,
                f"names no function of {path.name}, which has {', '.join(names) or 'none'}",
                "write one of them, or def it there",
            )


def load_function(name: str) -> Score:
    """Run the file and take the function.

    Raises:
        ConfigError: see `check_functions`.
    """
    check_functions([name])
    found = function_of(name)
    assert found is not None
    score: Score = runpy.run_path(found[0])[found[1]]
    return score
