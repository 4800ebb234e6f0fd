"""Chat templates of real models: what is learnt, checked by words that each turn alone has."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats import Encoder, Example, encode_rows
from raytune_ft.data.rows import BadRow, Row

Turn = dict[str, Any]


def said(role: str, content: Any, **more: Any) -> Turn:
    return {"role": role, "content": content, **more}


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "zulu_weather", "arguments": {"city": "Parisian"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "zulu_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
CALLED = [said("user", "umbra"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
CONVERSATIONS: dict[str, list[Turn]] = {
    "single": [said("user", "umbra"), said("assistant", "Blue alpha")],
    "system": [said("system", "sigma"), said("user", "umbra"), said("assistant", "Blue alpha")],
    "two": [
        said("user", "umbra"),
        said("assistant", "Blue alpha"),
        said("user", "vesper"),
        said("assistant", "Green gamma"),
    ],
    "four": [
        turn
        for n in ("one", "two", "three", "four")
        for turn in (said("user", f"ask{n}"), said("assistant", f"Reply{n} words"))
    ],
    "tool": [
        *CALLED,
        said("tool", '{"t": "tango"}', name="zulu_weather", tool_call_id="abcdefghi"),
        said("assistant", "Blue alpha"),
    ],
    "call_last": CALLED,
    "thoughts": [said("user", "umbra"), said("assistant", "<think>\nhmmm\n</think>\n\nBlue alpha")],
    "thoughts_two": [
        said("user", "umbra"),
        said("assistant", "<think>\nhmmm\n</think>\n\nBlue alpha"),
        said("user", "vesper"),
        said("assistant", "<think>\nahaa\n</think>\n\nGreen gamma"),
    ],
    "reasoning": [said("user", "umbra"), said("assistant", "Blue alpha", reasoning_content="hmmm")],
    "reasoning_two": [
        said("user", "umbra"),
        said("assistant", "Blue alpha", reasoning_content="hmmm"),
        said("user", "vesper"),
        said("assistant", "Green gamma", reasoning_content="ahaa"),
    ],
    "assistant_first": [
        said("assistant", "Hello omega"),
        said("user", "umbra"),
        said("assistant", "Blue alpha"),
    ],
    "parts": [
        said("user", [{"type": "text", "text": "umbra"}]),
        said("assistant", [{"type": "text", "text": "Blue alpha"}]),
    ],
    "unicode": [said("user", "日本 umbra 👍"), said("assistant", "é 答え Blue alpha 👍🏽")],
    "blanks": [
        said("user", "  umbra \n"),
        said("assistant", "\n Blue alpha  "),
        said("user", "vesper\n\n"),
        said("assistant", "Green gamma\n"),
    ],
    "ends_with_user": [
        said("user", "umbra"),
        said("assistant", "Blue alpha"),
        said("user", "vesper"),
    ],
}
WORDS = {
    "user": ("umbra", "vesper", "askone", "asktwo", "askthree", "askfour"),
    "assistant": ("Blue", "alpha", "Green", "gamma", "omega", "hmmm", "ahaa", "Parisian", "words")
    + ("Replyone", "Replytwo", "Replythree", "Replyfour"),
    "other": ("sigma", "tango"),
}


def templates() -> list[str]:
    if find_spec("trl") is None:
        return []
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    return sorted(map(str, folder.glob("*.jinja")))


def encode(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any = None, **source: Any
) -> Example | BadRow:
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages", **source})
    row = Row("row 0", {"messages": turns, "tools": tools})
    (found,) = encode_rows(Encoder.of(tokenizer), config, "\n", [row])
    return found


def runs(ids: Any, mask: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def faults(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any, one: Example) -> set[str]:
    """What is wrong with an example, by the words that it has and those that carry loss."""
    found: set[str] = set()
    prompt = header_of(tokenizer, tools)
    text = tokenizer.decode(one.ids.tolist())
    learnt = [tokenizer.decode(one.ids[a:b].tolist()) for a, b in runs(one.ids, one.mask)]
    for word in (*WORDS["user"], *WORDS["other"]):
        if any(word in part for part in learnt):
            found.add("of others")
    # The last turn of the assistant that the example has is learnt to its end.
    for part in learnt:
        if prompt.strip() and part.strip().startswith(prompt.strip()):
            found.add("header")
        if part.strip() in tokenizer.all_special_tokens or not part.strip():
            found.add("nothing")
    if not any(word in part for word in WORDS["assistant"] for part in learnt):
        found.add("nothing")
    del text
    return found


def header_of(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    turns = [said("user", "umbra")]
    bare, asked = (
        tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=one)
        for one in (False, True)
    )
    return str(asked)[len(str(bare)) :]


def judged(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any
) -> tuple[str, Example | BadRow | None]:
    result = encode(tokenizer, turns, tools)
    if isinstance(result, BadRow):
        return f"bad: {result.cause}", result
    found: set[str] = set()
    covered = Counter[str]()
    for one in (result, *result.others):
        found |= faults(tokenizer, turns, tools, one)
        for a, b in runs(one.ids, one.mask):
            part = tokenizer.decode(one.ids[a:b].tolist())
            covered.update(word for word in WORDS["assistant"] if word in part)
    if found:
        return f"WRONG: {', '.join(sorted(found))}", result
    have = str([turn for turn in turns if turn["role"] == "assistant"])
    missing = [w for w in WORDS["assistant"] if w in have and not covered[w]]
    if missing and not result.lost:
        return f"WRONG: {', '.join(missing)} not learnt", result
    if result.lost:
        return f"lost: {', '.join(result.lost)}", result
    return "own" if "own_example" in result.notes else "exact", result
