"""Smaller passes for a run whose memory ran out. They change no number that is learnt: the layout
of a step over passes never does.

The run directory keeps what was found, so that a restarted or resumed run does not try again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config
from raytune_ft.errors import PassTooLarge, first_line, is_out_of_memory
from raytune_ft.files import read_json, write_json_atomic
from raytune_ft.layout import BUDGET

MICRO_TOKENS, SLOTS = "micro_tokens", "slots"


def lowered(config: Config, run_dir: Path) -> Config:
    """The config of a run, with the `train.micro_tokens` to which memory has lowered it."""
    found = _read(run_dir).get(MICRO_TOKENS)
    written = config.train.micro_tokens
    if found is None or (isinstance(written, int) and written <= found):
        return config
    return config.model_copy(
        update={"train": config.train.model_copy(update={"micro_tokens": found})}
    )


def lowered_slots(slots: int, run_dir: Path) -> int:
    """The slots of an engine, or as many as memory has lowered them to."""
    return int(_read(run_dir).get(SLOTS, slots))


def notes(run_dir: Path) -> tuple[str, ...]:
    """What the result says about it; empty where memory was enough."""
    found = _read(run_dir).get(MICRO_TOKENS)
    if found is None:
        return ()
    return (f"train.micro_tokens was lowered to {found:,}: memory ran out with more",)


@contextmanager
def lowers(run_dir: Path, micro_tokens: int, longest: int, slots: int = 1) -> Iterator[None]:
    """While it lasts, memory may run out: what is used then is halved for the next start.

    First the tokens of a pass, of which a single row of `longest` tokens is the least; then the
    slots of an engine. Any rank may do so, and all that do write the same.

    Raises:
        PassTooLarge: memory ran out, and the next start needs less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller: dict[str, Any] = _read(run_dir)
        if micro_tokens > longest:
            smaller[MICRO_TOKENS] = max(longest, micro_tokens // 2)
            what = f"passes of at most {smaller[MICRO_TOKENS]:,} tokens"
        elif slots > 1:
            smaller[SLOTS] = slots // 2
            what = f"{smaller[SLOTS]} slot{'s' * (smaller[SLOTS] > 1)}"
        else:
            raise
        write_json_atomic(run_dir / BUDGET, smaller)
        raise PassTooLarge(f"{first_line(error)}; going on with {what}") from error


def _read(run_dir: Path) -> dict[str, Any]:
    file = run_dir / BUDGET
    return dict(read_json(file)) if file.is_file() else {}
