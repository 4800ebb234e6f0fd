"""Prompts to be answered, with the columns of their rows, which rewards read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_ft.config.data import (
    FORMATS,
    DataConfig,
    NamedSource,
    SourceConfig,
    listed,
    source_configs,
    source_names,
)
from raytune_ft.data.formats import Encoder, Example, found_format
from raytune_ft.data.formats.conversation import Conversation, Turn, conversation_of, turns_column
from raytune_ft.data.formats.example import SpecialText, bad_text, is_rated
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.formats.template import Template, Unwritten
from raytune_ft.data.order import Drawable, hold_out
from raytune_ft.data.prepare import use_chat_template
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import open_source
from raytune_ft.data.split import first_answer
from raytune_ft.data.tokenise import tokenise
from raytune_ft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Prompt:
    """A prompt and its row.

    Attributes:
        ids: what the model is given, exactly as in training.
        reference: token ids of the row's completion; empty where it has none.
        columns: the values of the row.
        turns: the prompt as a conversation; None where it is a text.
        text: the prompt as the row has it; empty for conversations.
    """

    origin: str
    ids: tuple[int, ...]
    reference: tuple[int, ...]
    columns: dict[str, Any]
    turns: tuple[Turn, ...] | None = None
    text: str = ""

    @property
    def written(self) -> Any:
        """The prompt in a file of preferences: a text, or turns."""
        return self.text if self.turns is None else list(self.turns)


def of_split(
    data: DataConfig, name: str, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Prompt]:
    """The prompt of each usable row of a split, `validation` or `test`: the tokens before the first
    that carries loss. Of a row with several examples it is the first one's.

    Raises:
        DataError: the rows have no prompts, or cannot be read.
    """
    use_chat_template(tokenizer, data)
    encoder, names = Encoder.of(tokenizer), source_names(data)
    drawn = name == "validation" and isinstance(data.validation, float)
    split, rows, examples = "train" if drawn else name, dict[tuple[int, str], _Placed](), []
    for label, written in source_configs(data).items():
        if label.partition(".")[0] != split:
            continue
        opened = open_source(f"data.{label}", written)
        source = found_format(f"data.{label}", written, opened)
        facts = FORMATS[source.format]
        if facts.documents or facts.labels:
            raise DataError(
                f"data.{label}.format={source.format}",
                "has no prompts to answer",
                "write --prompts FILE with a column of prompts",
            )
        number = names.index(source.called) if isinstance(source, NamedSource) else 0
        found = tokenise(opened, source, data, encoder)
        examples += [replace(one, source=number) for one in found]
        for row in opened.all_rows():
            if isinstance(row, Row):
                rows[number, row.origin] = _Placed(source, row)
    if drawn:
        assert isinstance(data.validation, float)
        _, held = hold_out(drawable(examples), data.validation, seed, names)
        examples = [examples[i] for i in held]
    first: dict[tuple[int, str], Example] = {}
    for one in examples:
        if one.columns.get(RATIONALE) != (1.0,):
            first.setdefault((one.source, one.origin), one)
    return [_prompt_of(one, rows[key]) for key, one in first.items()]


def drawable(examples: Sequence[Example]) -> Drawable:
    """What a draw of validation examples depends on."""
    rows = dict[tuple[int, str], int]()
    for one in examples:
        rows.setdefault((one.source, one.origin), len(rows))
    rated = {one.source for one in examples if is_rated(one)}
    return Drawable(
        np.array([one.source for one in examples], np.int16),
        np.array([rows[one.source, one.origin] for one in examples], np.int64),
        np.array([one.prompt for one in examples], "S16") if rated else None,
        frozenset(rated),
    )


@dataclass(frozen=True)
class _Placed:
    source: SourceConfig
    row: Row


def _prompt_of(example: Example, placed: _Placed) -> Prompt:
    ids, answer = example.ids, first_answer(example.mask)
    prompt = Prompt(
        example.origin,
        tuple(ids[: answer.start].tolist()),
        tuple(ids[answer].tolist()),
        placed.row.values,
    )
    return replace(prompt, **_as_written(placed.source, placed.row))


def _as_written(source: SourceConfig, row: Row) -> dict[str, Any]:
    """`turns` or `text` of a prompt."""
    if FORMATS[source.format].chat_template or isinstance(row.values.get(source.prompt), list):
        chat = conversation_of(source, row)
        assert isinstance(chat, Conversation)
        trained = [number for number, kept in enumerate(chat.trained) if kept]
        end = trained[-1] if source.turns == "last" else trained[0]
        return {"turns": tuple(chat.turns[:end])}
    return {"text": str(row.values[source.prompt])}


def of_file(path: Path, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file whose rows need no completion. Columns are named as in the first source
    of the config; a prompt is a text or a list of turns.

    Raises:
        DataError: the file or one of its rows cannot be read.
    """
    shown = f"--prompts {path}"
    if not path.is_file():
        raise DataError(shown, "is no file", "write an existing .jsonl, .json, .csv or .parquet")
    use_chat_template(tokenizer, data)
    sources = [*listed(data.test), *listed(data.validation), *listed(data.train)]
    changes = {"path": str(path), "split": None, "subset": None, "columns": None}
    changes["revision"] = None
    source = sources[0].model_copy(update=changes)
    encoder = Encoder.of(tokenizer)
    opened = open_source("--prompts", source)
    rows = list(opened.all_rows())
    made = [_read(row, source, data.separator, encoder) for row in rows]
    bad = [one for one in made if isinstance(one, BadRow)]
    if bad:
        raise DataError(
            shown,
            f"has {len(bad)} unusable rows of {len(rows)} (the first is {bad[0].origin}: "
            f"{bad[0].detail})",
            "correct or remove them",
        )
    if not made:
        raise DataError(shown, "holds no rows", "write at least one prompt")
    return [one for one in made if isinstance(one, Prompt)]


