"""What the data of a config are like, before any model is loaded: only its tokenizer is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raytune_ft.config.environment import joins_cluster
from raytune_ft.config.load import expand_env, load_config
from raytune_ft.config.reference import one_of
from raytune_ft.config.resolve import resolve
from raytune_ft.config.schema import Config
from raytune_ft.errors import ConfigError
from raytune_ft.preflight import makers
from raytune_ft.records import Tell
from raytune_ft.report.tables import Table
from raytune_ft.rundir import cache_path, probe_storage, run_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raytune_ft.data.prepared import PreparedData
    from raytune_ft.data.split import TokenizedSplit

WIDEST = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class View:
    """The tokens of a config, and what made them."""

    config: Config
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase

    def split(self, name: str) -> TokenizedSplit:
        """One of the splits. Raises ConfigError where the config has none of that name."""
        splits = self.data.report.splits
        if name not in splits:
            raise ConfigError(f"--split {name}", "is not a split", f"write {one_of(list(splits))}")
        found: TokenizedSplit = getattr(self.data, name)
        return found


def view(file: Path, overrides: Sequence[str], tell: Tell) -> View:
    """Tokenise the data of a config, or map what an earlier command has tokenised.

    Raises InputError or RunFailed, as `train` does.
    """
    with ExitStack() as stack:
        if joins_cluster():
            from raytune_ft.ray_backend.cluster import connected

            stack.enter_context(connected())
        config = expand_env(resolve(load_config(file, overrides, tell)))
        probe_storage(run_path(config).parent)
        workers = stack.enter_context(makers(config))
        # Behind the start of what makes the tokens, since they import for seconds.
        from raytune_ft.data.prepare import prepare_data
        from raytune_ft.model.load import load_tokenizer

        tokenizer = load_tokenizer(config.model)
        cache = cache_path(config)
        data = prepare_data(config.data, tokenizer, config.seed, cache, tell, workers)
        return View(config, data, tokenizer)


def checked(found: View) -> list[Table]:
    """Rows of each source and their causes, splits, and what they share.

    Raises:
        DataError: a split repeats too many prompts of another one, see `check_overlap`.
    """
    from raytune_ft.data.report import check_overlap

    report = found.data.report
    sources = Table(
        (
            *("source", "file", "rows", "usable", "bad", "truncated", "dropped"),
            *("longest", "tokens", "label tokens"),
        ),
        tuple(
            (
                *(name, one.name),
                *(
                    f"{count:,}"
                    for count in (
                        *(one.rows, one.usable, sum(one.bad.values()), one.truncated, one.dropped),
                        *(one.longest, one.tokens, one.label_tokens),
                    )
                ),
            )
            for name, one in report.sources.items()
        ),
        "sources",
        words=2,
    )
    causes = Table(
        ("source", "cause", "first", "rows"),
        tuple(
            (name, cause, one.first_bad[cause], f"{count:,}")
            for name, one in report.sources.items()
            for cause, count in one.bad.items()
        ),
        "rows that cannot be used",
        words=3,
    )
    splits = Table(
        ("split", "examples", "tokens", "label tokens"),
        tuple(
            (name, f"{one.examples:,}", f"{one.tokens:,}", f"{one.label_tokens:,}")
            for name, one in report.splits.items()
        ),
        "splits",
    )
    shared = Table(
        ("of the second, in the first", "identical examples", "same prompts"),
        tuple(
            (pair.replace("/", ", "), f"{count:,}", f"{report.overlaps.get(pair, 0):,}")
            for pair, count in report.duplicates.items()
        ),
        "duplicates and overlaps",
    )
    check_overlap(found.config.data, report, found.config.promote.max_overlap)
    return [table for table in (sources, causes, splits, shared) if table.rows]


def remarks(found: View) -> list[str]:
    """What a reader of the data may not expect, one line each."""
    from raytune_ft.data.report import facts

    report = found.data.report
    own = [f"{name}: {fact}" for name, one in report.sources.items() for fact in facts(one)]
    return [*own, *(f"{name}: {pairs}" for name, pairs in report.pairs.items()), *report.notes]


def measured(found: View) -> list[str]:
    """Lines with the lengths of each split: figures, and a bar for each range of lengths."""
    lines = []
    limit = found.config.data.max_length
    for name in found.data.report.splits:
        split = found.split(name)
        lengths = split.longest_parts
        middle, high = np.percentile(lengths, (50, 95))
        share = split.label_counts.sum() / max(len(split.input_ids), 1)
        lines += [
            f"{name}: {len(split):,} examples of {lengths.min():,} to {lengths.max():,} tokens, "
            f"mean {lengths.mean():,.1f}, median {middle:,.0f}, 95% within {high:,.0f}; "
            f"{share:.0%} of the tokens carry loss",
            *_bars(found.data.report.splits[name].lengths),
        ]
    for name, one in found.data.report.sources.items():
        cut, gone = one.truncated, one.dropped
        lines.append(
            f"{name}: data.max_length={limit} cuts {cut:,} and drops {gone:,} of {one.rows:,} "
            f"rows; the longest has {one.longest:,} tokens"
        )
    return lines


def _bars(lengths: Sequence[tuple[int, int]]) -> list[str]:
    most = max(count for _, count in lengths)
    width = len(f"{lengths[-1][0]:,}")
    lows = [1, *(high + 1 for high, _ in lengths)]
    return [
        f"  {low:>{width},} to {high:>{width},}  {count:>9,}  " + "#" * -(-count * WIDEST // most)
        for low, (high, count) in zip(lows, lengths, strict=False)
    ]


def pieces(found: View, name: str, number: int) -> list[tuple[str, bool]]:
    """Example `number` of a split in pieces of text, each with whether it carries loss.

    Raises:
        ConfigError: there is no such split or no such example.
    """
    from raytune_ft.data.formats import describe_example, describe_target

    split = found.split(name)
    if number >= len(split):
        raise ConfigError(
            f"--start {number}", f"is beyond the {len(split):,} examples of {name}", "write less"
        )
    target = describe_target(split, number, found.data.report)
    return [*describe_example(split, number, found.tokenizer), (target, False)]
