"""Answers with their reasons: two tasks of one row (distilling step by step, arXiv 2305.02301)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from raytune_ft.config.data import SourceConfig
from raytune_ft.data.formats.example import Encoder, Example, RowReader, bad_text, example_of
from raytune_ft.data.rows import BadRow, Row

RATIONALE = "rationale"
"""Column of examples: 1 where the completion is the rationale, 0 where it is the answer."""
ANSWER_TASK, RATIONALE_TASK = "[label] ", "[rationale] "
"""Prefixes of prompts by which the model distinguishes the tasks."""


def _columns(source: SourceConfig) -> dict[str, str]:
    reasons = {} if source.rationale_until is not None else {"rationale": source.rationale}
    return {"prompt": source.prompt, "completion": source.completion, **reasons}


def _check(source: SourceConfig, row: Row) -> BadRow | None:
    bad = bad_text(row, source.prompt) or bad_text(row, source.completion)
    if bad is not None or source.rationale_until is None:
        return bad or bad_text(row, source.rationale)
    reasons, answer = _parts(source, row)
    if not reasons or not answer:
        detail = f"{source.completion!r} does not hold a rationale, {source.rationale_until}, and "
        return BadRow(row.origin, "no_rationale", f"{detail}an answer")
    return None


def _encode(
    encoder: Encoder, source: SourceConfig, separator: str, rows: Sequence[Row]
) -> list[Example | BadRow]:
    """The answer's example, with the rationale's in `others`."""
    parts = [_parts(source, row) for row in rows]
    asked = [row.values[source.prompt] + separator for row in rows]
    spelled = source.special_tokens
    answers = zip(
        encoder.encode([ANSWER_TASK + prompt for prompt in asked], spelled),
        encoder.encode([answer for _, answer in parts], spelled),
        strict=True,
    )
    reasons = zip(
        encoder.encode([RATIONALE_TASK + prompt for prompt in asked], spelled),
        encoder.encode([reason for reason, _ in parts], spelled),
        strict=True,
    )

    def one(row: Row, ids: tuple[list[int], list[int]], is_rationale: float) -> Example:
        prompt, completion = ids
        made = example_of(row, [*encoder.prefix, *prompt], [*completion, *encoder.suffix])
        return replace(made, columns={RATIONALE: (is_rationale,)})

    return [
        replace(one(row, answer, 0.0), others=(one(row, reason, 1.0),))
        for row, answer, reason in zip(rows, answers, reasons, strict=True)
    ]


ANSWER_WITH_RATIONALE = RowReader(
    columns=_columns,
    check=_check,
    prompt=lambda source, row: str(row.values[source.prompt]),
    encode=_encode,
)


def _parts(source: SourceConfig, row: Row) -> tuple[str, str]:
    """Rationale and answer; both empty if the completion cannot be split."""
    completion: str = row.values[source.completion]
    if source.rationale_until is None:
        return row.values[source.rationale], completion
    found = None
    for found in re.finditer(source.rationale_until, completion):  # noqa: B007 - the last one
        pass
    if found is None:
        return "", ""
    return completion[: found.start()].strip(), completion[found.end() :].strip()
