"""A tokenizer's chat template: turns become text, and the trained turns are found in it.

A turn is trained on as the model would be shown it when it answers: the rendering of the turns
before it, with the header that prompts the assistant, and then the turn as the template writes it
while it is the last one. Many templates write a turn differently once others follow: they cut its
reasoning, or end it with another token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from raytune_ft.data.formats.conversation import Conversation, Turn
from raytune_ft.data.formats.example import Encoder
from raytune_ft.data.formats.rendering import Program, Rendering, Span, plain, plain_turn
from raytune_ft.errors import first_line

EXACT = 24
"""Trained turns of a conversation up to which each is rendered as the last of all before it."""
WINDOW = 8
"""Turns before a trained one that are rendered with it in longer conversations."""
CHECKED = 8
"""Turns of a longer conversation that are rendered in full, to check the windows."""
GAP = 200
"""Most characters between the header of the assistant and its content."""

_USER: Turn = {"role": "user", "content": "Whence"}
_ANSWER: Turn = {"role": "assistant", "content": "Yonder"}
_OTHER = "Zebrawood"
"""Stands in for the content of a turn, to see where the template writes it."""


class Unwritten(Exception):
    """The template raises on these turns."""


@dataclass(frozen=True)
class Place:
    """A turn in the rendering that ends with it: `spans` are the characters that carry loss."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Text:
    """A rendering to train on: the spans of each of its turns that carry loss."""

    text: str
    turns: dict[int, tuple[Span, ...]]

    @property
    def spans(self) -> list[Span]:
        """The characters that carry loss, in order."""
        return sorted(chain.from_iterable(self.turns.values()))

    def said(self, number: int) -> str:
        """The text of a turn that carries loss."""
        return "".join(self.text[start:stop] for start, stop in self.turns[number])


