"""What plans share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from raytune_ft.estimate import memory
from raytune_ft.estimate.activations import by_formula, head_by_formula


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations by the formula for models that cannot be traced, for tests of other things: the
    traces of all layouts take seconds.
    """

    def trace(shell: Any, rows: Collection[int], width: int, policy: Any, gathered: bool) -> Any:
        return by_formula(shell, {min(rows), max(rows)}, width, policy)

    def trace_head(shell: Any, labels: int, gathered: bool, kd: Any) -> int:
        return head_by_formula(shell, labels, kd)

    monkeypatch.setattr(memory, "trace", trace)
    monkeypatch.setattr(memory, "trace_head", trace_head)
