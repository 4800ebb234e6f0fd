"""The shapes in which files hold conversations give the same turns, and so the same tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.conversation import Conversation, conversation_of
from raytune_ft.data.rows import BadRow, Row

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}
CALL_PART = {"type": "tool_call", "value": json.dumps(CALL["function"])}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "time?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "It is noon."},
]


def read(values: dict[str, Any], **source: Any) -> Conversation | BadRow:
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages", **source})
    return conversation_of(config, Row("row 0", values))


def read_turns(values: dict[str, Any], **source: Any) -> Conversation:
    found = read(values, **source)
    assert isinstance(found, Conversation), found
    return found


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ({"messages": TURNS, "tools": [TOOL]}, {}),
        ({"messages": json.dumps(TURNS), "tools": json.dumps([TOOL])}, {}),
        ({"messages": TURNS, "tools": [TOOL["function"]]}, {}),
        # As OpenAI's API has it: arguments are text, and content is null beside a call.
        (
            {
                "messages": [
                    *TURNS[:2],
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "type": "function",
                                "function": {"name": "clock", "arguments": '{"zone": "utc"}'},
                            }
                        ],
                    },
                    *TURNS[3:],
                ],
                "tools": [TOOL],
            },
            {},
        ),
        # As a Parquet file has it: every turn and every call has the keys of all.
        (
            {
                "messages": [
                    {"role": None, "content": None, "name": None, "tool_calls": None}
                    | turn
                    | (
                        {
                            "tool_calls": [
                                {
                                    "id": None,
                                    "type": "function",
                                    "function": {
                                        "name": "clock",
                                        "arguments": {"zone": "utc", "city": None},
                                    },
                                }
                            ]
                        }
                        if "tool_calls" in turn
                        else {}
                    )
                    for turn in TURNS
                ],
                "tools": [TOOL],
            },
            {},
        ),
        # Text in parts.
        (
            {
                "messages": [
                    turn | {"content": [{"type": "text", "text": turn["content"]}]}
                    if "content" in turn
                    else {"role": "assistant", "content": [CALL_PART], "tool_calls": []}
                    for turn in TURNS
                ],
                "tools": [TOOL],
            },
            {},
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "time?"},
                    {"from": "function_call", "value": json.dumps(CALL["function"])},
                    {"from": "observation", "value": "noon"},
                    {"from": "gpt", "value": "It is noon."},
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            {"format": "sharegpt"},
        ),
    ],
    ids=["plain", "json", "bare-tools", "openai", "parquet", "parts", "sharegpt"],
)
def test_every_shape_gives_the_same_turns(values: dict[str, Any], source: dict[str, Any]) -> None:
    found = read_turns(values, **source)
    calls = [{"role": "assistant", "tool_calls": [CALL]}]
    turns = [{key: value for key, value in turn.items() if value != ""} for turn in found.turns]
    assert turns == [*TURNS[:2], *calls, *TURNS[3:]]
    assert found.tools == [TOOL]
    assert found.trained == (False, False, True, False, True)


def test_alpaca_is_a_question_with_its_input_and_history() -> None:
    values = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hello?", "Hi."]],
    }
    found = read_turns(values, format="alpaca")
    assert [(turn["role"], turn["content"]) for turn in found.turns] == [
        ("system", "Be brief."),
        ("user", "Hello?"),
        ("assistant", "Hi."),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]
    plain = read_turns({"instruction": "Add.", "input": "", "output": "3"}, format="alpaca")
    assert [turn["content"] for turn in plain.turns] == ["Add.", "3"]


@pytest.mark.parametrize("flag", ["weight", "train", "trainable", "loss_mask", "loss_weight"])
@pytest.mark.parametrize("value", [0, False, 0.0])
def test_a_turn_may_be_marked_not_to_be_trained(flag: str, value: Any) -> None:
    marked = [TURNS[1], {"role": "assistant", "content": "no", flag: value}, TURNS[1], TURNS[4]]
    found = read_turns({"messages": marked})
    assert found.trained == (False, False, False, True)
    assert found.spoken == 2
    assert not any(flag in turn for turn in found.turns)
    alone = read({"messages": marked[:2]})
    assert isinstance(alone, BadRow)
    assert alone.cause == "no_trained_turn"


def test_turns_of_a_prompt_carry_no_loss() -> None:
    values = {"prompt": TURNS[:4], "completion": TURNS[4:]}
    found = read_turns(values, format="prompt_completion")
    assert found.trained == (False, False, False, False, True)


def test_reasoning_may_be_a_part() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Yes."}]
    found = read_turns({"messages": [TURNS[1], {"role": "assistant", "content": parts}]})
    assert found.turns[1]["reasoning_content"] == "hm"
    assert found.turns[1]["content"] == "Yes."


@pytest.mark.parametrize(
    ("turns", "cause", "word"),
    [
        ([{"from": "human", "value": "x"}], "wrong_type", "sharegpt"),
        ([{"role": "assistant", "content": " "}], "empty", "blank"),
        ([{"role": "assistant", "content": None}], "empty", "neither"),
        ([{"role": "assistant", "tool_calls": [{}]}], "wrong_type", "name"),
        ([{"role": "assistant", "tool_calls": 3}], "wrong_type", "tool_calls"),
        ([{"role": "assistant", "content": 3}], "wrong_type", "not text"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "bad_weight", "0 or 1"),
        ([{"role": "user", "content": [{"type": "image"}]}], "unsupported_part", "image"),
    ],
)
def test_a_turn_that_cannot_be_read_is_a_bad_row(turns: Any, cause: str, word: str) -> None:
    bad = read({"messages": turns})
    assert isinstance(bad, BadRow)
    assert bad.cause == cause
    assert word in bad.detail


def test_an_unknown_speaker_is_a_bad_row_that_lists_the_known_ones() -> None:
    bad = read({"conversations": [{"from": "narrator", "value": "x"}]}, format="sharegpt")
    assert isinstance(bad, BadRow)
    assert bad.cause == "unknown_speaker"
    assert "'narrator'" in bad.detail
    assert "human" in bad.detail