class Template:
    """The chat template of a tokenizer, for sources that train on these roles."""

    def __init__(self, encoder: Encoder, roles: Sequence[str]) -> None:
        self.tokenizer, self.special = encoder.tokenizer, encoder.special
        self.roles = tuple(roles)
        self.added, self._longest = encoder.added
        self._programs: dict[bool, Program] = {}
        self.forget()

    def forget(self) -> None:
        """What was rendered of one row is not needed for the next one."""
        self._rendered: dict[tuple[Any, ...], tuple[list[Turn], Rendering]] = {}
        self._by_turn: list[tuple[list[Turn], Any, list[Turn], Rendering]] = []
        self._plain: dict[int, tuple[Any, Any]] = {}

    def render(self, turns: list[Turn], tools: Any, prompt: bool = False) -> tuple[str, list[Span]]:
        """(text, spans that the template marks). `prompt` adds the header of the assistant.

        Renderings of a row are kept until `forget`, and the caller does not change turns meanwhile.
        Of a template that writes turn by turn, the beginnings of a rendered conversation are cut
        from it.

        Raises:
            Unwritten: the template raises, or there is no turn.
        """
        if not turns:
            raise Unwritten("there is no turn")
        key = (id(tools), prompt, *map(id, turns))
        if key not in self._rendered:  # the turns are kept, so that their ids stay theirs
            self._rendered[key] = (list(turns), self._render(turns, tools, prompt))
        found = self._rendered[key][1]
        return found.text, found.marks

    def _render(self, turns: list[Turn], tools: Any, prompt: bool) -> Rendering:
        try:
            program, given = self._program(tools), self._in_json(tools, plain)
            for longer, of_tools, said, whole in self._by_turn:
                begins = len(longer) >= len(turns) and all(map(operator.is_, turns, longer))
                if begins and of_tools is tools:
                    return program.beginning(whole, said, len(turns), given, prompt)
            said = [self._in_json(turn, plain_turn) for turn in turns]
            made = program.render(said, given, prompt)
            if made.begins is not None and not prompt:
                self._by_turn.append((list(turns), tools, said, made))
            return made
        except Exception as error:  # a template is a program, and may raise anything
            raise Unwritten(first_line(error) or type(error).__name__) from error

    def _in_json(self, value: Any, convert: Callable[[Any], Any]) -> Any:
        """The value as templates are given it; each is converted once for a row."""
        if id(value) not in self._plain:
            self._plain[id(value)] = (value, convert(value))
        return self._plain[id(value)][1]

    def _program(self, tools: Any) -> Program:
        """The template; of several, the one that fits the tools."""
        if bool(tools) not in self._programs:
            source: Any = self.tokenizer.chat_template
            if not isinstance(source, str):
                wanted = ("tool_use", "default") if tools else ("default",)
                name = next((name for name in wanted if name in source), next(iter(source)))
                source = str(source[name])
            marked = self.roles == ("assistant",)
            words = self.tokenizer.special_tokens_map
            self._programs[bool(tools)] = Program(source, words, marked)
        return self._programs[bool(tools)]

    def marked(self, tools: Any) -> bool:
        """Whether the template marks what carries loss, with {% generation %}."""
        return self._program(tools).marked

    def common(self, a: str, b: str) -> int:
        """Length of the common beginning of two texts; it cuts no added token in two."""
        length = shared(a, b)
        if length == len(a) == len(b):
            return length
        for text in (a, b):
            begin, end = max(0, length - self._longest), length + self._longest
            for found in self.added.finditer(text, begin, end):
                if found.start() >= length:
                    break
                if found.end() > length:
                    length = found.start()
                    break
        return length

    def ends_only(self, text: str) -> bool:
        """Whether the text is only what ends a turn: special tokens and blanks."""
        text = text.strip()
        if text in (self.end.strip(), self.end_inside.strip()):
            return True
        return self.special.match(text) is not None and not self.special.sub("", text)

    def ended(self, text: str) -> bool:
        """Whether the text ends with a special token, or what the template writes behind a turn."""
        text, end = text.rstrip(), self.end_inside.strip()
        matches = self.special.finditer(text, max(0, len(text) - self._longest))
        return any(one.end() == len(text) for one in matches) or bool(end and text.endswith(end))

    @cached_property
    def header(self) -> str:
        """What the template writes to prompt the assistant, such as `<|assistant|>`."""
        try:
            bare, _ = self.render([_USER], None)
            prompted, _ = self.render([_USER], None, prompt=True)
        except Unwritten:
            return ""
        return prompted.removeprefix(bare) if prompted.startswith(bare) else ""

    @cached_property
    def _behind_answers(self) -> tuple[str, str, str]:
        """(end, end inside, trail): behind the last answer of a conversation, behind one that a
        question follows, and the header of the next turn where the template writes it unasked.
        """
        question, word = _USER["content"], _ANSWER["content"]
        try:
            bare, _ = self.render([_USER], None)
            prompted, _ = self.render([_USER], None, prompt=True)
            answered, _ = self.render([_USER, _ANSWER], None)
            followed, _ = self.render([_USER, _ANSWER, _USER], None)
        except Unwritten:
            return "", "", ""
        last = answered.rpartition(word)[2]
        before, between = bare.partition(question)[0], followed.partition(word)[2]
        between = between.partition(question)[0]
        # What stands before both questions is the header of the user, and what ends a turn before
        # it if the template begins with a system turn of its own.
        inside = between[: len(between) - shared(before[::-1], between[::-1])]
        first = re.match(rf"(?:{self.added.pattern})\s*", between)
        if not inside:
            inside = (
                first[0] if bare == prompted and first else between[: self.common(last, between)]
            )
        if bare == prompted and last.startswith(inside):
            return inside, inside, last.removeprefix(inside)
        return last, inside, ""

    @property
    def end(self) -> str:
        """What the template writes behind the last answer."""
        return self._behind_answers[0]

    @property
    def end_inside(self) -> str:
        """What the template writes behind an answer that a question follows."""
        return self._behind_answers[1]

    @property
    def trail(self) -> str:
        """The header of the next turn, where the template writes it whether asked or not."""
        return self._behind_answers[2]


def shared(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(a), len(b))
    if a.startswith(b) or b.startswith(a):
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a.startswith(b[low:middle], low) else (low, middle - 1)
    return low


