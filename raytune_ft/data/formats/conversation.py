"""Conversations as files write them, in one form.

Every source of turns (`messages`, ShareGPT, Alpaca) becomes a `Conversation` in the form of
OpenAI's API: role, content, reasoning and tool calls, arguments as objects, no key without a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_ft.config.data import SourceConfig
from raytune_ft.config.reference import one_of
from raytune_ft.data.rows import BadRow, Row, valid_unicode

Turn = dict[str, Any]

_THOUGHTS = re.compile(r"\s*(?:<think>|\[THINK\])?(.*?)(?:</think>|\[/THINK\])(.*)", re.DOTALL)
"""A content that begins with reasoning: (reasoning, answer)."""
ENDS_OF_THOUGHT = ("</think>", "[/THINK]")
"""A content that has neither does not begin with reasoning."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold what the assistant thought before it answered."""

LOSS_FLAGS = ("weight", "train", "trainable", "loss_mask", "loss_weight")
"""Keys of a turn that say whether it carries loss: 1 or true, 0 or false."""


@dataclass(frozen=True)
class Conversation:
    """Turns and tools of one row.

    Attributes:
        turns: in OpenAI's form; arguments of tool calls are objects where they parse as such.
        trained: [turn], whether it carries loss.
        spoken: turns of the trained roles, also those that are marked not to carry loss.
        tools: JSON schemas of the functions that the assistant may call.
    """

    origin: str
    turns: list[Turn]
    trained: tuple[bool, ...]
    spoken: int
    tools: list[dict[str, Any]] | None = None

    @cached_property
    def parts(self) -> list[list[tuple[str, str]]]:
        """[turn], the (kind, text) of everything that it says."""
        return [list(_said(turn)) for turn in self.turns]


class Unusable(Exception):
    """A value that cannot be part of a conversation.

    Attributes:
        cause: key of the data report.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


def conversation_of(source: SourceConfig, row: Row) -> Conversation | BadRow:
    """The conversation that the row holds, whatever its format."""
    try:
        turns, tools = READERS[source.format](source, row)
        flagged = [_flagged(turn) for turn in turns]
        turns = [turn for turn, _ in flagged]
        for number, turn in enumerate(turns, start=1):
            _check(turn, number)
        trained = tuple(kept and turn["role"] in source.train_on for turn, kept in flagged)
        spoken = sum(turn["role"] in source.train_on for turn in turns)
        if not any(trained):
            why = " that is to be trained" if spoken else ""
            detail = f"no turn is of {one_of(source.train_on)}{why}"
            raise Unusable("no_trained_turn", detail)
    except Unusable as error:
        return BadRow(row.origin, error.cause, str(error))
    return Conversation(row.origin, turns, trained, spoken, tools)


def _messages(source: SourceConfig, row: Row) -> tuple[list[Turn], Any]:
    turns = [_openai(turn) for turn in _turns(source, row)]
    return turns, _tools(source, row)


SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Speakers of ShareGPT files (`from`) and the roles that they play."""


def _sharegpt(source: SourceConfig, row: Row) -> tuple[list[Turn], Any]:
    turns = list(_system(source, row))
    for number, said in enumerate(_turns(source, row), start=1):
        speaker = said.get("from", said.get("role"))
        value = said.get("value", said.get("content"))
        if speaker not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            raise Unusable("unknown_speaker", f"turn {number} is from {speaker!r}, not {known}")
        rest = {k: v for k, v in said.items() if k not in ("from", "role", "value", "content")}
        turn = _openai({"role": SPEAKERS[speaker], "content": value, **rest})
        if speaker in ("function_call", "tool_call"):
            turn = _called(turn, number)
        turns.append(turn)
    return turns, _tools(source, row)


def _called(turn: Turn, number: int) -> Turn:
    """The turn of the assistant whose content is one call, or a list of calls, as JSON."""
    content = parsed(turn.get("content"))
    calls = content if isinstance(content, list) else [content]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        detail = f"turn {number} is a call, and not JSON with `name` and `arguments`"
        raise Unusable("wrong_type", detail)
    return _openai({**turn, "content": None, "tool_calls": calls})


