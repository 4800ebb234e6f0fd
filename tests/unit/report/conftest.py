"""One directory for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.reports import make_sweep_dir


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    """A sweep with a promotion, see `make_sweep_dir`."""
    return make_sweep_dir(tmp_path / "letters")
