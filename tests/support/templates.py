"""Chat templates of vendors, and a base whose tokenizer has their marks."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import raytune_ft

TINY = Path(raytune_ft.__file__).parent / "model" / "tiny"
MARK = re.compile(r"<\|\w+\|>|<\w+_of_turn>")


def vendor_template(name: str) -> str:
    """As TRL's package has it; skips the test where that is not installed."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl, which has the templates, is not installed")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def save_base_with_marks(template: str, folder: Path, positions: int = 1024) -> Path:
    """The built-in model, with the marks of a template as tokens of their own."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    marks = sorted(set(MARK.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = positions
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
