"""Packed runs in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.model.build import load_tokenizer
from raytune_ft.strategy.single import Single
from raytune_ft.train.packed import PackedEngine
from raytune_ft.train.report import Reporter, Silent
from raytune_ft.train.spec import RunSpec


class Packed:
    """An engine over the data that `tests.support.runs.run` would train on in `root / name`."""

    def __init__(self, config: Config, root: Path, slots: int, rank: int = 8) -> None:
        self.root = root
        tokenizer = load_tokenizer(config.model)
        self.data = prepare_data(config.data, tokenizer, config.seed, root / "cache")
        strategy = Single(config.parallel, config.train.precision)
        self.engine = PackedEngine(config, self.data, slots, rank, strategy)

    def enter(self, name: str, config: Config, reporter: Reporter | None = None) -> RunSpec:
        """Into the next free slot."""
        spec = self.spec(name, config)
        self.engine.enter(spec, reporter or Silent())
        return spec

    def spec(self, name: str, config: Config) -> RunSpec:
        """Of a run over the engine's data."""
        return RunSpec(config, self.root / name, self.data.path)

    def passes(self, count: int) -> list[str]:
        """Names of the runs that ended in so many passes."""
        return [path.name for _ in range(count) for path in self.engine.advance()]

    def finish(self, expected: int) -> list[str]:
        """Go on until so many runs have ended; their names in that order."""
        ended: list[str] = []
        while len(ended) < expected:
            ended += self.passes(1)
        self.engine.close()
        return ended


def run_packed(
    configs: Mapping[str, Config], root: Path, slots: int | None = None, rank: int = 8
) -> list[str]:
    """Train all of them, each as soon as a slot is free; their names as they ended."""
    waiting: Sequence[tuple[str, Any]] = list(configs.items())
    packed = Packed(waiting[0][1], root, slots or len(waiting), rank)
    ended: list[str] = []
    while len(ended) < len(configs):
        while waiting and packed.engine.free:
            (name, config), *waiting = waiting
            packed.enter(name, config)
        ended += packed.passes(1)
    packed.engine.close()
    return ended
