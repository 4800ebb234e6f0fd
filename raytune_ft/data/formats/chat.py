"""Conversations become examples: the chat template writes them, and trained turns carry loss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.conversation import (
    Conversation,
    Turn,
    conversation_of,
    turns_column,
)
from raytune_ft.data.formats.example import Encoder, Example, Labelled, RowReader, SpecialText
from raytune_ft.data.formats.template import Dialogue, Template, Text, Unwritten
from raytune_ft.data.report import prompt_key
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.errors import DataError


def _columns(source: SourceConfig) -> dict[str, str]:
    if source.format == "alpaca":
        return {"instruction": "instruction", "output": "output"}
    return {"messages": turns_column(source)}


def _optional(source: SourceConfig) -> tuple[str, ...]:
    tools = (source.tools,) if source.tools is not None else ()
    beside = {"sharegpt": ("system",), "alpaca": ("input", "system", "history")}
    return (*beside.get(source.format, ()), *tools)


def _prompt(chat: Conversation) -> str:
    """Everything before the last turn of the assistant."""
    said = [number for number, turn in enumerate(chat.turns) if turn["role"] == "assistant"]
    return "\n".join(str(turn.get("content") or "") for turn in chat.turns[: max(said, default=0)])


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """The template also writes BOS and the ends of turns, so no token is added around its text.

    Raises:
        DataError: the tokenizer has no chat template or no offsets.
    """
    tokenizer = encoder.tokenizer
    if not rows:
        return []
    if not tokenizer.chat_template:
        raise DataError(
            f"format={source.format}",
            "needs a chat template, which this model's tokenizer does not have",
            "write chat_template: chatml or a file in the source, or a model that has one",
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"format={source.format}",
            "needs character offsets, which this model's tokenizer (a slow one) does not give",
            "write format: prompt_completion, or a model with a fast tokenizer",
        )
    template = Template(encoder, source.train_on)
    written = [_written(encoder, template, source, row) for row in rows]
    texts = [text for one in written if isinstance(one, Written) for text in one.texts]
    labelled = encoder.labelled([(text.text, text.spans) for text in texts])
    return [
        one if isinstance(one, BadRow) else _example(one, [next(labelled) for _ in one.texts])
        for one in written
    ]


@dataclass(frozen=True)
class Written:
    """A row as the template writes it: its texts, and what its example says of it."""

    origin: str
    texts: list[Text]
    prompt: bytes
    lost: tuple[str, ...]
    notes: tuple[str, ...]


def _example(written: Written, labelled: Sequence[Labelled | SpecialText]) -> Example | BadRow:
    for one in labelled:
        if isinstance(one, SpecialText):
            return BadRow(written.origin, "special_text", str(one))
    origin, prompt = written.origin, written.prompt
    first, *others = (one for one in labelled if isinstance(one, Labelled))
    more = tuple(Example(origin, one.ids, one.mask, prompt, ends=one.ends) for one in others)
    return Example(
        origin,
        first.ids,
        first.mask,
        prompt,
        others=more,
        ends=first.ends,
        lost=written.lost,
        notes=written.notes,
    )


def _written(
    encoder: Encoder, template: Template, source: SourceConfig, row: Row
) -> Written | BadRow:
    template.forget()
    chat = conversation_of(source, row)
    if isinstance(chat, BadRow):
        return chat
    hidden = chat
    if source.special_tokens == "text":
        turns, tools = encoder.hide(chat.turns), encoder.hide(chat.tools)
        if turns is not chat.turns or tools is not chat.tools:
            hidden = replace(chat, turns=turns, tools=tools)
    try:
        taken, unwritten = _as_taken(template, hidden)
        dialogue = Dialogue(template, taken)
    except Unwritten as error:
        return BadRow(row.origin, "template", f"the chat template refuses it: {error}")
    texts = _texts(dialogue, source.turns)
    said = {number: Haystack(text.said(number)) for text in texts for number in text.turns}
    for number, part in sorted(said.items()):
        found = (part.has(one) for _, one in dialogue.chat.parts[number])
        if template.ends_only(part.raw) or not any(found):
            detail = f"the chat template writes nothing of what turn {number + 1} says"
            return BadRow(row.origin, "unwritten_turn", detail)
    lost = _lost(dialogue, said, texts, bool(unwritten))
    notes = _notes(dialogue, chat, hidden, texts)
    return Written(row.origin, texts, prompt_key(_prompt(chat)), lost, notes)


def _lost(
    dialogue: Dialogue, said: dict[int, Haystack], texts: list[Text], unwritten: bool
) -> tuple[str, ...]:
    """What the row has and no example of it: reasoning, calls, tools, or the content of a role.
    `unwritten`: see `_unwritten`.
    """
    chat, whole, found = dialogue.chat, Haystack(dialogue.whole), set[str]()
    others = [Haystack(text.text) for text in texts if text.text != dialogue.whole]
    for number, turn in enumerate(chat.turns):
        kinds = set[str]()
        if number in said:
            kinds = _missing(chat, number, said[number])
        elif unwritten:  # that reasoning of earlier turns is cut is how the template shows them
            kinds = _missing(chat, number, whole) - {"reasoning"}
            for other in others if kinds else ():
                kinds &= _missing(chat, number, other)
        found |= {turn["role"] if kind == "content" else kind for kind in kinds}
    names = [str(tool["function"].get("name", "")) for tool in dialogue.tools or ()]
    if not all(map(whole.has, names)):
        found.add("tools")
    return tuple(sorted(found))


def _notes(
    dialogue: Dialogue, chat: Conversation, hidden: Conversation, texts: list[Text]
) -> tuple[str, ...]:
    """What was done to the row that its reader may not expect."""
    header = dialogue.template.header
    starts = [(text.text, spans[0][0]) for text in texts for spans in text.turns.values()]
    facts = {
        "own_example": len(texts) > 1 or texts[0].text != dialogue.whole,
        "special_text": hidden is not chat,
        "untrained_turn": len(dialogue.trained) < chat.spoken,
        "longer_prompt": not dialogue.template.marked(dialogue.tools)
        and any(not text.endswith(header, 0, start) for text, start in starts),
    }
    return tuple(name for name, fact in facts.items() if fact)


def _texts(dialogue: Dialogue, turns: str) -> list[Text]:
    """The renderings to train on.

    - auto: those in which each turn stands as the model would be shown it (`Dialogue.texts`).
    - split: for each turn, the rendering that ends with it.
    - last: the last trained turn, as the model would be shown it.
    - all: the whole conversation, with loss on each turn as it stands there.
    """
    whole, last = dialogue.whole, dialogue.trained[-1]
    if turns == "auto":
        return dialogue.texts
    if turns == "last":
        text = next(text for text in dialogue.texts if last in text.turns)
        return [Text(text.text, {last: text.turns[last]})]
    if turns == "split":
        places = {number: dialogue.place(number) for number in dialogue.trained}
        return [
            Text(whole, {number: dialogue.anywhere(number)})
            if place is None
            else Text(place.text, {number: place.spans})
            for number, place in places.items()
        ]
    first = dialogue.texts[0]
    known = first.turns if first.text == whole else {}
    return [Text(whole, {n: known.get(n) or dialogue.anywhere(n) for n in dialogue.trained})]


def _as_taken(template: Template, chat: Conversation) -> tuple[Conversation, float]:
    """The conversation in the form that the template writes most of, and what it leaves out.

    Templates disagree on what a turn without content has, whether the arguments of a call are an
    object or text, and whether content is text or a list of parts. The first form is that of
    `conversation_of`; each of `FORMS` is kept if the template then writes more.
    """
    best, least = chat, _unwritten(template, chat)
    for form in FORMS:
        if least == 0:
            break
        other = replace(best, turns=[form(turn) for turn in best.turns])
        if other.turns != best.turns and (count := _unwritten(template, other)) < least:
            best, least = other, count
    return best, least


def _unwritten(template: Template, chat: Conversation) -> float:
    """How many parts of the turns the template does not write; infinite if it raises.

    It may cut the reasoning of all turns but the last.
    """
    try:
        whole, _ = template.render(chat.turns, chat.tools)
    except Unwritten:
        return float("inf")
    text, last = Haystack(whole), len(chat.turns) - 1
    missing = (_missing(chat, number, text) for number in range(len(chat.turns)))
    return sum(
        len(kinds - {"reasoning"} if number < last else kinds)
        for number, kinds in enumerate(missing)
        if kinds
    )


def _arguments_as_text(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": call["function"] | {"arguments": arguments}})
    return {**turn, "tool_calls": calls}


def _content(value: Any) -> Callable[[Turn], Turn]:
    """A turn that has calls and no content gets this content."""
    return lambda turn: turn if turn.get("content") else {**turn, "content": value}


def _content_as_parts(turn: Turn) -> Turn:
    text = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else turn


def _developer_as_system(turn: Turn) -> Turn:
    return {**turn, "role": "system"} if turn["role"] == "developer" else turn


FORMS: tuple[Callable[[Turn], Turn], ...] = (
    _content(""),
    _content(None),
    _arguments_as_text,
    _developer_as_system,
    _content_as_parts,
)


class Haystack:
    """A text in which parts of turns are looked for, whatever the template does to their blanks
    and quotes.
    """

    def __init__(self, text: str) -> None:
        self.raw, self._raw_at, self._at = text, 0, 0

    @cached_property
    def _text(self) -> str:
        return _plain(self.raw)

    def has(self, part: str) -> bool:
        """Whether the part is in the text; the search begins behind the part found before."""
        at = self.raw.find(part, self._raw_at)  # what stands there as it is, is there
        if at >= 0:
            self._raw_at = at
            return True
        for form in (part, json.dumps(part, ensure_ascii=False), json.dumps(part)):
            plain = _plain(form)
            at = self._text.find(plain, self._at)
            if at < 0:
                at = self._text.find(plain)
            if at >= 0:
                self._at = at
                return True
        return False


def _plain(text: str) -> str:
    return re.sub(r"[\s\\\"']+", "", text).casefold()


def _missing(chat: Conversation, number: int, text: Haystack) -> set[str]:
    """The kinds of which the text lacks something that the turn says, or writes arguments as Python
    would.
    """
    missing = {kind for kind, part in chat.parts[number] if not text.has(part)}
    calls = [call["function"]["arguments"] for call in chat.turns[number].get("tool_calls", ())]
    if calls and any(isinstance(one, dict) and one and str(one) in text.raw for one in calls):
        missing.add("tool_calls")
    return missing


CHAT = RowReader(
    columns=_columns,
    check=lambda source, row: None,
    prompt=None,
    encode=_encode,
    optional=_optional,
)
"""For messages, sharegpt and alpaca."""
