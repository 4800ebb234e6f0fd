"""Processes that these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.distributed import end_processes


@pytest.fixture(scope="package", autouse=True)
def processes() -> Iterator[None]:
    """They are gone before other tests look at what runs and listens here."""
    yield
    end_processes()
