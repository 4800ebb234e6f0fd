"""From a file of conversations to a promoted model that answers as it was taught."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import raytune_ft
from raytune_ft.cli import run_command

TEMPLATES = ["qwen3", "llama3_1", "phi3", "gemma", "gptoss"]
TINY = Path(raytune_ft.__file__).parent / "model" / "tiny"
MARK = re.compile(r"<\|\w+\|>|<\w+_of_turn>")
ANSWERS = {"sky": "Blue as ever.", "grass": "Green, é 日本!", "sun": "  It is\nyellow."}
CONFIG = """\
name: talk
model: {path: base}
method: {name: full}
data:
  train: {path: chats.jsonl, format: auto, chat_template: template.jinja}
  validation: {path: again.jsonl, format: auto}  # enough rows to tell that the model is better
  max_length: 1024
train: {max_examples: 900, batch_size: 6, lr: 3.0e-3, weight_decay: 0.0, precision: float32}
promote: {max_overlap: 1}
"""


def _base_for(template: str, folder: Path) -> None:
    """The built-in model with the marks of a template as tokens of their own."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    marks = sorted(set(MARK.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_promoted_model_says_what_it_was_taught_and_ends(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl, which has the templates, is not installed")
    source = Path(spec.origin).parent / "chat_templates" / f"{name}.jinja"
    monkeypatch.chdir(tmp_path)
    template = source.read_text(encoding="utf-8")
    (tmp_path / "template.jinja").write_text(template)
    _base_for(template, tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS.items()
    ]
    both = [turn for row in rows[:2] for turn in row["messages"]]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"messages": both}])
    (tmp_path / "chats.jsonl").write_text(lines)
    (tmp_path / "again.jsonl").write_text(lines * 5)
    (tmp_path / "talk.yaml").write_text(CONFIG)
    assert run_command(["train", "talk.yaml"]) == 0
    assert run_command(["promote", "runs/talk"]) == 0
    path = tmp_path / "runs" / "talk" / "promoted" / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    for asked in [both[:1], both[2:3], both[:3]]:
        inputs = tokenizer.apply_chat_template(
            asked,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        answer = made[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        wanted = ANSWERS[asked[-1]["content"]].strip()
        assert wanted in text, (asked, text)
        assert len(answer) < 200, text