def _alpaca(source: SourceConfig, row: Row) -> tuple[list[Turn], Any]:
    values = row.values
    turns = list(_system(source, row))
    history = parsed(values.get("history")) or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise Unusable("wrong_type", "'history' is not a list of [question, answer]")
    for question, answer in history:
        turns += _exchange(question, answer)
    asked = [values.get("instruction"), values.get("input")]
    if not all(part is None or isinstance(part, str) for part in asked):
        raise Unusable("wrong_type", "'instruction' and 'input' are not texts")
    question = "\n".join(part for part in asked if part)
    return [*turns, *_exchange(question, values.get("output"))], _tools(source, row)


def _exchange(question: Any, answer: Any) -> list[Turn]:
    said = (("user", question), ("assistant", answer))
    return [_openai({"role": role, "content": content}) for role, content in said]


def _system(source: SourceConfig, row: Row) -> Iterator[Turn]:
    """The system turn of formats that keep it in a column of its own."""
    if row.values.get("system"):
        yield _openai({"role": "system", "content": row.values["system"]})


def _pair(source: SourceConfig, row: Row) -> tuple[list[Turn], Any]:
    """A prompt and a completion that are lists of turns; only the latter carry loss."""
    parts = [row.values[name] for name in (source.prompt, source.completion)]
    if not all(
        isinstance(part, list) and all(isinstance(turn, dict) for turn in part) for part in parts
    ):
        raise Unusable("wrong_type", "prompt and completion are not both lists of turns")
    prompt, completion = parts
    turns = [_openai({**turn, "train": False}) for turn in prompt]
    return [*turns, *map(_openai, completion)], _tools(source, row)


