"""What one worker holds, under each strategy, and at the worst moment of a step."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.config.methods import LoraMethod, PrefixMethod, virtual_positions
from raytune_ft.config.schema import Config, ParallelConfig
from raytune_ft.config.train import KdConfig
from raytune_ft.data.batch import lay_out
from raytune_ft.data.split import TokenizedSplit
from raytune_ft.estimate.activations import Traced, trace, trace_head
from raytune_ft.estimate.hardware import GIB, PROCESS
from raytune_ft.estimate.parameters import Shell, Weight, build_shell, elements
from raytune_ft.model.load import dtype_of
from raytune_ft.model.meta import build_shapes
from raytune_ft.train.distill import teacher_model
from raytune_ft.train.engine import MICRO_TOKENS
from raytune_ft.train.optim import total_examples
from raytune_ft.train.setup import head_before, plain_order

LOOKED_AT = 20
"""Steps that are laid out to find the largest micro-batch."""


@dataclass(frozen=True)
class Work:
    """`rows` of `width` tokens with `labels` label tokens are the most of one forward pass;
    `micro_batches` the most passes of a step. `step_tokens` and `step_labels` are of one worker
    and a whole step, in the mean, padding included.
    """

    rows: int
    width: int
    labels: int
    micro_batches: int
    step_tokens: int
    step_labels: int

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch."""
        return self.rows * self.width


def micro_tokens(config: Config, device: str) -> int:
    """The token budget of one forward pass, as the engine chooses it."""
    written = config.train.micro_tokens
    return written if isinstance(written, int) else MICRO_TOKENS[device]


