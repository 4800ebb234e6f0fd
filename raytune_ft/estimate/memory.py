"""Memory of one worker: what it holds throughout, and its peak in a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raytune_ft.config.load import holds_base
from raytune_ft.config.methods import METHODS, LoraMethod
from raytune_ft.config.objectives import OBJECTIVES
from raytune_ft.config.schema import Config, ModelConfig, ParallelConfig
from raytune_ft.config.strategies import REPLICATED, SHARDED
from raytune_ft.config.train import KdConfig
from raytune_ft.data.batch import FREELY, Apart, lay_out
from raytune_ft.data.split import TokenizedSplit, length_range, parts_of
from raytune_ft.estimate.activations import (
    Traced,
    by_formula,
    head_by_formula,
    trace,
    trace_head,
)
from raytune_ft.estimate.hardware import GPU_PROCESS, PROCESS, Hardware
from raytune_ft.estimate.parameters import Shell, Shells
from raytune_ft.format import GIB
from raytune_ft.model.checkpointing import choose_checkpointing
from raytune_ft.model.hub import teacher_model
from raytune_ft.model.load import Precision, dtype_of
from raytune_ft.model.meta import build_shapes
from raytune_ft.model.objectives.tokens import block_rows
from raytune_ft.strategy import strategy_class
from raytune_ft.strategy.base import Held
from raytune_ft.train.model_runner import MICRO_TOKENS
from raytune_ft.train.optim import total_examples
from raytune_ft.train.setup import head_before, plain_order

SAMPLED_STEPS = 20
"""Steps that are laid out to find the largest micro-batch."""


@dataclass(frozen=True)
class Work:
    """What one worker computes.

    The largest micro-batch has `rows` rows of `width` tokens, at most `labels` of which are label
    tokens. A step has at most `micro_batches` passes and on average `step_tokens` tokens, padding
    included, and `step_labels` label tokens.
    """

    rows: int
    width: int
    labels: int
    micro_batches: int
    step_tokens: int
    step_labels: int

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch, with padding."""
        return self.rows * self.width


def micro_tokens(config: Config, device: str) -> int:
    """The token budget of one forward pass, as the engine chooses it."""
    written = config.train.micro_tokens
    return written if isinstance(written, int) else MICRO_TOKENS[device]


