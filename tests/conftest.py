"""Fixtures that every kind of test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data sets and a real pretrained model, which are no part of the repository."""
    directory = Path(os.environ.get("RAYTUNE_FT_SHARED", ROOT.parent / "shared"))
    if not (directory / "data").is_dir():
        pytest.skip(f"no real data at {directory}; set RAYTUNE_FT_SHARED")
    return directory
