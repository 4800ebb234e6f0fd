"""A chat template as a program: turns in, text out.

It runs as transformers runs it, in its sandbox and with its functions. Of a template that writes
turn by turn, one rendering gives those of all beginnings of the conversation too: what it has
written before a turn, and behind that what it writes behind the last turn of any conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _plain_template_data,
)

from raytune_ft.data.formats.conversation import Turn, is_bare

Span = tuple[int, int]
"""Characters of a text, from the first to behind the last."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BEGUN = "_turn_begins"
"""The variable that a template writes at each turn and behind the last one."""
_MARK = "".join(["turn ", "begins"])
"""Its value, which is told from what conversations say by its identity."""


@dataclass(frozen=True)
class Rendering:
    """What a template wrote.

    Attributes:
        marks: the spans between {% generation %} and its end.
        begins: where each turn that the template goes through begins, and what stands behind the
            last one; None if the template does not write turn by turn.
    """

    text: str
    marks: list[Span]
    begins: list[int] | None = None


class Program:
    """One chat template, with the texts of the special tokens that it may write."""

    def __init__(self, source: str, words: Mapping[str, Any], marked: bool) -> None:
        """`marked`: to find what the template marks with {% generation %}."""
        self._template, self._by_turn = _compiled(source)
        self.marked = marked and _GENERATION.search(source) is not None
        self._words = _plain_template_data(dict(words))
        self._behind: dict[bool, str] = {}

    def render(self, turns: Sequence[Turn], tools: Any, prompt: bool) -> Rendering:
        """Turns and tools are those of `plain`. Raises whatever the template raises."""
        blocks, marks, begins = list[str](), list[Span](), list[int]()
        values = {
            "messages": turns,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._words,
            _BEGUN: _MARK,
        }
        tracked = (
            self._template.environment.activate_tracker(blocks, marks)  # type: ignore[attr-defined]
            if self.marked
            else nullcontext()
        )
        size = 0
        with tracked:
            for block in self._template.generate(values):
                if block is _MARK:
                    begins.append(size)
                else:
                    blocks.append(block)
                    size += len(block)
        text = "".join(blocks)
        if not self._by_turn:
            return Rendering(text, marks)
        self._behind[prompt] = text[begins[-1] :]
        return Rendering(text, marks, begins)

    def beginning(
        self, whole: Rendering, turns: Sequence[Turn], count: int, tools: Any, prompt: bool
    ) -> Rendering:
        """The rendering of the first `count` of `turns`, whose rendering without a prompt is
        `whole`, by turns. Raises whatever the template raises.
        """
        assert whole.begins is not None
        if prompt not in self._behind:
            self.render(turns, tools, prompt)
        # A template may write the first turn before it goes through the others.
        stop = whole.begins[count - (len(turns) - (len(whole.begins) - 1))]
        marks = [span for span in whole.marks if span[1] <= stop]
        return Rendering(whole.text[:stop] + self._behind[prompt], marks)


@lru_cache
def _compiled(source: str) -> tuple[Template, bool]:
    """The template, and whether it writes turn by turn."""
    template: Template = _compile_jinja_template(source)
    tree = turn_by_turn(template.environment.parse(source))
    return (template, False) if tree is None else (template.environment.from_string(tree), True)


def plain(value: Any) -> Any:
    """The value in types of JSON, as a template is given it."""
    return _plain_template_data(value)


def plain_turn(turn: Turn) -> Turn:
    """The same, with the reasoning under each of its names."""
    if is_bare(turn):
        return turn
    (found,) = _alias_reasoning_fields([_plain_template_data(turn)])
    made: Turn = found
    return made


