"""From a file of conversations to a promoted model that answers as it was taught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.cli import run_command
from raytune_ft.data.prepared import open_prepared
from tests.support.templates import save_base_with_marks, vendor_template

TEMPLATES = ["qwen3", "llama3_1", "phi3", "gemma", "gptoss"]
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_promoted_model_says_what_it_was_taught_and_ends(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = vendor_template(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "template.jinja").write_text(template)
    save_base_with_marks(template, tmp_path / "base")
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
    taught = _taught(tmp_path / "runs")
    for asked in [both[:1], both[2:3], rows[2]["messages"][:1], both[:3]]:
        inputs = tokenizer.apply_chat_template(
            asked,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        length = inputs["input_ids"].shape[1]
        prompt, answer = made[0, :length].tolist(), made[0, length:].tolist()
        learnt = taught[tuple(prompt)]
        assert answer == learnt[: len(answer)], tokenizer.decode(answer)
        assert answer[-1] in model.generation_config.eos_token_id
        behind = tokenizer.decode(learnt[len(answer) :], skip_special_tokens=True)
        assert not behind.strip()  # the template's newline, and EOS in Phi-3's
        assert ANSWERS[asked[-1]["content"]].strip() in tokenizer.decode(answer)


def _taught(runs: Path) -> dict[tuple[int, ...], list[int]]:
    """What stands before each run of labels in the training examples -> the labels."""
    (tokens,) = (runs / ".cache" / "tokens").iterdir()
    split = open_prepared(tokens).train
    found: dict[tuple[int, ...], list[int]] = {}
    for first, end in zip(split.offsets[:-1], split.offsets[1:], strict=True):
        ids = split.input_ids[first:end].tolist()
        changes = np.flatnonzero(np.diff(split.label_mask[first:end], prepend=False, append=False))
        for begin, behind in changes.reshape(-1, 2).tolist():
            found[tuple(ids[:begin])] = ids[begin:behind]
    return found
