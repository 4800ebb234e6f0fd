"""Of a template that writes turn by turn, one rendering gives those of all beginnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

import raytune_ft.data
from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats import Encoder, Example, encode_rows
from raytune_ft.data.formats.byte_tokens import ByteTokens
from raytune_ft.data.formats.rendering import Program, plain, plain_turn
from raytune_ft.data.rows import Row
from tests.unit.data.formats.test_templates import CONVERSATIONS, TOOL, Turn, said, templates

OWN = Path(raytune_ft.data.__file__).parent / "chat_templates"
WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def expected(source: str, turns: list[Turn], tools: Any, prompt: bool) -> tuple[str, list[Any]]:
    texts, marks = render_jinja_template(
        [turns],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **WORDS,
    )
    return texts[0], marks[0]


def test_beginnings_are_what_transformers_renders() -> None:
    by_turn, compared = set[str](), 0
    for path in [*map(Path, templates()), *OWN.glob("*.jinja")]:
        source = path.read_text(encoding="utf-8")
        program = Program(source, WORDS, marked=True)
        for name, turns in CONVERSATIONS.items():
            tools = [TOOL] if name == "tool" or name.startswith("call") else None
            given = list(map(plain_turn, turns))
            try:
                whole = program.render(given, plain(tools), prompt=False)
            except (jinja2.TemplateError, TypeError):
                continue
            if program.marked:
                assert (whole.text, whole.marks) == expected(source, turns, tools, False)
            assert whole.text == expected(source, turns, tools, False)[0]
            if whole.begins is None:
                continue
            by_turn.add(path.stem)
            for count in range(1, len(turns) + 1):
                for prompt in (False, True):
                    found = program.beginning(whole, given, count, plain(tools), prompt)
                    text, marks = expected(source, turns[:count], tools, prompt)
                    assert found.text == text, (path.stem, name, count, prompt)
                    assert not program.marked or found.marks == marks
                    compared += 1
    assert {"chatml", "zephyr", "alpaca", "vicuna"} <= by_turn
    assert compared > 300
    if templates():
        assert {"llama3", "gemma", "gemma3", "phi3", "cohere"} <= by_turn
        assert not {"qwen3", "gptoss", "deepseek_r1_distill", "qwen2_5"} & by_turn


@pytest.mark.parametrize(
    "source",
    [
        MESSAGES.replace("{{ eos_token }}", "{% if not loop.last %}{{ eos_token }}{% endif %}"),
        MESSAGES.replace("{{ eos_token }}", "{{ messages | length }}"),
        MESSAGES.replace("{{ eos_token }}", "{{ loop.nextitem }}"),
        MESSAGES.replace("{{ eos_token }}", "{{ loop.length }}"),
        MESSAGES.replace("{{ eos_token }}", "{{ messages[-1].role }}"),
        MESSAGES.replace("{{ eos_token }}", "{{ messages[loop.index0 + 1] }}"),
        MESSAGES.replace("{{ eos_token }}", "{% if add_generation_prompt %}!{% endif %}"),
        MESSAGES.replace("{{ eos_token }}", "{% set other = messages %}{{ other[-1].role }}"),
        MESSAGES.replace("in messages", "in messages if m.role == 'user'"),
        MESSAGES.replace("in messages", "in messages[::-1]"),
        MESSAGES.replace("in messages", "in messages | reverse"),
        MESSAGES.replace("{% endfor %}", "{% break %}{% endfor %}"),
        MESSAGES + "{{ messages[0].role }}",
        MESSAGES + MESSAGES,
        "{% set n = namespace(x=0) %}"
        + MESSAGES.replace("{{ eos_token }}", "{% set n.x = n.x + 1 %}")
        + "{{ n.x }}",
        "{% set n = namespace(all=messages) %}" + MESSAGES.replace("eos_token", "n.all[-1].role"),
        "{% set n = namespace() %}{% set n.all = messages %}"
        + MESSAGES.replace("eos_token", "n.all[-1].role"),
        "{% set rest = messages[1:] %}{% set rest = rest[1:] %}"
        + MESSAGES.replace("in messages", "in rest"),
        "{% set rest %}ab{% endset %}{% set rest = messages %}"
        + MESSAGES.replace("in messages", "in rest"),
        "{% macro end() %}{{ messages[-1].role }}{% endmacro %}"
        + MESSAGES.replace("eos_token", "end()"),
        "{% with all = messages %}{{ all[-1].role }}{% endwith %}" + MESSAGES,
        "{% for m in messages %}{% for n in messages %}{{ n.role }}{% endfor %}{% endfor %}",
        "{% if tools %}" + MESSAGES + "{% endif %}",
        "{% for a in messages recursive %}{{ a.role }}{% endfor %}",
    ],
)
def test_what_reads_ahead_does_not_write_turn_by_turn(source: str) -> None:
    turns = [said("user", "umbra"), said("assistant", "Blue alpha")]
    program = Program(source, WORDS, marked=True)
    found = program.render(list(map(plain_turn, turns)), None, prompt=False)
    assert found.begins is None
    assert found.text == expected(source, turns, None, False)[0]


def test_what_a_turn_says_is_not_taken_for_the_mark_of_a_turn() -> None:
    turns = [said("user", "turn begins"), said("assistant", "turn begins")]
    found = Program(MESSAGES, WORDS, marked=True).render(turns, None, prompt=False)
    assert found.begins is not None
    assert (len(found.begins), found.begins[0], found.begins[-1]) == (3, 0, len(found.text))


def test_a_row_costs_one_rendering_and_a_batch_one_call_of_the_tokenizer(
    tiny: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.chat_template = (OWN / "chatml.jinja").read_text()
    encoder = Encoder.of(tiny)
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages"})
    rows = [
        Row(f"row {n}", {"messages": [*CONVERSATIONS["four"], said("user", f"{n}"), answer]})
        for n, answer in enumerate([said("assistant", "Blue alpha")] * 50)
    ]
    list(encode_rows(encoder, config, "\n", rows[:1]))
    counts = {"rendered": 0, "placed": 0, "asked": 0}

    def counted(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(Program, "render", "rendered")
    counted(ByteTokens, "placed", "placed")
    counted(type(tiny), "__call__", "asked")
    found = list(encode_rows(encoder, config, "\n", rows))
    assert all(isinstance(one, Example) and one.mask.any() for one in found)
    header = 7  # what the template writes around turns is found once for all rows
    assert len(rows) <= counts["rendered"] <= len(rows) + header
    assert (counts["placed"], counts["asked"]) == (1, 0)
