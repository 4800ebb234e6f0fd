"""Prompts to be answered, with the columns of their rows, which rewards read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raytune_ft.config.data import (
    FORMATS,
    DataConfig,
    SourceConfig,
    listed,
    source_configs,
)
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config
from raytune_ft.data.formats import Encoder, found_format
from raytune_ft.data.formats.conversation import Conversation, conversation_of
from raytune_ft.data.formats.preference import prompt_of
from raytune_ft.data.formats.prompt import Prompt, read_prompt
from raytune_ft.data.formats.rationale import RATIONALE
from raytune_ft.data.prepare import use_chat_template
from raytune_ft.data.prepared import PreparedData, derived, write_rows
from raytune_ft.data.report import SplitReport, length_counts, source_counts
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.sources import open_source
from raytune_ft.data.split import Mask, TokenIds, TokenizedSplit, first_answer
from raytune_ft.errors import DataError, RunFailed
from raytune_ft.files import sha256_of
from raytune_ft.layout import prompts_file, rows_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def of_split(
    data: DataConfig, prepared: PreparedData, name: str, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """The prompt of each row of a split: the tokens before the first that carries loss. Of a row
    with several examples it is the first one's. `prepared` is what `prepare_data` made of `data`.

    Raises:
        DataError: the rows have no prompts, cannot be read, or are no longer there.
        RunFailed: the file of the split's rows cannot be read.
    """
    return [one for one, _ in _of_split(data, prepared, name, tokenizer)]


def _of_split(
    data: DataConfig, prepared: PreparedData, name: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Prompt, int]]:
    """Each prompt with the number of the example in the split that it is from."""
    use_chat_template(tokenizer, data)
    encoder, split = Encoder.of(tokenizer), prepared.all_splits[name]
    rationale = split.columns.get(RATIONALE)
    first: dict[int, int] = {}
    for number, row_number in enumerate(prepared.rows(name).tolist()):
        if rationale is None or rationale[number, 0] != 1:
            first.setdefault(row_number, number)
    drawn = name == "validation" and isinstance(data.validation, float)
    found, place = dict[int, Prompt](), 0
    for label, written in source_configs(data).items():
        if label.partition(".")[0] != ("train" if drawn else name):
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
        for row in opened.all_rows():
            if place in first and isinstance(row, Row):
                found[place] = _prompt_of(*split.example(first[place]), row, source, encoder)
            place += 1
    if len(found) < len(first):
        raise DataError(
            f"data.{name}", "changed after it was tokenised", "write it once, then start again"
        )
    return [(found[row_number], number) for row_number, number in first.items()]


def _prompt_of(
    ids: TokenIds, mask: Mask, row: Row, source: SourceConfig, encoder: Encoder
) -> Prompt:
    if FORMATS[source.format].prompts:
        prompt = read_prompt(row, source, "", encoder)
        assert isinstance(prompt, Prompt)
        return replace(prompt, ids=tuple(ids.tolist()))
    answer = first_answer(mask)
    prompt = Prompt(
        row.origin,
        tuple(ids[: answer.start].tolist()),
        tuple(ids[answer].tolist()),
        row.values,
    )
    return replace(prompt, **_as_written(source, row))


def _as_written(source: SourceConfig, row: Row) -> dict[str, Any]:
    """`turns` or `text` of a prompt."""
    if source.format == "preference":
        asked = prompt_of(source, row)
        return {"turns": tuple(asked)} if isinstance(asked, list) else {"text": str(asked)}
    is_chat = FORMATS[source.format].chat_template
    if is_chat or isinstance(row.values.get(source.prompt), list):
        read = source if is_chat else source.model_copy(update={"format": "prompt_completion"})
        chat = conversation_of(read, row)
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
    made = [read_prompt(row, source, data.separator, encoder) for row in rows]
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


def prompted(
    config: Config, prepared: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """The data of a run in which the model answers prompts, with a file beside each split that is
    answered which holds the prompts and their rows.

    Where the objective learns from the answers, every example of the splits becomes a prompt
    without a label token. Under `train.watch` alone, the validation prompts are written.

    Raises:
        DataError: the rows have no prompts.
        StorageError: the files cannot be written.
    """

    def add(folder: Path) -> dict[str, Any]:
        splits, files, columns_of = {}, {}, {}
        row_files = dict(prepared.report.row_files)
        for name in prepared.report.splits if rolls else ("validation",):
            found = _of_split(config.data, prepared, name, tokenizer)
            if rolls:
                numbers = np.array([number for _, number in found])
                columns = prepared.all_splits[name].columns
                split = TokenizedSplit.from_examples(
                    [_without_answer(prompt) for prompt, _ in found],
                    {key: values[numbers] for key, values in columns.items()},
                )
                split.write(folder / f"{name}.arrow")
                path = folder / rows_file(name)
                row_files[name] = write_rows(path, prepared.rows(name)[numbers])
                splits[name] = _described(split, prepared.report.names, config.data.max_length)
            path = folder / prompts_file(name)
            lines = (json.dumps(asdict(prompt), default=str) + "\n" for prompt, _ in found)
            path.write_text("".join(lines), encoding="utf-8")
            files[name] = sha256_of(path)
            seen = dict.fromkeys(column for prompt, _ in found for column in prompt.columns)
            columns_of[name] = tuple(seen)
        return {
            "splits": {**prepared.report.splits, **splits},
            "row_files": row_files,
            "prompt_files": files,
            "prompt_columns": columns_of,
        }

    rolls = OBJECTIVES[config.train.objective].rollouts
    if not rolls and not config.train.watch:
        return prepared
    return derived(prepared, "prompts" if rolls else "validation prompts", add)


def _described(split: TokenizedSplit, names: Sequence[str], limit: int) -> SplitReport:
    numbers = split.source_numbers
    sources = {} if numbers is None else source_counts(numbers, names)
    counts = length_counts(split, limit)
    return SplitReport(len(split), len(split.input_ids), 0, split.sha256, sources, counts)


def _without_answer(prompt: Prompt) -> tuple[TokenIds, Mask]:
    ids = np.array(prompt.ids, np.int32)
    return ids, np.zeros(len(ids), np.bool_)


def prompts_of(data: PreparedData, split: str) -> Prompts:
    """The prompts of a split of the data. Raises RunFailed where their file cannot be read."""
    return Prompts(data.path / prompts_file(split))


class Prompts:
    """The prompts of a split, read from its file one by one."""

    def __init__(self, path: Path) -> None:
        """Raises RunFailed where the file cannot be read."""
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise RunFailed(f"{path} cannot be read as prompts: {error}") from error
        ends = np.flatnonzero(self._bytes == ord("\n")) + 1
        self._bounds: npt.NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), ends])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> Prompt:
        start, stop = self._bounds[number], self._bounds[number + 1]
        plain = json.loads(self._bytes[start:stop].tobytes())
        turns = plain["turns"]
        return Prompt(
            **plain
            | {
                "ids": tuple(plain["ids"]),
                "reference": tuple(plain["reference"]),
                "turns": None if turns is None else tuple(turns),
            }
        )