READERS: dict[str, Callable[[SourceConfig, Row], tuple[list[Turn], Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _pair,
}


def _turns(source: SourceConfig, row: Row) -> list[Turn]:
    """The column of the turns, which some files hold as JSON text."""
    column = turns_column(source)
    value = row.values[column]
    if isinstance(value, str):
        if not valid_unicode(value):
            raise Unusable("bad_encoding", f"{column!r} is not UTF-8")
        value = parsed(value)
    if value is None or value == []:
        raise Unusable("empty", f"{column!r} has no turns")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable("wrong_type", f"{column!r} is not a list of turns")
    return value


def turns_column(source: SourceConfig) -> str:
    """The column of the turns."""
    if source.format == "sharegpt" and source.messages == "messages":
        return "conversations"
    return source.messages


def _tools(source: SourceConfig, row: Row) -> list[dict[str, Any]] | None:
    """The tools of the row, if it has the column; some files hold them as JSON text."""
    value = row.values.get(source.tools) if source.tools is not None else None
    if isinstance(value, str):
        value = parsed(value) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Unusable("wrong_type", f"{source.tools!r} is not a list of objects")
    tools: list[dict[str, Any]] = _without_nulls(value)
    if not _valid(tools):
        raise Unusable("bad_encoding", f"{source.tools!r} has half a character")
    return [one if "function" in one else {"type": "function", "function": one} for one in tools]


def is_bare(turn: Turn) -> bool:
    """Whether it has a role and a text alone, as most turns do; so it is in OpenAI's form."""
    return len(turn) == 2 and type(turn.get("role")) is type(turn.get("content")) is str


def _openai(turn: Turn) -> Turn:
    """One turn in OpenAI's form, with no key that has no value.

    A column of a Parquet file gives every turn the keys of all turns, and null where a turn has
    none, so null and absent must mean the same; arguments may be JSON text or an object.
    """
    if is_bare(turn):
        return turn
    turn = _without_nulls(turn)
    calls = turn.pop("tool_calls", None)
    calls = parsed(calls) if isinstance(calls, str) else calls or []
    content = turn.get("content")
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        calls = [*calls, *(parsed(text) for kind, text in parts if kind == "tool_call")]
        thoughts = "".join(text for kind, text in parts if kind in ("thinking", "reasoning"))
        turn["content"] = "".join(text for kind, text in parts if kind == "text")
        if thoughts and not any(turn.get(key) for key in REASONING):
            turn[REASONING[0]] = thoughts
    if not isinstance(calls, list):
        raise Unusable("wrong_type", "`tool_calls` is not a list")
    return {**turn, "tool_calls": [_call(call) for call in calls]} if calls else turn


PARTS = ("text", "thinking", "reasoning", "tool_call")
"""Types of the parts of a content that is a list."""


def _part(part: Any) -> tuple[str, str]:
    """(type, text) of a part; the text is under its type, or under `text` or `value`."""
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    keys = (kind, "text", "value")
    text = next((part[k] for k in keys if k in part), None) if isinstance(part, dict) else part
    if kind not in PARTS or not isinstance(text, str):
        detail = f"a part of a turn's content has the type {kind!r}, and {one_of(PARTS)} are read"
        raise Unusable("unsupported_part", detail)
    return kind, text


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Unusable("wrong_type", "a tool call is not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("wrong_type", "a tool call has no `name` of a function")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(value := parsed(arguments), dict):
        arguments = _without_nulls(value)
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"type": "function", **{k: call[k] for k in ("id",) if k in call}, "function": named}


def _flagged(turn: Turn) -> tuple[Turn, bool]:
    """The turn without its loss flags, and whether it may carry loss."""
    kept = True
    if turn.keys().isdisjoint(LOSS_FLAGS):
        return turn, kept
    for key in LOSS_FLAGS:
        flag = turn.get(key)
        if flag is None:
            continue
        if flag not in (0, 1):
            raise Unusable("bad_weight", f"`{key}` of a turn is {flag!r}, and may be 0 or 1")
        kept = kept and bool(flag)
    return {key: value for key, value in turn.items() if key not in LOSS_FLAGS}, kept


def _check(turn: Turn, number: int) -> None:
    if not isinstance(turn.get("role"), str):
        other = " (it has `from` and `value`: write format: sharegpt)" if "from" in turn else ""
        raise Unusable("wrong_type", f"turn {number} has no `role`{other}")
    keys = ("content",) if is_bare(turn) else ("content", *REASONING)
    texts = [turn.get(key) for key in keys]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise Unusable("wrong_type", f"turn {number} has content or reasoning that is not text")
    if not turn.get("tool_calls"):
        if turn.get("content") is None:
            raise Unusable("empty", f"turn {number} has neither `content` nor `tool_calls`")
        if turn["role"] == "assistant" and not "".join(text or "" for text in texts).strip():
            raise Unusable("empty", f"turn {number} of the assistant is blank")
    if not _valid(turn):
        raise Unusable("bad_encoding", f"turn {number} has half a character")


def _valid(value: Any) -> bool:
    """Whether every text in a value of JSON is valid, keys aside."""
    if isinstance(value, str):
        return value.isascii() or valid_unicode(value)
    if isinstance(value, dict):
        return all(map(_valid, value.values()))
    return not isinstance(value, list) or all(map(_valid, value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _said(turn: Turn) -> Iterator[tuple[str, str]]:
    """(kind, text) of everything that the turn says."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    thinks = turn["role"] == "assistant" and any(end in content for end in ENDS_OF_THOUGHT)
    if is_bare(turn) and not thinks:
        if content.strip():
            yield "content", content
        return
    thoughts = next((turn[key] for key in REASONING if turn.get(key)), "")
    split = _THOUGHTS.fullmatch(content) if thinks else None
    if split is not None:
        thoughts, content = thoughts or split[1], split[2]
    if thoughts.strip():
        yield "reasoning", thoughts
    if content.strip():
        yield "content", content
    for call in turn.get("tool_calls", ()):
        yield "tool_calls", call["function"]["name"]
        yield from (("tool_calls", text) for text in _leaves(call["function"]["arguments"]))


def _leaves(value: Any) -> Iterator[str]:
    """Names and texts in the arguments of a call. Numbers may be written in several ways."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value


def parsed(text: Any) -> Any:
    """What a JSON text holds; the text itself where it is not JSON."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
