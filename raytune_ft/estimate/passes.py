"""The passes of a run: as large and with as little recomputation as memory allows.

`train.micro_tokens: auto` and `parallel.activation_checkpointing: auto` are resolved here, in the
driver and in `plan`. Neither changes a number that is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from raytune_ft.config.execution import MAX_SLOTS, variants
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.search import Distribution
from raytune_ft.data.batch import FREELY, Apart
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate.cost import flops_a_token, step_cost
from raytune_ft.estimate.hardware import PROCESS, Hardware
from raytune_ft.estimate.memory import (
    Memory,
    MemoryModel,
    Work,
    beside_of,
    micro_tokens,
    said_of,
    work_of,
)
from raytune_ft.estimate.parameters import BYTES, Shell
from raytune_ft.format import GIB, size
from raytune_ft.model.checkpointing import POLICIES, Activations, choose_checkpointing
from raytune_ft.packed.autotune import COPIES, SHARE
from raytune_ft.records import Forecast

ENOUGH = 2048
"""Tokens of a pass that fill a device where the model is so large that memory is short: from there
on, less recomputation gains more than larger passes."""
LEAST = 256
"""Smaller passes are not tried, unless a row is longer anyway."""
SURE = 4
"""On a CPU nothing is traced where the formula's estimate fits this many times."""


@dataclass(frozen=True)
class Passes:
    """The choice, with the estimate for it.

    needed: bytes of a worker, its process included. usable: what it has, None where unknown.
    """

    micro_tokens: int
    checkpointing: Activations
    work: Work
    memory: Memory
    needed: int
    usable: int | None

    @property
    def fits(self) -> bool:
        """Whether it fits, by the estimate; true where the memory of a worker is unknown."""
        return self.usable is None or self.needed <= self.usable

    def __str__(self) -> str:
        found = f"passes of at most {self.micro_tokens:,} tokens"
        found += f", activation checkpointing {self.checkpointing}"
        if self.usable is None:
            return f"{found}: the memory of a worker is unknown"
        room = f"needs {size(self.needed)} of a worker's {size(self.usable)}"
        if self.fits:
            return f"{found}: {room}"
        return f"{found}: does not fit by the estimate, {room}"


def choose_passes(
    config: Config,
    shell: Shell,
    split: TokenizedSplit,
    usable: int | None,
    apart: Apart = FREELY,
    packed: bool = False,
) -> Passes:
    """The largest passes with the least checkpointing that fit `usable` bytes of a worker.

    The strategy is concrete. What is written is kept. Passes of `ENOUGH` tokens come before less
    checkpointing. Where nothing fits, the choice is what needs least. An elastic run must fit with
    the fewest of its workers. `packed`: an engine's, whose adapters take at most `SHARE` of the
    memory beside the base.
    """
    parallel, device = config.parallel, config.parallel.device
    workers = parallel.min_workers
    parallel = parallel.model_copy(update={"workers": workers})

    @cache
    def work(budget: int) -> Work:
        train = config.train.model_copy(update={"micro_tokens": budget})
        return work_of(config.model_copy(update={"train": train}), split, workers, device, apart)

    def weighed(model: MemoryModel, budget: int, policy: Activations) -> Passes:
        layout = parallel.model_copy(update={"activation_checkpointing": policy})
        memory = model.estimate(layout, work(budget), device)
        needed = memory.peak + PROCESS[device]
        if packed and usable is not None:
            adapters = MAX_SLOTS * COPIES[device] * shell.trained * shell.master
            room = max(0, usable - memory.parameters - PROCESS[device])
            needed += min(adapters, round(SHARE * room))
        return Passes(budget, policy, work(budget), memory, needed, usable)

    largest = micro_tokens(config, device)
    rows = tuple({1, -(-work(largest).tokens // work(largest).width)})
    model, rough = (
        MemoryModel(shell, rows, work(largest).width, beside_of(config), by_formula=formula)
        for formula in (False, True)
    )
    first = choose_checkpointing(parallel.activation_checkpointing)
    if usable is None:
        return weighed(rough if device == "cpu" else model, largest, first)
    if device == "cpu" and SURE * (found := weighed(rough, largest, first)).needed <= usable:
        return found
    fitting: list[Passes] = []
    for policy in POLICIES if parallel.activation_checkpointing == "auto" else (first,):
        for budget in _budgets(config, largest):
            found = weighed(model, budget, policy)
            if found.fits or found.work.rows == 1:
                break
        if found.fits:
            fitting.append(found)
            if budget >= min(ENOUGH, largest):
                break
    return max(fitting, key=lambda each: each.micro_tokens, default=found)


def _budgets(config: Config, largest: int) -> Iterator[int]:
    yield largest
    while config.train.micro_tokens == "auto" and (largest := largest // 2) >= LEAST:
        yield largest


def heaviest(config: Config) -> list[Config]:
    """A run, or of a search for each method the configs that need most memory: with every bound and
    choice of the method's keys, the largest batch and the widest numbers of the space.
    """
    if config.search is None:
        return [config]
    space = config.search.space

    def widest(key: str, own: str) -> str:
        return max(_values(space.get(key)), key=lambda name: BYTES.get(name, 0), default=own)

    found = []
    for each in variants(config):
        batches = [each.train.batch_size, *map(int, _values(space.get("train.batch_size")))]
        precision = widest("train.precision", each.train.precision)
        train = {"batch_size": max(batches), "precision": precision}
        model = {"dtype": widest("model.dtype", each.model.dtype)}
        found.append(
            each.model_copy(
                update={
                    "train": each.train.model_copy(update=train),
                    "model": each.model.model_copy(update=model),
                }
            )
        )
    return found


def _values(line: Distribution | None) -> list[str]:
    return [] if line is None else list(line.values)


def forecast_of(
    config: Config,
    shell: Shell,
    split: TokenizedSplit,
    passes: Passes,
    hardware: Hardware | None,
    packed: bool,
) -> Forecast:
    """What to expect of a run with these passes; without `hardware`, its accelerator is unknown.

    A trial that shares an engine has a part of its speed and memory, which depend on the others.
    """
    times, said = said_of(config)
    lengths, counts = split.lengths + said, split.label_counts + said
    flops = flops_a_token(shell, lengths, counts)
    peak = round(passes.memory.peak / GIB, 3)
    if hardware is None:
        return Forecast(flops, peak_gib=None if packed else peak)
    policy = {"activation_checkpointing": passes.checkpointing}
    parallel: ParallelConfig = config.parallel.model_copy(update=policy)
    seconds = step_cost(shell, parallel, passes.work, hardware).step_s
    tokens = float(np.mean(lengths)) * config.train.batch_size * times
    peak_flops = None if hardware.peak_tflops is None else hardware.peak_tflops * 1e12
    if packed:
        return Forecast(flops, peak_flops)
    return Forecast(flops, peak_flops, peak, round(tokens / seconds, 1))
