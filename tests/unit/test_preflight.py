"""What is wrong with a model or its data is found before anything is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from raytune_ft.config.schema import Config, ModelConfig
from raytune_ft.data.prepared import PreparedData
from raytune_ft.errors import ConfigError, DataError, ModelError
from raytune_ft.model.load import load_tokenizer
from raytune_ft.preflight import check_engines, needs_ray, prepare
from tests.support.models import save_character_tokenizer, save_tiny_encoder, save_tiny_llama
from tests.support.runs import make_config, write_rows

CLASSIFICATION = {"train.objective": "classification", "data.train.format": "classification"}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(config: Config, tmp_path: Path) -> PreparedData:
    return prepare(config.model_copy(update={"storage": str(tmp_path / "runs")}), lambda line: None)


def texts(*lengths: int) -> list[dict[str, Any]]:
    """Rows of a classifier of that many tokens each, of which two are special."""
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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
NEW_MODEL = '{"version":"1.0","model":{"type":"New"}}'


def _with_normalizer(text: str) -> str:
    return json.dumps(json.loads(text) | {"normalizer": {"type": "Novel"}})


BROKEN: dict[str, tuple[str, Callable[[str], str], str]] = {
    "weights not fetched": ("model.safetensors", lambda _: POINTER, "git lfs pull"),
    "tokenizer not fetched": ("tokenizer.json", lambda _: POINTER, "git lfs pull"),
    "config not fetched": ("config.json", lambda _: POINTER, "git lfs pull"),
    "sentencepiece not fetched": ("tokenizer.model", lambda _: POINTER, "git lfs pull"),
    "another model": ("tokenizer.json", lambda _: NEW_MODEL, "update tokenizers"),
    "another normalizer": ("tokenizer.json", _with_normalizer, "update tokenizers"),
    "half a tokenizer": ("tokenizer.json", lambda text: text[:500], "is not JSON"),
    "half a config": ("config.json", lambda text: text[:50], "is not JSON"),
    "a list": ("generation_config.json", lambda _: "[1]", "is not a JSON object"),
    "half an index": ("model.safetensors.index.json", lambda _: "{", "is not JSON"),
    "half the weights": ("model.safetensors", lambda text: text[:2000], "is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, case: str) -> None:
    name, change, words = BROKEN[case]
    base = save_tiny_llama(tmp_path / "base")
    file = base / name
    before = file.read_bytes().decode("latin-1") if file.is_file() else ""
    file.write_bytes(change(before).encode("latin-1"))
    config = make_config(base, write_rows(tmp_path / "rows.jsonl", 20))
    with pytest.raises(ModelError) as caught:
        prepared(config, tmp_path)
    line = str(caught.value)
    assert str(file) in line
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize("names", [["tool_use"], ["rag", "tool_use"]])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
def test_named_chat_templates_without_a_default(
    tmp_path: Path, names: list[str], place: str
) -> None:
    """A tokenizer with them is loaded, used for rows without a template, and saved."""
    base, template = save_tiny_llama(tmp_path / "base"), "{{ messages[0].content }}"
    if place == "tokenizer_config.json":
        settings = json.loads((base / place).read_text())
        settings["chat_template"] = [{"name": name, "template": template} for name in names]
        (base / place).write_text(json.dumps(settings))
    else:
        (base / place).mkdir()
        for name in names:
            (base / place / f"{name}.jinja").write_text(template)
    config = make_config(base, write_rows(tmp_path / "rows.jsonl", 20))
    prepared(config, tmp_path)
    load_tokenizer(config.model).save_pretrained(tmp_path / "saved")
    again = load_tokenizer(ModelConfig(path=str(_beside(base, tmp_path / "saved"))))
    assert again.chat_template == dict.fromkeys(names, template)


def _beside(base: Path, saved: Path) -> Path:
    """The saved tokenizer with the model's configuration."""
    (saved / "config.json").write_bytes((base / "config.json").read_bytes())
    return saved


LABELS: dict[str, tuple[list[Any], list[str] | str]] = {
    "one number": ([1, 1.0, 0, 0.0], ["0", "1"]),
    "numbers": ([1.5, 2.0, 1.5, 2], ["1.5", "2"]),
    "booleans": ([True, False, True, False], ["False", "True"]),
    "booleans and numbers": ([1, True, 0, 2], "labels 1 and True, which may be the same label"),
    "texts of one number": (
        ["1", "1.0", "0", "0"],
        "labels 1 and 1.0, which may be the same label",
    ),
    "leading zeros": (["01", "1", "01", "1"], ["01", "1"]),
    "texts of one truth": (["true", "TRUE", "no", "no"], "labels TRUE and true"),
    "no number": ([1, float("nan"), 0, 1], "bad_label 5"),
    "no number in a list": ([[1], [float("inf")], [0], [1]], "bad_label 5"),
}


@pytest.mark.parametrize("case", LABELS)
def test_equal_labels_are_one_class(tmp_path: Path, case: str) -> None:
    labels, found = LABELS[case]
    base = save_tiny_encoder(tmp_path / "base")
    rows = [{"text": f"text {i}", "label": labels[i % 4]} for i in range(20)]
    config = make_config(base, write(tmp_path / "rows.jsonl", rows), CLASSIFICATION)
    if isinstance(found, list):
        assert list(prepared(config, tmp_path).report.labels) == found
    else:
        with pytest.raises(DataError, match=found):
            prepared(config, tmp_path)


@pytest.mark.parametrize(
    ("gpus", "installed", "worker", "says"),
    [
        (0, False, 0, "needs a GPU and the package vllm, which are not here; write train."),
        (1, False, 0, "needs a GPU and the package vllm, which is not here"),
        (
            1,
            True,
            1,
            "needs 2 GPUs, 1 of them for engines, and the package vllm, and there is one",
        ),
        (1, True, 0, None),
        (2, True, 1, None),
    ],
)
def test_engines_need_gpus_and_vllm(
    gpus: int, installed: bool, worker: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytune_ft.preflight._gpus", lambda config, joined: gpus)
    monkeypatch.setattr("raytune_ft.preflight.find_spec", lambda name: installed or None)
    changes = {
        "train.rollout": {"engine": "vllm"},
        "parallel.resources_per_worker": {"CPU": 1, "GPU": worker},
    }
    config = make_config(Path("model"), Path("rows.jsonl"), changes)
    assert needs_ray(config)
    if says is None:
        check_engines(config)
        return
    with pytest.raises(ConfigError) as raised:
        check_engines(config)
    assert says in str(raised.value)
