"""Texts with labels, with the special tokens that classifiers expect. Labels become targets once
those of all rows are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from raytune_ft.config.data import DataConfig, SourceConfig
from raytune_ft.data.formats.example import Encoder, Example, RowReader, bad_text
from raytune_ft.data.rows import BadRow, Row
from raytune_ft.data.split import Column
from raytune_ft.errors import DataError
from raytune_ft.format import some_of

TARGET = "target"
SECOND = "second"
"""Columns of examples: the class vector or the numbers, and where a second text begins."""
MAX_LABELS = 1000
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


def _columns(source: SourceConfig) -> dict[str, str]:
    pair = {"text_pair": source.text_pair} if source.text_pair is not None else {}
    return {"text": source.text, **pair, "label": source.label}


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    bad = bad_text(row, source.text)
    if bad is None and source.text_pair is not None:
        bad = bad_text(row, source.text_pair)
    if bad is not None:
        return bad
    value = row.values[source.label]
    if value is None or value == "":
        return BadRow(row.origin, "empty", f"{source.label!r} has no value")
    many = value if isinstance(value, list) else [value]
    if any(isinstance(one, float) and not math.isfinite(one) for one in many):
        return BadRow(row.origin, "bad_label", f"{source.label!r} is {value}")
    if not all(isinstance(one, str | int | float) for one in many):
        return BadRow(
            row.origin, "wrong_type", f"{source.label!r} is neither a label nor a list of labels"
        )
    return None


def _prompt(source: SourceConfig, row: Row) -> str:
    """The text or both texts."""
    texts = [column for column in (source.text, source.text_pair) if column is not None]
    return "\n".join(str(row.values[column]) for column in texts)


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """Texts with the tokenizer's own special tokens and no others."""
    if not rows:
        return []
    pair = source.text_pair
    encoded: Any = encoder.tokenizer(
        [row.values[source.text] for row in rows],
        None if pair is None else [row.values[pair] for row in rows],
        split_special_tokens=source.special_tokens == "text",
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    segments = encoded.get("token_type_ids") if pair is not None else None
    found: list[Example | BadRow] = []
    for i, row in enumerate(rows):
        ids = np.array(encoded["input_ids"][i], np.int32)
        special = np.array(encoded["special_tokens_mask"][i])
        value = row.values[source.label]
        columns = {}
        if segments is not None:
            second = segments[i].index(1) if 1 in segments[i] else len(ids)
            columns[SECOND] = (float(second),)
        found.append(
            Example(
                row.origin,
                ids,
                np.zeros(len(ids), np.bool_),
                columns=columns,
                labels=tuple(value) if isinstance(value, list) else (value,),
                kept=int(np.argmin(np.append(special[::-1], 0))),
            )
        )
    return found


CLASSIFICATION = RowReader(columns=_columns, check=_check, prompt=_prompt, encode=_encode)


def read_labels(example: Example, data: DataConfig) -> Example | BadRow:
    """The example with labels of the problem's type: names, or finite numbers."""
    assert example.labels is not None
    if data.problem == "regression":
        try:
            numbers = tuple(float(one) for one in example.labels)
        except ValueError:
            numbers = (math.nan,)
        if not numbers or not all(map(math.isfinite, numbers)):
            shown = ", ".join(map(str, example.labels))
            return BadRow(example.origin, "bad_label", f"{shown!r} is not a finite number")
        return replace(example, labels=numbers)
    names = tuple(_name(one) for one in example.labels)
    if data.problem == "single_label" and len(names) != 1:
        detail = f"{len(names)} labels where there is one (data.problem: multi_label takes several)"
        return BadRow(example.origin, "bad_label", detail)
    if data.problem == "multi_label" and len(names) == 1 and isinstance(example.labels[0], str):
        names = tuple(name.strip() for name in names[0].split(",") if name.strip())
    return replace(example, labels=names)


def _name(label: str | float) -> str:
    """Numbers that are equal are one label, whether a file writes 1 or 1.0."""
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole else str(label)


def _refuse_two_forms(found: set[str]) -> None:
    """Raises DataError where labels of train denote the same: 1 and 1.0 in texts, 1 and true."""
    forms: dict[float, str] = {}
    for name in sorted(found):
        text = {"true": "1", "false": "0"}.get(name.lower(), name)
        if _NUMBER.fullmatch(text):
            other = forms.setdefault(float(text), name)
            if other != name:
                raise DataError(
                    "data.train.label",
                    f"has the labels {other} and {name}, which may be the same label",
                    "write every label in one form",
                )


Labels = tuple[str | float, ...]
"""Of one example."""


def label_names(data: DataConfig, train: Iterable[Labels]) -> tuple[str, ...]:
    """The labels in class order, of those of each training example; for regression, a name for each
    number.

    Raises:
        DataError: there are too few or too many of them, or one that is written occurs twice.
    """
    if data.problem == "regression":
        return tuple(f"value_{number}" for number in range(len(next(iter(train)))))
    if data.labels is not None:
        twice = [name for name in data.labels if data.labels.count(name) > 1]
        if twice:
            raise DataError(f"data.labels={data.labels}", f"has {twice[0]} twice", "write it once")
        names = list(data.labels)
    else:
        found = {str(name) for one in train for name in one}
        _refuse_two_forms(found)
        numeric = all(name.lstrip("-").isdecimal() for name in found)
        names = sorted(found, key=(lambda name: (int(name), name)) if numeric else None)
    fewest = 2 if data.problem == "single_label" else 1
    if not fewest <= len(names) <= MAX_LABELS:
        raise DataError(
            f"data.problem={data.problem}",
            f"needs {fewest} to {MAX_LABELS:,} labels, and "
            f"data.{'train' if data.labels is None else 'labels'} has {len(names):,}",
            "write another column as data.train.label, or data.problem: regression for numbers"
            if data.labels is None
            else "write every label of data.train, or leave data.labels out",
        )
    return tuple(names)


def fill_targets(
    targets: Column, rows: Iterable[tuple[int, Labels]], data: DataConfig, names: Sequence[str]
) -> set[int]:
    """Write the class vector or the numbers of examples, of their (number, labels), into `targets`,
    which is zeros of [n, names]. The numbers of those whose labels are none of `names`.
    """
    columns, wrong = {name: i for i, name in enumerate(names)}, set[int]()
    for number, labels in rows:
        if data.problem == "regression" and len(labels) == len(names):
            targets[number] = labels
        elif data.problem != "regression" and columns.keys() >= set(labels):
            targets[number, [columns[str(name)] for name in labels]] = 1
        else:
            wrong.add(number)
    return wrong


def refuse_labels(
    split: str, origin: str, labels: Labels, data: DataConfig, names: Sequence[str]
) -> NoReturn:
    """Raises DataError on a row whose labels are none of `names`."""
    if data.problem == "regression":
        raise DataError(
            f"data.{split}: {origin}",
            f"has {len(labels)} numbers where others have {len(names)}",
            "write the same count in every row",
        )
    unknown = next(name for name in labels if name not in names)
    raise DataError(
        f"data.{split}: {origin}",
        f"has the label {unknown!r}, which is none of "
        + ("data.labels" if data.labels else "those of data.train"),
        f"write one of {some_of(names, 12)}",
    )


def check_all_seen(targets: Column, data: DataConfig, names: Sequence[str]) -> None:
    """Raises DataError where a label has no example in train, of which these are the targets."""
    if data.problem == "regression":
        return
    highest = targets.max(0, initial=0)
    absent = [name for name, most in zip(names, highest, strict=True) if not most]
    if absent:
        raise DataError(
            f"data.{'labels' if data.labels else 'train'}",
            f"has the label {absent[0]!r}, which no training example has",
            "remove it, or add rows that have it",
        )
