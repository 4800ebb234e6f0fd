"""Pairs of answers to one prompt, of which one is better.

Files write them in four ways, which are told apart row by row:

- texts: `prompt`, `chosen` and `rejected`;
- turns: `chosen` and `rejected` are lists of turns behind the turns of `prompt`;
- whole conversations in `chosen` and `rejected`, whose common beginning is the prompt;
- LLaMA-Factory's: `conversations`, or `instruction` and `input`, with the answers in `chosen` and
  `rejected`, each a turn or a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.conversation import SPEAKERS, parsed
from raytune_ft.data.formats.example import Encoder, Example, RowReader, bad_text
from raytune_ft.data.formats.prompt_completion import PROMPT_COMPLETION
from raytune_ft.data.rows import BadRow, Row, number_of
from raytune_ft.data.split import PARTS

MARGIN = "margin"
"""Column of examples: how much better the chosen answer is."""
BESIDE = ("conversations", "instruction", "input", "system")
"""Columns of LLaMA-Factory's files that hold the prompt."""


def _columns(source: SourceConfig) -> dict[str, str]:
    margin = {} if source.margin is None else {"margin": source.margin}
    return {"chosen": source.chosen, "rejected": source.rejected, **margin}


def _optional(source: SourceConfig) -> tuple[str, ...]:
    tools = () if source.tools is None else (source.tools,)
    return (source.prompt, *BESIDE, *tools)


def _prompt(source: SourceConfig, row: Row) -> str:
    asked, _, _ = _parts(source, row)
    if not isinstance(asked, list):
        return str(asked)
    return "\n".join(str(turn.get("content") or "") for turn in asked if isinstance(turn, dict))


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    asked, chosen, rejected = _parts(source, row)
    if chosen == rejected:
        return BadRow(row.origin, "same_answers", f"{source.chosen!r} is {source.rejected!r}")
    if source.margin is not None and number_of(row.values[source.margin]) is None:
        shown = repr(row.values[source.margin])[:40]
        return BadRow(row.origin, "bad_margin", f"{shown} is not a number")
    if isinstance(chosen, list) != isinstance(rejected, list):
        detail = f"one of {source.chosen!r} and {source.rejected!r} is a list of turns"
        return BadRow(row.origin, "wrong_type", detail)
    if not isinstance(chosen, list):
        if asked is None:
            detail = f"{source.prompt!r} has no value, and answers that are texts need it"
            return BadRow(row.origin, "empty", detail)
        texts = Row(row.origin, {**row.values, source.prompt: asked})
        found = (bad_text(texts, name) for name in (source.prompt, source.chosen, source.rejected))
        return next(filter(None, found), None)
    if not asked:
        detail = f"{source.prompt!r} has no value, and the answers have no common beginning"
        return BadRow(row.origin, "empty", detail)
    for name, turns in ((source.chosen, chosen), (source.rejected, rejected)):
        if not turns:
            return BadRow(row.origin, "empty", f"{name!r} has no turn behind the prompt")
        if isinstance(turns[0], dict) and turns[0].get("role") in ASKING:
            detail = f"{name!r} begins with a turn of the {turns[0]['role']} behind the prompt"
            return BadRow(row.origin, "prompts_differ", detail)
    return None


ASKING = ("system", "developer", "user")
"""Roles of turns that belong to a prompt."""


def prompt_of(source: SourceConfig, row: Row) -> Any:
    """The prompt of a sound row: a text, or a list of turns."""
    return _parts(source, row)[0]


