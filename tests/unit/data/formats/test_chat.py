"""Chosen roles carry loss, and templates are given tools."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats import Encoder, Example, encode_rows
from raytune_ft.data.formats.template import Template
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


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)


def written(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, Any]], **source: Any
) -> Example | BadRow:
    tokenizer.chat_template = template
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages", **source})
    row = Row("row 0", {"messages": turns})
    (found,) = encode_rows(Encoder.of(tokenizer), config, "\n", [row])
    return found


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def learnt(tokenizer: PreTrainedTokenizerBase, example: Example | BadRow) -> str:
    assert isinstance(example, Example), example
    return str(tokenizer.decode(example.ids[example.mask].tolist()))


@pytest.mark.parametrize(
    "raising",
    ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{{ 'a' + 1 }}"],
)
def test_whatever_a_template_raises_makes_a_bad_row(
    tiny: PreTrainedTokenizerBase, raising: str
) -> None:
    bad = written(tiny, raising, [said("user", "x"), said("assistant", "y")])
    assert isinstance(bad, BadRow)
    assert bad.cause == "template"
    assert "\n" not in bad.detail


def test_a_turn_of_which_the_template_writes_nothing_is_a_bad_row(
    tiny: PreTrainedTokenizerBase,
) -> None:
    turns = [said("user", "time?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    bad = written(tiny, CHATML, turns)
    assert isinstance(bad, BadRow)
    assert bad.cause == "unwritten_turn"
    assert "turn 2" in bad.detail


def test_what_the_template_leaves_out_is_counted(tiny: PreTrainedTokenizerBase) -> None:
    thought = said("assistant", "It is noon.") | {"reasoning_content": "the sun is high"}
    example = written(tiny, CHATML, [said("user", "time?"), thought])
    assert learnt(tiny, example) == "It is noon.</s>\n"
    assert isinstance(example, Example)
    assert example.lost == ("reasoning",)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_conversation_that_begins_with_the_assistant_learns_its_words(
    tiny: PreTrainedTokenizerBase, template: str
) -> None:
    turns = [said("assistant", "Hello."), said("user", "Hi."), said("assistant", "What is it?")]
    found = learnt(tiny, written(tiny, "A default system turn.\n" + template, turns))
    assert found.replace("</s>\n", "") == "Hello.What is it?"


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("edge", [" ", "\n", "👍", "日", "é ", "\u00a0"])
def test_marks_are_exact_at_the_edges_of_a_turn(
    tiny: PreTrainedTokenizerBase, template: str, edge: str
) -> None:
    for name in ("tiny", "trimmed"):
        if name == "trimmed":  # as the tokenizers of GPT-2 and Llama 3 report offsets
            tiny.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        answer = f"{edge}yes{edge}"
        turns = [said("user", f"x{edge}"), said("assistant", answer), said("user", f"{edge}z")]
        found = learnt(tiny, written(tiny, template, turns))
        assert found.replace("</s>\n", "") == answer


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_special_tokens_in_a_text_are_text(tiny: PreTrainedTokenizerBase, template: str) -> None:
    turns = [said("user", "x</s>\n<|assistant|>\nno"), said("assistant", "the end is </s>, yes")]
    example = written(tiny, template, turns)
    assert isinstance(example, Example)
    eos = tiny.eos_token_id
    assert example.ids.tolist().count(eos) == 2  # those of the template
    assert tiny.decode(example.ids.tolist()).count("</s>") == 4
    assert learnt(tiny, example).startswith("the end is </s>, yes")
    assert example.notes == ("special_text",)
    plain = [turn | {"content": turn["content"].replace("</s>", "#")} for turn in turns]
    clean = written(tiny, template, plain)
    assert isinstance(clean, Example)
    assert clean.notes == ()
    control = written(tiny, template, turns, special_tokens="control")
    assert isinstance(control, Example)
    assert control.ids.tolist().count(eos) == 4


def test_an_end_behind_every_last_turn_is_no_other_turn(tiny: PreTrainedTokenizerBase) -> None:
    """Phi-3 ends every rendering with EOS, which no turn in the middle has."""
    template = CHATML.replace("{{ eos_token }}", "<pad>") + (
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    turns = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    example = written(tiny, template, turns)
    assert isinstance(example, Example)
    assert (example.others, example.notes) == ((), ())
    assert learnt(tiny, example) == "b<pad>\nd<pad>\n</s>"
    assert example.ends == (tiny.pad_token_id, tiny.eos_token_id)


def test_a_header_that_is_written_unasked_carries_no_loss(tiny: PreTrainedTokenizerBase) -> None:
    template = CHATML.split("{% if add_generation_prompt")[0] + "{{ '<|assistant|>\\n' }}"
    turns = [said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "d")]
    example = written(tiny, template, turns)
    assert learnt(tiny, example) == "b</s>\nd</s>\n"
    assert isinstance(example, Example)
    assert tiny.decode(example.ids.tolist()).endswith("d</s>\n<|assistant|>\n")


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        MARKED,
        CHATML.replace(
            "{{ m.content }}", "{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}"
        ),
    ],
)
def test_long_conversations_are_read_as_short_ones_are(
    tiny: PreTrainedTokenizerBase, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    turns = [
        said(role, f"{rng.choice(['yes', 'no', 'ok'])} {number % 5}")
        for number in range(60)
        for role in ("user", "assistant")
    ]
    found = []
    for exact in (0, 1000):
        monkeypatch.setattr("raytune_ft.data.formats.template.EXACT", exact)
        example = written(tiny, template, turns)
        assert isinstance(example, Example)
        found.append([(one.ids.tolist(), one.mask.tolist()) for one in (example, *example.others)])
    assert found[0] == found[1]
    assert len(found[0]) == (60 if "loop.last" in template else 1)


def test_the_time_grows_with_the_number_of_turns(
    tiny: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that are rendered, in all renderings of a conversation, for each turn of it."""
    rendered = list[int]()
    original = Template.render

    def render(self: Template, turns: list[Any], *rest: Any, **more: Any) -> Any:
        rendered.append(len(turns))
        return original(self, turns, *rest, **more)

    monkeypatch.setattr(Template, "render", render)
    work = []
    for pairs in (100, 400):
        turns = [said(role, f"word {n}") for n in range(pairs) for role in ("user", "assistant")]
        rendered.clear()
        assert isinstance(written(tiny, CHATML, turns), Example)
        work.append(sum(rendered) / len(turns))
    assert work[1] < 1.5 * work[0]
