"""The tokenizers that rows are encoded with: the embedded one and a real pretrained one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raytune_ft.model.load import resolve_model_path


@pytest.fixture(scope="session")
def tiny_path() -> str:
    return resolve_model_path("builtin:tiny")


@pytest.fixture
def tiny(tiny_path: str) -> PreTrainedTokenizerBase:
    """Of the test's own, so that a test may change it."""
    return AutoTokenizer.from_pretrained(tiny_path)


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260k")