def steps_in_a_pass(config: Config, length: float) -> int:
    """How many steps on examples of this mean length a pass of all workers holds; at least 1."""
    parallel = config.parallel
    device = "cuda" if parallel.resources_per_worker.get("GPU", 0.0) > 0 else "cpu"
    room = micro_tokens(config, device) * parallel.max_workers
    return max(1, int(room // (length * config.train.batch_size)))


def work_of(config: Config, split: TokenizedSplit, workers: int, device: str) -> Work:
    """From the layout of the first steps, as the run would lay them out without a curriculum,
    under which they are not like those to come.
    """
    batch, budget = config.train.batch_size, micro_tokens(config, device)
    virtual = virtual_positions(config.method)
    packing = config.data.packing is not False and not isinstance(config.method, PrefixMethod)
    tokens = labels = rows = width = most = most_labels = passes = 0
    order = plain_order(config, split)
    whole = total_examples(config.train, len(order)) // batch
    steps = min(LOOKED_AT, max(1, whole))
    for step in range(steps):
        indices = order.indices(step * batch, batch)
        lengths = (split.lengths[indices] + virtual).tolist()
        counts = split.label_counts[indices]
        for rank in lay_out(lengths, workers, budget, packing):
            passes = max(passes, len(rank))
            for micro in rank:
                if not micro:
                    continue
                wide = max(sum(lengths[position] for position in row) for row in micro)
                found = sum(int(counts[position]) for row in micro for position in row)
                tokens, labels = tokens + wide * len(micro), labels + found
                most_labels = max(most_labels, found)
                if wide * len(micro) > most:
                    most, rows, width = wide * len(micro), len(micro), wide
    share = steps * workers
    return Work(rows, width, most_labels, passes, round(tokens / share), round(labels / share))


def work_at_most(config: Config, workers: int, device: str) -> Work:
    """Without data: every example as long as it may be, every token with loss."""
    width = config.data.max_length + virtual_positions(config.method)
    examples = -(-config.train.batch_size // workers)
    rows = max(1, min(examples, micro_tokens(config, device) // width))
    passes = -(-examples // rows)
    return Work(rows, width, rows * width, passes, examples * width, examples * width)


@dataclass(frozen=True)
class Teaching:
    """`held` are the bytes of the teacher's weights, 0 where its logits are read from a file.

    What its passes keep for a moment is less than the loss takes afterwards, and is not counted.
    """

    settings: KdConfig
    held: int


def teaching_of(config: Config) -> Teaching | None:
    """None without a teacher. Raises ModelError where it cannot be read."""
    settings = config.train.kd
    if settings is None:
        return None
    if settings.cache == "disk":
        return Teaching(settings, 0)
    model = teacher_model(config)
    shapes = build_shapes(model)
    itemsize = dtype_of(model, LoraMethod(), config.train.precision).itemsize
    return Teaching(settings, itemsize * sum(p.numel() for p in shapes.parameters()))


def shortage(config: Config, usable: int | None) -> str | None:
    """Why a whole copy of the base does not fit on a worker; None where it does.

    Where not even sharding the base makes room, what lacks room is something else (activations),
    and the base alone is asked about. Memory that nobody knows is presumed to do.

    Raises:
        ModelError: the model cannot be read, or cannot take the method.
    """
    if usable is None:
        return None
    parallel = config.parallel
    device = "cuda" if parallel.resources_per_worker.get("GPU", 0) > 0 else "cpu"
    shell = build_shell(config.model, config.method, config.train.precision, head_before(config))
    work = work_at_most(config, parallel.max_workers, device)
    plain = parallel.model_copy(update={"strategy": "ddp"})
    teaching = teaching_of(config)
    needed = held_by(shell, plain).resident + (teaching.held if teaching is not None else 0)
    if needed <= usable:
        model = MemoryModel(shell, (work.rows,), work.width, teaching)
        parts = parallel.model_copy(update={"strategy": "fsdp"})
        needed, shared = (
            model.estimate(layout, work, device).peak + PROCESS[device] for layout in (plain, parts)
        )
        if needed <= usable or shared > usable:
            return None
    return f"a whole copy needs {needed / GIB:,.1f} GiB of a worker's {usable / GIB:,.1f}"


MOMENTS = 2
# DeepSpeed's defaults: elements that stay gathered, and our bucket (strategy/deepspeed.py).
ZERO3_LIVE = 1_000_000_000
ZERO_BUCKET = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Throughout: `parameters`, `gradients`, `optimizer` (with master weights that are held beside
    the parameters), `buffers` (gradients on their way to other workers), `teacher`. For a while:
    `gathered` weights of other workers, `activations`, `logits`, and what the optimizer's step
    takes. `offloaded` of all this lies in host memory, as does `snapshot`, the copy that a
    checkpoint is written from. `peak` is the most at any time on the device; on a CPU, device and
    host are one.
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
    teacher: int
    peak: int


class MemoryModel:
    """Estimates for one model, and for what it learns from; traces are made once and kept."""

    def __init__(
        self, shell: Shell, rows: tuple[int, ...], width: int, teaching: Teaching | None = None
    ) -> None:
        self.shell, self.width, self._teaching = shell, width, teaching
        self._rows = rows
        self._traced: dict[tuple[str, bool], Traced] = {}
        self._heads: dict[tuple[int, bool], int] = {}

    def traced(self, parallel: ParallelConfig) -> Traced:
        """What the blocks keep under a policy; casts of weights are no activations of fsdp."""
        key = (parallel.activation_checkpointing, self._casts_on_gathering(parallel))
        if key not in self._traced:
            self._traced[key] = trace(self.shell, self._rows, self.width, *key)
        return self._traced[key]

    def estimate(
        self, parallel: ParallelConfig, work: Work, device: str, saves_midway: bool = True
    ) -> Memory:
        """`parallel.strategy` is concrete. `device` is cpu or cuda; `saves_midway`: a checkpoint
        is written before the last step.
        """
        shell, held = self.shell, held_by(self.shell, parallel)
        traced = self.traced(parallel)
        blocks = len(shell.blocks)
        rows = -(-work.tokens // self.width)
        kept, peak = traced.kept.at(rows, blocks), traced.peak.at(rows, blocks)
        logits = self._head(work.labels, self._casts_on_gathering(parallel))
        away = parallel.offload if device == "cuda" else "none"
        gradients = held.gradients if away == "none" else 0
        stepping = held.stepping_cpu if device == "cpu" else held.stepping_cuda
        stepping = stepping if away == "none" else 0
        resident = held.buffers + (held.optimizer if away == "none" else 0)
        resident += held.parameters if away != "all" else 0
        teacher = self._teaching.held if self._teaching is not None else 0
        resident += teacher
        head = max((w.size for w in shell.root if w.trained), default=0) * shell.master
        # In a step of one pass, gradients come as activations go; ZeRO-3 keeps their memory.
        lasting = parallel.strategy == "deepspeed" and parallel.zero_stage == 3
        there = away == "none" and (work.micro_batches > 1 or lasting)
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
            teacher=teacher,
            peak=max(both, resident + snapshot),
        )

    def _head(self, labels: int, gathered: bool) -> int:
        key = (max(1, labels), gathered)
        if key not in self._heads:
            kd = self._teaching.settings if self._teaching is not None else None
            self._heads[key] = trace_head(self.shell, *key, kd)
        return self._heads[key]

    def _casts_on_gathering(self, parallel: ParallelConfig) -> bool:
        casts = parallel.strategy == "fsdp" and self.shell.compute < self.shell.master
        return casts and 2 * self.shell.trained > self.shell.total  # those of adapters are small


@dataclass(frozen=True)
class Held:
    """Bytes before activations, by strategy. `gradients` are there when the optimizer steps,
    `between_passes` is what is there of them before.
    """

    parameters: int
    gradients: int
    between_passes: int
    optimizer: int
    buffers: int
    gathered: int
    stepping_cpu: int
    stepping_cuda: int
    snapshot: int

    @property
    def resident(self) -> int:
        """What is there between steps."""
        return self.parameters + self.optimizer + self.buffers


def held_by(shell: Shell, parallel: ParallelConfig) -> Held:
    """What a worker holds before it computes anything; `parallel.strategy` is concrete."""
    if parallel.strategy == "fsdp":
        return _fsdp(shell, parallel)
    if parallel.strategy == "deepspeed":
        return _zero(shell, parallel)
    return _whole(shell, parallel)


def _whole(shell: Shell, parallel: ParallelConfig) -> Held:
    trained = shell.trained * shell.master
    workers = parallel.max_workers
    return Held(
        parameters=_bytes(shell, shell.weights),
        gradients=trained,
        between_passes=trained,
        optimizer=MOMENTS * trained,
        # DistributedDataParallel reduces copies, in buckets that it keeps.
        buffers=trained if parallel.strategy == "ddp" else 0,
        gathered=0,
        stepping_cpu=2 * _largest(shell, 1),
        stepping_cuda=trained,
        snapshot=(1 + MOMENTS) * trained // workers,
    )


def _fsdp(shell: Shell, parallel: ParallelConfig) -> Held:
    shards = parallel.max_workers // parallel.replicas
    trained = sum(w.share(shards) for w in shell.weights if w.trained) * shell.master
    block = max((_gathered(shell, block) for block in shell.blocks), default=0)
    moving = max((elements(block, trained=True) for block in shell.blocks), default=0)
    # The root stays whole; of the blocks one is computed, one is on its way and one is being
    # copied out of what was received. Gradients of a block are made in the dtype that weights
    # come in, and summed in the masters'.
    whole = _gathered(shell, shell.root)
    if parallel.reshard_after_forward:
        whole += min(3, len(shell.blocks)) * block
    else:
        whole += sum(_gathered(shell, each) for each in shell.blocks) + block
    if shards == 1:
        whole = 0
    return Held(
        parameters=round(sum(w.share(shards) * shell.held(w) for w in shell.weights)),
        gradients=trained,
        between_passes=trained,
        optimizer=MOMENTS * trained,
        buffers=0,
        gathered=whole + moving * (shell.compute + shell.master),
        stepping_cpu=2 * _largest(shell, shards),
        stepping_cuda=trained,
        snapshot=(1 + MOMENTS) * trained,
    )


def _zero(shell: Shell, parallel: ParallelConfig) -> Held:
    workers, stage = parallel.max_workers, parallel.zero_stage
    trained = shell.trained * shell.master
    part = -(-trained // workers)
    bucket = min(shell.trained, ZERO_BUCKET) * shell.master
    whole = _bytes(shell, shell.weights)
    gathered = 0
    if stage == 3:
        gathered = round(whole * min(1.0, ZERO3_LIVE / max(1, shell.total)))
        whole = -(-whole // workers)
    return Held(
        parameters=whole,
        gradients=part,
        between_passes=trained if stage == 1 else part,
        optimizer=(1 + MOMENTS) * part,
        buffers=bucket,
        gathered=gathered,
        stepping_cpu=2 * part,
        stepping_cuda=part,
        snapshot=(1 + MOMENTS) * part,
    )


def _offloaded(parallel: ParallelConfig, held: Held) -> int:
    if parallel.offload == "none":
        return 0
    weights = held.parameters if parallel.offload == "all" else 0
    return weights + held.optimizer + held.gradients


def _bytes(shell: Shell, weights: tuple[Weight, ...]) -> int:
    return round(sum(w.size * shell.held(w) for w in weights))


def _gathered(shell: Shell, weights: tuple[Weight, ...]) -> int:
    """Under bfloat16 all weights travel in it; else each as it is held."""
    if shell.compute < shell.master:
        return elements(weights) * shell.compute
    return _bytes(shell, weights)


def _largest(shell: Shell, shards: int) -> int:
    return max((w.share(shards) for w in shell.weights if w.trained), default=0) * shell.master