class Dialogue:
    """One conversation as a template writes it.

    Attributes:
        chat: the conversation.
        whole: the rendering of all turns.
        trained: numbers of the turns that carry loss.
        texts: renderings in which the trained turns stand as the model would be shown them. The
            first is `whole`, if it has one; each other one ends with a turn that stands in none
            before it.

    Raises:
        Unwritten: the template raises on the whole.
    """

    def __init__(self, template: Template, chat: Conversation) -> None:
        self.template, self.chat, self.turns, self.tools = template, chat, chat.turns, chat.tools
        self.trained = [number for number, kept in enumerate(chat.trained) if kept]
        self.whole, self._marks = template.render(self.turns, self.tools)
        self._places: dict[int, Place | None] = {}
        find = self._exactly if len(self.trained) <= EXACT else self._by_windows
        in_whole = find(self.whole, self.trained)
        texts = []
        left = [number for number in self.trained if number not in in_whole]
        while left:
            last = left.pop()
            place = self.place(last)
            if place is None:  # the template refuses it as the last turn
                in_whole[last] = self.anywhere(last)
                continue
            found = find(place.text, left)
            texts.append(Text(place.text, found | {last: place.spans}))
            left = [number for number in left if number not in found]
        self.texts = [Text(self.whole, in_whole)] * bool(in_whole) + texts

    def _exactly(self, text: str, numbers: Sequence[int]) -> dict[int, tuple[Span, ...]]:
        """The spans of those turns that stand in a text as in the renderings that end with them."""
        places = {number: self.place(number) for number in numbers}
        spans = {n: self.within(place, text) for n, place in places.items() if place is not None}
        return {number: found for number, found in spans.items() if found is not None}

    def _by_windows(self, text: str, numbers: Sequence[int]) -> dict[int, tuple[Span, ...]]:
        """As `_exactly`, in time linear in the number of turns: the last of them that stand there.

        Each turn is rendered behind the first question and the few turns before it, and that is
        searched in the text, from its end. Some are rendered behind all turns before them, to
        check; if one of these stands elsewhere, all are.
        """
        found: dict[int, tuple[Span, ...]] = {}
        cursor, header = len(text), self.template.header
        for number in reversed(numbers):
            place = self._in_window(number)
            if place is None or not place.spans:
                break
            start, stop = place.spans[0][0], place.spans[-1][1]
            lead = len(header) if place.text.endswith(header, 0, start) else 0
            said, end = place.text[start - lead : stop], self.template.end
            if number < len(self.turns) - 1 and end.startswith(self.template.end_inside):
                said = said.removesuffix(end) + self.template.end_inside * said.endswith(end)
            at = text.rfind(said, 0, cursor)
            behind = text[at + len(said) : cursor]
            if at < 0 or (found and header and header in behind):
                break
            shift = at + lead - start
            found[number] = tuple(
                (a + shift, min(b + shift, at + len(said))) for a, b in place.spans
            )
            cursor = at
        known = list(found)
        checked = {*known[:1], *known[-1:], *known[:: max(1, len(known) // CHECKED)]}
        exact = self._exactly(text, sorted(checked))
        if all(exact.get(number) == found[number] for number in checked):
            return found
        return self._exactly(text, numbers)

    def _in_window(self, number: int) -> Place | None:
        """A turn in the rendering of the first question, the few turns before it, and itself."""
        roles = [turn["role"] for turn in self.turns]
        head = roles.index("user") + 1 if "user" in roles else 0
        first = next(
            (n for n in range(max(head, number - WINDOW), number) if roles[n] == "assistant"),
            number,
        )
        if not head or number < head:
            return self.place(number)
        return self._place_of_last([*self.turns[:head], *self.turns[first : number + 1]])

    def place(self, number: int) -> Place | None:
        """A turn in the rendering that ends with it; None if the template refuses that."""
        if number not in self._places:
            self._places[number] = self._place_of_last(self.turns[: number + 1])
        return self._places[number]

    def _place_of_last(self, turns: list[Turn]) -> Place | None:
        template, assistant = self.template, turns[-1]["role"] == "assistant"
        text, marks = self.whole, self._marks
        if len(turns) < len(self.turns):
            try:
                text, marks = template.render(turns, self.tools)
            except Unwritten:
                return None
        before, start = None, 0
        with suppress(Unwritten):
            before, _ = template.render(turns[:-1], self.tools, prompt=assistant)
            start = template.common(before, text)
        stop = len(text.removesuffix(template.trail)) if assistant else len(text)
        if before is None or start < len(before) - self._optional(before, assistant):
            found = self._content(text, turns, len(turns) - 1)
            if found is None:
                return None
            start = found[0]
            if before is not None and assistant:
                # The template writes what came before in another way once it is answered, such as
                # Mistral's, which writes the system turn with the last question alone.
                blanks = start - len(text[:start].rstrip())
                start = max(
                    range(start - blanks, start + 1),
                    key=lambda at: shared(text[:at][::-1], before[::-1]),
                )
                shift = len(before) - start
                text = before + text[start:]
                marks = [(a + shift, b + shift) for a, b in marks]
                start, stop = start + shift, stop + shift
        if template.marked(self.tools):
            return Place(text, tuple((max(a, start), b) for a, b in marks if b > start))
        return Place(text, ((start, max(start, stop)),))

    def _optional(self, before: str, assistant: bool) -> int:
        """Characters at the end of a prompt that the answer need not begin with: some templates
        prompt with more than the header, such as an opened <think>.
        """
        header = self.template.header if assistant else ""
        return len(header) if before.endswith(header) else 0

    def _content(self, text: str, turns: list[Turn], number: int) -> Span | None:
        """Where a turn stands in the rendering `text`, without what ends it; found by writing
        another content.
        """
        template, role = self.template, turns[number]["role"]
        parts = isinstance(turns[number].get("content"), list)
        content = [{"type": "text", "text": _OTHER}] if parts else _OTHER
        swapped = [*turns[:number], {"role": role, "content": content}, *turns[number + 1 :]]
        try:
            other, _ = template.render(swapped, self.tools)
        except Unwritten:
            return None
        start = template.common(text, other)
        if not other.startswith(_OTHER, start):
            return None
        behind = other[start + len(_OTHER) :]
        same = shared(text[::-1], behind[::-1])
        stop = max(start, len(text) - same)
        if role == "assistant" and template.header:
            # The header belongs to the turn if nothing of another turn stands behind it.
            header = text.rfind(template.header, max(0, start - GAP - len(template.header)), start)
            between = text[header + len(template.header) : start]
            others = (str(turn.get("content") or "").strip() for turn in turns[:number])
            if header >= 0 and not any(other and other in between for other in others):
                start = header + len(template.header)
        return start, stop

    def within(self, place: Place, text: str) -> tuple[Span, ...] | None:
        """The spans of a place in `text`, up to where its turn ends there, if the text begins as
        the rendering of the place does, up to the end of its turn; else None.
        """
        if not place.spans:
            return () if text.startswith(place.text) else None
        (start, _), (_, stop) = place.spans[0], place.spans[-1]
        shared = self.template.common(place.text, text)
        if shared < stop:
            rest = place.text[shared:stop]
            if shared < start or not self.template.ends_only(rest):
                return None
            # Phi-3 writes <|end|> behind each answer, and <|endoftext|> too behind the last one.
            if rest.strip() and not self.template.ended(text[start:shared]):
                return None
        return tuple((start, min(stop, shared)) for start, stop in place.spans)

    def anywhere(self, number: int) -> tuple[Span, ...]:
        """The spans of a turn in `whole`, however it is written there; none if it is not."""
        if self.template.marked(self.tools):
            said = [n for n, turn in enumerate(self.turns) if turn["role"] == "assistant"]
            return (self._marks[said.index(number)],) if len(said) == len(self._marks) else ()
        found = self._content(self.whole, self.turns, number)
        if found is None:
            return ()
        start, stop = found
        for end in (self.template.end, self.template.end_inside):
            if self.whole.startswith(end, stop):
                return ((start, stop + len(end)),)
        return ((start, stop),)
