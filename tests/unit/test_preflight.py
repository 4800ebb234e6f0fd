"""What is wrong with a model or its data is found before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import PreparedData
from raytune_ft.errors import ConfigError, ModelError
from raytune_ft.preflight import prepare
from tests.support.models import save_character_tokenizer, save_tiny_encoder, save_tiny_llama
from tests.support.runs import make_config

CLASSIFICATION = {"train.objective": "classification", "data.train.format": "classification"}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(config: Config, tmp_path: Path) -> PreparedData:
    return prepare(config.model_copy(update={"storage": str(tmp_path / "runs")}), lambda line: None)


def texts(*lengths: int) -> list[dict[str, Any]]:
    """Rows of a classifier with so many tokens, two of which are special."""
    return [{"text": "a" * (length - 2), "label": i % 2} for i, length in enumerate(lengths)]


@pytest.mark.parametrize("searched", [False, True])
def test_a_row_longer_than_the_usable_positions(tmp_path: Path, searched: bool) -> None:
    base = save_tiny_encoder(tmp_path / "base")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(
        **sizes, intermediate_size=32, max_position_embeddings=66, pad_token_id=2
    )
    transformers.RobertaModel(config).save_pretrained(base)
    search = {"search": {"trials": 2, "space": {"train.lr": {"choice": [1e-3, 1e-4]}}}}
    for longest in (63, 64, 66):
        data = write(tmp_path / "rows.jsonl", texts(20, longest, 20, longest, 30, 30))
        changes = CLASSIFICATION | {"data.validation": 0.34} | (search if searched else {})
        written = make_config(base, data, changes)
        if longest <= 63:
            assert prepared(written, tmp_path).extent[1] == 63
            continue
        with pytest.raises(ConfigError, match=r"data\.max_length.*63 positions; write at most 63"):
            prepared(written, tmp_path)


def test_a_token_without_an_embedding(tmp_path: Path) -> None:
    """Only where a row uses it: many tokenizers have more tokens than the model."""
    base = save_tiny_llama(tmp_path / "base")
    save_character_tokenizer(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    rows = [{"prompt": "a", "completion": f"b{i}"} for i in range(20)]
    data = write(tmp_path / "rows.jsonl", rows)
    prepared(make_config(base, data), tmp_path)
    write(data, [*rows, {"prompt": "a", "completion": "c<new>"}])
    with pytest.raises(ModelError, match=r"96 tokens.*'<new>'.*token 96; use the tokenizer"):
        prepared(make_config(base, data), tmp_path)
