"""Chosen roles carry loss, and templates are given tools."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats import Encoder, Example, encode_rows
from raytune_ft.data.rows import BadRow, Row

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
CHAT = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "It is noon."},
]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


def encode(
    tokenizer: PreTrainedTokenizerBase, source: dict[str, Any], tools: Any = None
) -> Example | BadRow:
    tokenizer.chat_template = TEMPLATE
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages", **source})
    row = Row("row 0", {"messages": CHAT, "functions": tools})
    (found,) = encode_rows(Encoder.of(tokenizer), config, "\n", [row])
    return found


def test_calls_are_the_assistants_words(tiny: PreTrainedTokenizerBase) -> None:
    example = encode(tiny, {})
    assert isinstance(example, Example)
    assert tiny.decode(example.ids[example.mask].tolist()) == "CALL clock</s>It is noon.</s>"


def test_other_roles_are_learnt_with_their_headers(tiny: PreTrainedTokenizerBase) -> None:
    example = encode(tiny, {"train_on": ["tool", "assistant"]})
    assert isinstance(example, Example)
    said = tiny.decode(example.ids[example.mask].tolist())
    assert said == "CALL clock</s><tool>noon</s>It is noon.</s>"


def test_a_role_that_nobody_has_is_a_bad_row(tiny: PreTrainedTokenizerBase) -> None:
    bad = encode(tiny, {"train_on": ["critic", "judge"]})
    assert isinstance(bad, BadRow)
    assert (bad.cause, bad.detail) == ("no_trained_turn", "no turn is of critic or judge")


def test_the_template_is_given_the_tools_of_the_row(tiny: PreTrainedTokenizerBase) -> None:
    example = encode(tiny, {"tools": "functions"}, [TOOL])
    assert isinstance(example, Example)
    assert tiny.decode(example.ids.tolist()).startswith("TOOLS [{")
    assert tiny.decode(example.ids[example.mask].tolist()) == "CALL clock</s>It is noon.</s>"
    bad = encode(tiny, {"tools": "functions"}, "clock")
    assert isinstance(bad, BadRow)
    assert bad.cause == "wrong_type"
