"""Packed runs in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from raytune_ft.config.schema import Config
from raytune_ft.data.prepare import prepare_data
from raytune_ft.data.prompts import prompted
from raytune_ft.evaluate.precompute import referenced, taught
from raytune_ft.model.load import load_tokenizer
from raytune_ft.packed.engine import PackedEngine, Passes
from raytune_ft.rundir import RunSpec
from raytune_ft.strategy import build_strategy
from raytune_ft.train.report import Reporter, Silent
from raytune_ft.train.setup import build_voice
from tests.support.runs import evaluations, final_weights, losses, make_config

# Different in all that a run has of its own; the last one enters a slot that another has used.
RUNS: dict[str, dict[str, Any]] = {
    "short": {
        "method.rank": 8,
        "method.alpha": 8.0,
        "train.lr": 1e-3,
        "train.batch_size": 3,
        "train.max_examples": 50,
        "train.eval_every_examples": 20,
    },
    "long": {"train.max_examples": 25 * 7 - 3},
    "wide": {
        "method.rank": 2,
        "train.batch_size": 16,
        "train.lr_schedule": "linear",
        "train.weight_decay": 0.1,
        "train.max_grad_norm": 0.05,
        "train.max_examples": 16 * 9,
    },
    "late": {
        "seed": 3,
        "method.targets": ["q_proj", "down_proj"],
        "method.rslora": True,
        "train.lr_schedule": "constant",
        "train.max_grad_norm": None,
        "train.adam_beta1": 0.8,
        "train.adam_epsilon": 1e-6,
        "train.max_examples": 100,
    },
}


class Packed:
    """An engine over the data that `tests.support.runs.run` would train on in `root / name`."""

    def __init__(
        self, config: Config, root: Path, slots: int, rank: int = 8, strategy: str = "single"
    ) -> None:
        self.root = root
        tokenizer = load_tokenizer(config.model)
        data = prepare_data(config.data, tokenizer, config.seed, root / "cache")
        data = prompted(config, data, tokenizer)
        data = taught(config, data, lambda line: None)
        self.data = referenced(config, data, lambda line: None)
        laid_out = build_strategy(strategy, config.parallel, config.train.precision)
        self._open = ExitStack()
        voice = self._open.enter_context(build_voice(config, self.data, laid_out))
        passes = Passes(config, self.data, slots, rank, laid_out, voice=voice)
        self.engine = PackedEngine(passes)

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
        self.close()
        return ended

    def close(self) -> None:
        """End the engine and the processes of rewards."""
        self.engine.close()
        self._open.close()


def run_packed(
    configs: Mapping[str, Config],
    root: Path,
    slots: int | None = None,
    rank: int = 8,
    strategy: str = "single",
) -> list[str]:
    """Train all of them, each as soon as a slot is free; their names as they ended. Called on
    every rank.
    """
    waiting: Sequence[tuple[str, Any]] = list(configs.items())
    packed = Packed(waiting[0][1], root, slots or len(waiting), rank, strategy)
    ended: list[str] = []
    while len(ended) < len(configs):
        while waiting and packed.engine.free:
            (name, config), *waiting = waiting
            packed.enter(name, config)
        ended += packed.passes(1)
    packed.close()
    return ended


def beside_a_sick_run(
    inputs: tuple[Path, Path], root: Path, sickness: str, strategy: str = "single"
) -> None:
    """Three runs, the middle one of which diverges; then the same with a healthy run in its place,
    which leaves when the other one failed. Called on every rank, of which the last becomes sick.
    """
    well = {"train.max_examples": 84, "train.eval_every_examples": 42}
    sick = well | ({"train.lr": 1e3, "train.max_grad_norm": None} if sickness == "lr" else {})
    failed_after = None
    for name, changes in (("sick", sick), ("well", well)):
        packed = Packed(make_config(*inputs, well), root / name, 3, strategy=strategy)
        for number, own in enumerate((well, changes, well)):
            packed.enter(str(number), make_config(*inputs, {**own, "method.rank": number + 2}))
        going, passes = {"0", "1", "2"}, 0
        laid_out = packed.engine.passes.runner.strategy
        while going:
            here = laid_out.rank == laid_out.world_size - 1
            if here and (name, sickness, passes) == ("sick", "nan", 1):
                packed.engine.passes.optimizer.numbers_KN[1] = torch.nan
            ended, passes = packed.passes(1), passes + 1
            going -= set(ended)
            if "1" in ended and len(going) == 2:
                failed_after = passes
            if name == "well" and passes == failed_after:
                packed.engine.leave(root / name / "1", "pruned")
                going -= {"1"}
        packed.engine.close()
    assert failed_after is not None


def assert_untouched(root: Path) -> None:
    """To the bit, by the run that became sick; which failed."""
    assert '"failed"' in (root / "sick" / "1" / "result.json").read_text()
    for other in ("0", "2"):
        ours, theirs = root / "sick" / other, root / "well" / other
        assert losses(ours) == losses(theirs)
        assert evaluations(ours) == evaluations(theirs)
        weights = final_weights(theirs)
        assert all(torch.equal(value, weights[key]) for key, value in final_weights(ours).items())