def _parts(source: SourceConfig, row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected answer: texts, or lists of turns."""
    values = row.values
    chosen, rejected = _answers(values[source.chosen], values[source.rejected])
    asked = _turns(values.get(source.prompt))
    if asked is None:
        asked = _prompt_beside(values)
    elif isinstance(values.get("system"), str) and values["system"].strip():
        asked = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
        if asked[0]["role"] != "system":
            asked = [{"role": "system", "content": values["system"]}, *asked]
    whole = isinstance(chosen, list) and isinstance(rejected, list)
    repeated = whole and all(each[: len(asked or ())] == asked for each in (chosen, rejected))
    if isinstance(asked, list) and not repeated:
        return asked, _as_turns(chosen), _as_turns(rejected)
    if not whole:
        return asked, chosen, rejected
    pairs = zip(chosen, rejected, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if isinstance(asked, str) and not any(turn.get("role") == "user" for turn in chosen[:common]):
        return [{"role": "user", "content": asked}], chosen, rejected
    return chosen[:common], chosen[common:], rejected[common:]


def _answers(chosen: Any, rejected: Any) -> tuple[Any, Any]:
    """As turns where they are turns; texts that are JSON only where both hold turns."""
    found = _turns(chosen), _turns(rejected)
    texts = isinstance(chosen, str), isinstance(rejected, str)
    if all(texts) and not all(isinstance(each, list) for each in found):
        return chosen, rejected
    return found


def _prompt_beside(values: dict[str, Any]) -> Any:
    """The prompt of LLaMA-Factory's files as turns; None where there is none."""
    system = values.get("system")
    first = [{"role": "system", "content": system}] if system else []
    turns = _turns(values.get("conversations"))
    if isinstance(turns, list) and turns:
        return [*first, *turns]
    parts = [values.get("instruction"), values.get("input")]
    if not all(part is None or isinstance(part, str) for part in parts) or not parts[0]:
        return None
    return [*first, {"role": "user", "content": "\n".join(filter(None, parts))}]


def _turns(value: Any) -> Any:
    """Turns in OpenAI's form, of which one alone is a list of one; anything else as it is."""
    found = parsed(value)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(map(_is_turn, found)):
        return value
    return [
        {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if "from" in turn
        else {key: each for key, each in turn.items() if each is not None}
        for turn in found
    ]


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    named = value.get("role", value.get("from"))
    said = any(key in value for key in ("content", "value", "tool_calls"))
    return isinstance(named, str) and said


def _as_turns(answer: Any) -> Any:
    """An answer behind turns; a text is a turn of the assistant."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """An example of two sequences for each row, prompt and chosen, prompt and rejected."""
    chosen, rejected = list[Row](), list[Row]()
    for row in rows:
        asked, *answers = _parts(source, row)
        tools = {} if source.tools is None else {"tools": row.values.get(source.tools)}
        for side, answer in zip((chosen, rejected), answers, strict=True):
            side.append(Row(row.origin, {"prompt": asked, "completion": answer, **tools}))
    sides = [_answered(encoder, source, separator, side) for side in (chosen, rejected)]
    return [_paired(source, *one) for one in zip(rows, *sides, strict=True)]


def _answered(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Prompt and completion of each row, with loss on the completion. Of a completion of several
    turns all are learnt as the whole conversation has them.
    """
    made: dict[int, Example | BadRow] = {}
    for turns in ("last", "all"):
        own = [row for row in rows if (_trained(row) > 1) == (turns == "all")]
        one = source.model_copy(
            update={
                "format": "prompt_completion",
                "prompt": "prompt",
                "completion": "completion",
                "tools": "tools",
                "turns": turns,
            }
        )
        encoded = PROMPT_COMPLETION.encode(encoder, one, separator, own)
        made |= zip(map(id, own), encoded, strict=True)
    return [made[id(row)] for row in rows]


def _trained(row: Row) -> int:
    answer = row.values["completion"]
    turns = answer if isinstance(answer, list) else []
    return sum(turn.get("role") == "assistant" for turn in turns)


def _paired(
    source: SourceConfig, row: Row, chosen: Example | BadRow, rejected: Example | BadRow
) -> Example | BadRow:
    if isinstance(chosen, BadRow) or isinstance(rejected, BadRow):
        return chosen if isinstance(chosen, BadRow) else rejected
    margin = None if source.margin is None else number_of(row.values[source.margin])
    return Example(
        row.origin,
        np.concatenate([chosen.ids, rejected.ids]),
        np.concatenate([chosen.mask, rejected.mask]),
        columns={
            PARTS: (float(len(chosen.ids)), float(len(rejected.ids))),
            **({} if margin is None else {MARGIN: (margin,)}),
        },
        ends=(*chosen.ends, *rejected.ends),
        lost=tuple(sorted({*chosen.lost, *rejected.lost})),
        notes=tuple(sorted({*chosen.notes, *rejected.notes} - {"untrained_turn"})),
    )


PREFERENCE = RowReader(
    columns=_columns, check=_check, prompt=_prompt, encode=_encode, optional=_optional
)
