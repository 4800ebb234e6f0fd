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

MICRO_TOKENS, SLOTS, CHECKPOINTING = "micro_tokens", "slots", "activation_checkpointing"


def lowered(config: Config, run_dir: Path) -> Config:
    """The config of a run, with the `train.micro_tokens` to which memory has lowered it, and with
    full activation checkpointing where that was not enough.
    """
    found, train, parallel = _read(run_dir), config.train, config.parallel
    most, written = found.get(MICRO_TOKENS), train.micro_tokens
    if most is not None and (written == "auto" or most < written):
        train = train.model_copy(update={"micro_tokens": most})
    if CHECKPOINTING in found:
        parallel = parallel.model_copy(update={CHECKPOINTING: found[CHECKPOINTING]})
    return config.model_copy(update={"train": train, "parallel": parallel})


def lowered_slots(slots: int, run_dir: Path) -> int:
    """The slots of an engine, or as many as memory has lowered them to."""
    return int(_read(run_dir).get(SLOTS, slots))


def notes(run_dir: Path) -> tuple[str, ...]:
    """What the result says about it; empty where memory was enough."""
    found, said = _read(run_dir), []
    if MICRO_TOKENS in found:
        tokens = f"train.micro_tokens was lowered to {found[MICRO_TOKENS]:,}"
        said.append(f"{tokens}: memory ran out with more")
    if CHECKPOINTING in found:
        policy = f"parallel.activation_checkpointing became {found[CHECKPOINTING]}"
        said.append(f"{policy}: memory ran out with less")
    return tuple(said)


@contextmanager
def lowers(
    run_dir: Path, micro_tokens: int, longest: int, checkpointing: str, slots: int = 1
) -> Iterator[None]:
    """While it lasts, memory may run out: what is used then is halved for the next start.

    First the tokens of a pass, of which a single row of `longest` tokens is the least; then the
    slots of an engine; last, blocks are recomputed in full, where they are not. Any rank may do so,
    and all that do write the same.

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
        elif checkpointing != "full":
            smaller[CHECKPOINTING] = "full"
            what = "activation checkpointing full"
        else:
            raise
        write_json_atomic(run_dir / BUDGET, smaller)
        raise PassTooLarge(f"{first_line(error)}; going on with {what}") from error


def _read(run_dir: Path) -> dict[str, Any]:
    file = run_dir / BUDGET
    return dict(read_json(file)) if file.is_file() else {}