def steps_in_a_pass(config: Config, length: float) -> int:
    """How many steps on examples of this mean length fill one pass of all workers; at least 1.
    Where the model is asked, most passes are of sampling, with a token of each answer.
    """
    parallel, facts = config.parallel, OBJECTIVES[config.train.objective]
    room = micro_tokens(config, parallel.device) * parallel.max_workers
    tokens = length * config.train.batch_size
    if facts.rollouts:
        tokens = config.train.rollout.num_generations * config.train.batch_size
    return max(1, int(room // tokens))


def said_of(config: Config) -> tuple[int, int]:
    """How often each prompt is answered in a step that learns from the answers, and the tokens of
    the longest answer; (1, 0) where examples are given.
    """
    if not OBJECTIVES[config.train.objective].rollouts:
        return 1, 0
    rollout = config.train.rollout
    return rollout.num_generations, rollout.max_completion_length


def work_of(
    config: Config, split: TokenizedSplit, workers: int, device: str, apart: Apart = FREELY
) -> Work:
    """The work of a run, from the layout of its first steps without a curriculum, whose first steps
    would not be typical; and a pass holds at least the longest row of all.
    """
    batch, budget = config.train.batch_size, micro_tokens(config, device)
    times, said = said_of(config)
    virtual = config.method.virtual_tokens
    shared_rows = METHODS[config.method.name].one_example_rows is None
    packing = config.data.packing is not False and shared_rows
    tokens = labels = rows = width = most = most_labels = passes = 0
    order = plain_order(config, split)
    whole = total_examples(config.train, len(order)) // batch
    steps = min(SAMPLED_STEPS, max(1, whole))
    for step in range(steps):
        indices = order.indices(step * batch, batch)
        each = split.part_lengths(indices)
        lengths = [length + said + virtual for length in each for _ in range(times)]
        counts = split.part_labels_of(parts_of(indices, split.parts))
        counts = np.repeat(counts + said, times)
        for rank in lay_out(lengths, workers, budget, packing, apart, split.parts):
            passes = max(passes, len(rank))
            for micro in rank:
                if not micro:
                    continue
                wide = max(sum(lengths[number] for number in row) for row in micro)
                found = sum(int(counts[number]) for row in micro for number in row)
                tokens, labels = tokens + wide * len(micro), labels + found
                most_labels = max(most_labels, found)
                if wide * len(micro) > most:
                    most, rows, width = wide * len(micro), len(micro), wide
    longest = length_range(split.offsets)[1] + said + virtual
    if longest > most:
        rows, width = 1, longest
    share = steps * workers
    return Work(rows, width, most_labels, passes, round(tokens / share), round(labels / share))


def work_at_most(config: Config, workers: int, device: str) -> Work:
    """The most work that a run can have: all examples at full length, a loss on every token."""
    width = config.data.max_length + config.method.virtual_tokens
    examples = -(-config.train.batch_size // workers)
    rows = max(1, min(examples, micro_tokens(config, device) // width))
    passes = -(-examples // rows)
    return Work(rows, width, rows * width, passes, examples * width, examples * width)


@dataclass(frozen=True)
class Beside:
    """Models that a worker holds whole beside the one it trains: the teacher of a distillation, or
    a copy of the model before training. `held`: bytes of their weights.

    Temporary memory of their passes is not counted: the loss needs more afterwards.
    """

    held: int = 0
    kd: KdConfig | None = None


def beside_of(config: Config) -> Beside:
    """The other models of a run. A teacher whose logits are on disk is not held.

    Raises:
        ModelError: one cannot be read.
    """
    kd, models = config.train.kd, []
    if kd is not None and kd.cache != "disk":
        models.append(teacher_model(config))
    if holds_base(config):
        models.append(config.model)
    return Beside(sum(_frozen_bytes(model, config.train.precision) for model in models), kd)


def _frozen_bytes(model: ModelConfig, precision: Precision) -> int:
    itemsize = dtype_of(model, LoraMethod(), precision).itemsize
    return itemsize * sum(p.numel() for p in build_shapes(model).parameters())


def shortage(config: Config, usable: int | None) -> str | None:
    """Why a whole copy of the base does not fit on a worker; None where it does.

    Where a step does not fit even with a sharded base, activations are the cause, and the answer is
    about the base alone. If available memory is unknown, the model is assumed to fit.

    Raises:
        ModelError: the model cannot be read, or cannot take the method.
    """
    if usable is None:
        return None
    parallel = config.parallel
    device = parallel.device
    shell = Shells(head_before(config)).of(config)
    work = work_at_most(config, parallel.max_workers, device)
    plain = parallel.model_copy(update={"strategy": REPLICATED})
    beside = beside_of(config)
    needed = held_by(shell, plain).resident + beside.held
    if needed <= usable:
        model = MemoryModel(shell, (work.rows,), work.width, beside)
        parts = parallel.model_copy(update={"strategy": SHARDED})
        needed, shared = (
            model.estimate(layout, work, device).peak + PROCESS[device] for layout in (plain, parts)
        )
        if needed <= usable or shared > usable:
            return None
    return f"a whole copy needs {needed / GIB:,.1f} GiB of a worker's {usable / GIB:,.1f}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    `parameters`, `gradients`, `optimizer`, `buffers`, `gathered`, `stepping` and `snapshot`: see
    `strategy.footprint.Held`. `beside`: weights of other models. `activations` and `logits`: at the
    peak of a pass. `offloaded`: the part of all these in host memory, where `snapshot` is too.
    `peak`: the most at any time on the device; a CPU's device memory is its host memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    gathered: int
    activations: int
    logits: int
    stepping: int
    offloaded: int
    snapshot: int
    beside: int
    peak: int


def on_hosts(memory: Memory, parallel: ParallelConfig, hardware: Hardware) -> int:
    """Bytes of a node's host memory that its workers on GPUs need.

    Pages of model files are not counted: the system gives them up where memory is short.
    """
    workers = min(hardware.per_node, parallel.max_workers)
    return workers * (GPU_PROCESS + memory.snapshot + memory.offloaded)


def misfit(memory: Memory, parallel: ParallelConfig, hardware: Hardware) -> str | None:
    """Why a layout does not fit on this hardware; None where it does."""
    if not hardware.fits(memory.peak):
        assert hardware.usable is not None
        needed = (memory.peak + PROCESS[hardware.device]) / GIB
        return f"does not fit: needs {needed:,.1f} GiB, has {hardware.usable / GIB:,.1f} GiB"
    if hardware.device == "cuda" and hardware.host is not None:
        needed, host = on_hosts(memory, parallel, hardware) / GIB, hardware.host / GIB
        if needed > host:
            return f"does not fit: needs {needed:,.1f} GiB of a node's host memory, has {host:,.1f}"
    return None


class MemoryModel:
    """Estimates for one model and those beside it."""

    def __init__(
        self,
        shell: Shell,
        rows: tuple[int, ...],
        width: int,
        beside: Beside = Beside(),
        by_formula: bool = False,
    ) -> None:
        """`by_formula`: nothing is traced, which takes no time and may be wrong by a factor."""
        self.shell, self.width, self._beside = shell, width, beside
        self._rows, self._by_formula = rows, by_formula

    def traced(self, parallel: ParallelConfig) -> Traced:
        """Activations of the blocks under the layout's checkpointing."""
        policy = choose_checkpointing(parallel.activation_checkpointing)
        if self._by_formula:
            return by_formula(self.shell, set(self._rows), self.width, policy)
        gathered = self._casts_on_gathering(parallel)
        return trace(self.shell, self._rows, self.width, policy, gathered)

    def estimate(
        self, parallel: ParallelConfig, work: Work, device: str, saves_midway: bool = True
    ) -> Memory:
        """The memory of one layout, whose strategy is concrete, on a `device` cpu or cuda.

        saves_midway: a checkpoint is written before the last step.
        """
        shell, held = self.shell, held_by(self.shell, parallel)
        traced = self.traced(parallel)
        blocks = len(shell.blocks)
        rows = -(-work.tokens // self.width)
        kept, peak = traced.kept.at(rows, blocks), traced.peak.at(rows, blocks)
        logits = self._head(work.labels, self._casts_on_gathering(parallel))
        away = parallel.offload if device == "cuda" else "none"
        gradients = held.gradients if away == "none" else 0
        stepping = held.stepping if away == "none" else 0
        resident = held.buffers + (held.optimizer if away == "none" else 0)
        resident += held.parameters if away != "all" else 0
        resident += self._beside.held
        head = max((w.size for w in shell.root if w.trained), default=0) * shell.master
        # In a step of one pass, gradients appear as activations are freed.
        there = away == "none" and (work.micro_batches > 1 or held.keeps_gradients)
        grown = held.between_passes if there else 0
        moving = max(kept + logits, peak + (0 if grown else head)) + grown
        moving = max(moving + held.gathered, gradients + max(stepping, head))
        snapshot = held.snapshot if device == "cpu" else 0
        both = resident + moving + (snapshot if saves_midway else 0)
        return Memory(
            parameters=held.parameters,
            gradients=held.gradients,
            optimizer=held.optimizer,
            buffers=held.buffers,
            gathered=held.gathered,
            activations=max(kept, peak),
            logits=logits,
            stepping=stepping,
            offloaded=_offloaded(parallel, held),
            snapshot=held.snapshot,
            beside=self._beside.held,
            peak=max(both, resident + snapshot),
        )

    def _head(self, labels: int, gathered: bool) -> int:
        kd = self._beside.kd
        if kd is None:
            labels = min(labels, block_rows(self.shell.vocabulary))
        labels = max(1, labels)
        if self._by_formula:
            return head_by_formula(self.shell, labels, kd)
        return trace_head(self.shell, labels, gathered, kd)

    def _casts_on_gathering(self, parallel: ParallelConfig) -> bool:
        """Whether no casts of weights are kept as activations; those of adapters are too small to
        matter.
        """
        casts = strategy_class(parallel.strategy).casts_on_gathering
        narrow = casts and self.shell.compute < self.shell.master
        return narrow and 2 * self.shell.trained > self.shell.total


def held_by(shell: Shell, parallel: ParallelConfig) -> Held:
    """What a worker holds before it computes anything; `parallel.strategy` is concrete."""
    return strategy_class(parallel.strategy).memory(shell, parallel)


def _offloaded(parallel: ParallelConfig, held: Held) -> int:
    if parallel.offload == "none":
        return 0
    weights = held.parameters if parallel.offload == "all" else 0
    return weights + held.optimizer + held.gradients