def turn_by_turn(tree: nodes.Template) -> nodes.Template | None:
    """The template with `_BEGUN` written at each turn and behind the last one, if it can be seen
    that it writes turn by turn: what it writes of a turn depends on none behind it, and what it
    writes behind the last one on no turn. Else None.

    So there is one loop over the turns, which is not nested. Before and in it, of all turns only
    the first one is read; in it, of the state of the loop only what is known of the turns so far.
    What stands behind it reads nothing that turns have set.
    """
    aliases = {_name(node.target) for node in tree.find_all(nodes.Assign) if _renames(node)}
    over = {MESSAGES, *aliases}
    found = [n for n, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    found = [n for n in found if _name(tree.body[n].iter) in over]  # type: ignore[attr-defined]
    if len(found) != 1:
        return None
    (at,) = found
    loop, head, tail = tree.body[at], tree.body[:at], tree.body[at + 1 :]
    assert isinstance(loop, nodes.For)
    written = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    written |= {node.name for node in tree.find_all(nodes.Macro)}
    if (
        loop.test is not None
        or loop.else_
        or loop.recursive
        or not isinstance(loop.target, nodes.Name)
        or {MESSAGES, PROMPT, "loop", "namespace"} & written
        or any(tree.find_all(_ELSEWHERE))
        or any(_reads(node, {PROMPT}) for node in (*head, loop))
        or not all(isinstance(node, _CONSTANT) for one in tail for node in _all_of(one))
        or any(_reads(node, {MESSAGES, "tools", "documents", *written}) for node in tail)
    ):
        return None
    for node, parents in _below(tree, ()):
        name, parent = _name(node), parents[-1] if parents else tree
        if name in over:
            iterated = parent is loop and node is loop.iter
            renamed = any(isinstance(one, nodes.Assign) and _renames(one) for one in parents)
            first = isinstance(parent, nodes.Getitem) and _constant(parent.arg) == 0
            if not (iterated or renamed or (first and name == MESSAGES)):
                return None
        elif name == "loop" and not _known_so_far(parent):
            return None
    loop.body.insert(0, nodes.Output([nodes.Name(_BEGUN, "load")]))
    tree.body.insert(at + 1, nodes.Output([nodes.Name(_BEGUN, "load")]))
    return tree


MESSAGES, PROMPT = "messages", "add_generation_prompt"

_ELSEWHERE = (
    nodes.Block,
    nodes.Break,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
)
"""Nodes that leave the loop, or read other files."""
_CONSTANT = (
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.Const,
    nodes.Name,
    nodes.CondExpr,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Add,
    nodes.Concat,
    nodes.Compare,
    nodes.Operand,
    nodes.Test,
)
"""Nodes of what writes the same behind any conversation, if its names do not change."""


def _all_of(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _all_of(child)


def _below(
    node: nodes.Node, parents: tuple[nodes.Node, ...]
) -> Iterator[tuple[nodes.Node, tuple[nodes.Node, ...]]]:
    """(node, those that it is in, the nearest last)."""
    for child in node.iter_child_nodes():
        yield child, (*parents, node)
        yield from _below(child, (*parents, node))


def _reads(node: nodes.Node, names: set[str]) -> bool:
    return any(_name(one) in names for one in _all_of(node))


def _name(node: nodes.Node) -> str | None:
    return node.name if isinstance(node, nodes.Name) else None


def _constant(node: nodes.Node | None) -> Any:
    return node.value if isinstance(node, nodes.Const) else None


def _renames(node: nodes.Assign) -> bool:
    """Whether it gives `messages`, or `messages[1:]`, another name."""
    turns = node.node
    if isinstance(turns, nodes.Getitem) and isinstance(turns.arg, nodes.Slice):
        cut = turns.arg
        if _constant(cut.start) != 1 or cut.stop is not None or cut.step is not None:
            return False
        turns = turns.node
    return isinstance(node.target, nodes.Name) and _name(turns) == MESSAGES


def _known_so_far(parent: nodes.Node) -> bool:
    """Whether what is read of `loop` depends on no turn behind."""
    read = None
    if isinstance(parent, nodes.Getattr):
        read = parent.attr
    elif isinstance(parent, nodes.Getitem):
        read = _constant(parent.arg)
    return read in ("first", "index", "index0", "previtem")
