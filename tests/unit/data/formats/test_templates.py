"""Chat templates of real models: what is learnt, checked by words that each turn alone has."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

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
CALL_AS_JSON = CALL | {
    "function": {"name": "zulu_weather", "arguments": json.dumps({"city": "Parisian"})}
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
    "call_as_json": [
        said("user", "umbra"),
        {"role": "assistant", "content": None, "tool_calls": [CALL_AS_JSON]},
        said("tool", '{"t": "tango"}', name="zulu_weather", tool_call_id="abcdefghi"),
        said("assistant", "Blue alpha"),
    ],
    "call_and_words": [
        said("user", "umbra"),
        said("assistant", "Green gamma", tool_calls=[CALL]),
        said("tool", '{"t": "tango"}', name="zulu_weather", tool_call_id="abcdefghi"),
        said("assistant", "Blue alpha"),
    ],
    "no_calls": [said("user", "umbra"), said("assistant", "Blue alpha", tool_calls=[])],
    "two_answers": [
        said("user", "umbra"),
        said("assistant", "Blue alpha"),
        said("assistant", "Green gamma"),
    ],
    "empty_system": [said("system", ""), said("user", "umbra"), said("assistant", "Blue alpha")],
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
WORDS: dict[str, tuple[str, ...]] = {
    "user": ("umbra", "vesper", "askone", "asktwo", "askthree", "askfour"),
    "assistant": (
        *("Blue", "alpha", "Green", "gamma", "omega", "hmmm", "ahaa", "Parisian", "words"),
        *("Replyone", "Replytwo", "Replythree", "Replyfour"),
    ),
    "other": ("sigma", "tango"),
}


def templates() -> list[str]:
    if find_spec("trl") is None:
        return []
    spec = find_spec("trl")
    folder = Path(str(spec and spec.origin)).parent / "chat_templates"
    return sorted(map(str, folder.glob("*.jinja")))


def encode(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any = None, **source: Any
) -> Example | BadRow:
    config = SourceConfig.model_validate({"path": "a.jsonl", "format": "messages", **source})
    row = Row("row 0", {"messages": turns, "tools": tools})
    (found,) = encode_rows(Encoder.of(tokenizer), config, "\n", [row])
    return found


def runs(mask: Any) -> list[tuple[int, int]]:
    """Where tokens carry loss: (first, behind the last) of each run."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def prompts(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any) -> list[str]:
    """What the model is shown before each turn of the assistant, by transformers alone."""
    found = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and number:
            with suppress(Exception):  # whatever a template raises
                found.append(rendered(tokenizer, turns[:number], tools))
    return found


def faults(
    tokenizer: PreTrainedTokenizerBase, shown: list[str], one: Example, first: bool
) -> set[str]:
    """What is wrong with an example: by the words that carry loss, and the text before them.

    `first`: the conversation begins with the assistant, so that one prompt cannot be rendered.
    """
    found: set[str] = set()
    learnt = runs(one.mask)
    if not learnt:
        return {"nothing is learnt"}
    for number, (start, stop) in enumerate(learnt):
        before = tokenizer.decode(one.ids[:start].tolist())
        part = tokenizer.decode(one.ids[start:stop].tolist())
        if any(word in part for word in (*WORDS["user"], *WORDS["other"])):
            found.add("words of others are learnt")
        if not any(word in part for word in WORDS["assistant"]):
            found.add("a turn without words is learnt")
        if first and number == 0 and not any(word in before for word in WORDS["user"]):
            continue
        # The template may prompt with more than it then writes, such as an opened <think>; and
        # one that marks what is learnt may leave out a header that it does not prompt with.
        rests = [one[len(before) :] for one in shown if one.startswith(before)]
        rest = min(rests, key=len, default="?")
        marked = "generation %}" in str(tokenizer.chat_template)
        prompted = not rest or (len(rest) <= 40 and not part.startswith(rest[:4]))
        if not prompted and not (marked and any(before.startswith(one) for one in shown)):
            found.add("the text before a turn is not its prompt")
    return found