def _read(
    row: Row | BadRow, source: SourceConfig, separator: str, encoder: Encoder
) -> Prompt | BadRow:
    if isinstance(row, BadRow):
        return row
    values = row.values
    column = next(
        (name for name in (source.prompt, turns_column(source)) if values.get(name)), None
    )
    if column is None:
        return BadRow(row.origin, "missing_column", f"no {source.prompt!r}")
    if not isinstance(values[column], str):
        return _of_turns(row, column, source, encoder)
    bad = bad_text(row, column)
    if bad is not None:
        return bad
    text = values[column]
    ids = encoder.encode([text + separator], source.special_tokens)[0]
    reference = values.get(source.completion)
    known = encoder.encode([reference])[0] if isinstance(reference, str) else []
    return Prompt(row.origin, (*encoder.prefix, *ids), tuple(known), values, text=text)


def _of_turns(row: Row, column: str, source: SourceConfig, encoder: Encoder) -> Prompt | BadRow:
    """A conversation; a last turn of the assistant is the answer that the row has."""
    if not encoder.tokenizer.chat_template:
        return BadRow(row.origin, "template", "the model's tokenizer has no chat template")
    value = row.values[column]
    asked: list[Any] = list(value) if isinstance(value, list) else []
    said = bool(asked) and isinstance(asked[-1], dict) and asked[-1].get("role") == ASSISTANT
    answer = asked.pop() if said else {"role": ASSISTANT, "content": "-"}
    chat = conversation_of(
        source.model_copy(update={"format": "messages", "messages": column}),
        Row(row.origin, {**row.values, column: [*asked, answer]}),
    )
    if isinstance(chat, BadRow):
        return chat
    turns = chat.turns[:-1]
    hidden = encoder.hide(turns) if source.special_tokens == "text" else turns
    try:
        text, _ = Template(encoder, (ASSISTANT,)).render(hidden, chat.tools, prompt=True)
        ids = encoder.example(row.origin, text, []).ids
    except (Unwritten, SpecialText) as error:
        return BadRow(row.origin, "template", str(error))
    content = answer.get("content")
    known = encoder.encode([content])[0] if said and isinstance(content, str) else []
    return Prompt(row.origin, tuple(ids.tolist()), tuple(known), row.values, tuple(turns))