def forms(turns: list[Turn]) -> list[list[Turn]]:
    """The ways to write the same turns, of which a template takes some."""
    found: list[list[Turn]] = [turns, [], [], [], [], []]
    for turn in turns:
        content, calls, objects = turn["content"], [], []
        content = content or ""
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        for call in turn.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
            arguments = json.loads(arguments)
            objects.append(call | {"function": call["function"] | {"arguments": arguments}})
        called = {"tool_calls": calls} if calls else {}
        found[1].append(turn | {"content": text})
        found[2].append(turn | {"content": [{"type": "text", "text": text}]})
        found[3].append(turn | called)
        found[5].append(turn | ({"tool_calls": objects} if objects else {}) | {"content": text})
        found[4].append(turn | called | {"content": content or None})
    return found


def rendered(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any) -> str:
    """Of the turns and the header of the assistant; by transformers, with nulls kept."""
    texts, _ = render_jinja_template(
        [turns],
        tools=tools,
        chat_template=str(tokenizer.chat_template),
        add_generation_prompt=True,
        **tokenizer.special_tokens_map,
    )
    return str(texts[0])


def judged(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Any
) -> tuple[str, Example | BadRow]:
    """exact, own (in examples of its own), lost or bad with the cause, or WRONG."""
    result = encode(tokenizer, turns, tools)
    if isinstance(result, BadRow):
        return f"bad: {result.cause}", result
    shown = [one for form in forms(turns) for one in prompts(tokenizer, form, tools)]
    found, covered = set[str](), set[str]()
    for one in (result, *result.others):
        found |= faults(tokenizer, shown, one, turns[0]["role"] == "assistant")
        for start, stop in runs(one.mask):
            part = tokenizer.decode(one.ids[start:stop].tolist())
            covered |= {word for word in WORDS["assistant"] if word in part}
    have = str([turn for turn in turns if turn["role"] == "assistant"])
    missing = [word for word in WORDS["assistant"] if word in have and word not in covered]
    if missing and not result.lost:
        found.add(f"{', '.join(missing)} not learnt")
    if found:
        return f"WRONG: {'; '.join(sorted(found))}", result
    if result.lost:
        return f"lost: {', '.join(result.lost)}", result
    return "own" if "own_example" in result.notes else "exact", result


def byte_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Bytes are tokens, and so is every special token that the template writes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore
    special = sorted({"<s>", "</s>", *re.findall(SPECIAL, template)})
    trainer = trainers.BpeTrainer(
        vocab_size=257 + len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


SPECIAL = (
    r"<\|[a-zA-Z_]+\|>|<\uff5c[^\uff5c]+\uff5c>|<end_of_turn>|<start_of_turn>|<turn\|>|<\|turn>|\[/?INST\]"
    r"|<end_of_utterance>|\[gMASK\]|<sop>"
)


@pytest.mark.skipif(not templates(), reason="trl, which has the templates, is not installed")
# The slow case has every template.
@pytest.mark.parametrize("nth", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_nth_template_is_learnt_exactly_or_refused_with_a_reason(nth: int) -> None:
    counts, wrong = Counter[str](), []
    for path in templates()[::nth]:
        text = Path(path).read_text(encoding="utf-8")
        tokenizer = byte_tokenizer(text)
        tokenizer.chat_template = text
        line = []
        for name, turns in CONVERSATIONS.items():
            tools = [TOOL] if name == "tool" or name.startswith("call") else None
            verdict, _ = judged(tokenizer, turns, tools)
            counts[verdict.partition(":")[0]] += 1
            wrong += [f"{Path(path).stem} {name}: {verdict}"] * verdict.startswith("WRONG")
            line.append(f"{name}={verdict}")
        print(f"{Path(path).stem:32}", " ".join(each for each in line if "=exact" not in each))
    print(dict(counts))
    assert not wrong, wrong
    assert counts["exact"] + counts["own"] > 0.8 * counts.total()
